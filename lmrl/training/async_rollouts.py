"""One step ahead: while a step is learned from, the episodes of the next one are played, with weights one step older.

Asynchronous learning with a bound of one step on staleness: Noukhovitch et al., "Asynchronous RLHF: faster and more
efficient off-policy RL for language models" (arXiv 2410.18252). The weights are those from before the step's update, so
that what is played does not depend on how long anything takes. An engine in other processes plays in a thread beside the
training; one that shares the learner's weights or its process plays first, which is the same, only not at once.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from concurrent import futures
from dataclasses import dataclass
from pathlib import Path

from lmrl import distributed
from lmrl.errors import RunError
from lmrl.training.sources import FreshRollouts, Source, SourceBatch
from lmrl.trajectories.store import read_episodes, write_episodes
from lmrl.trajectories.trajectory import Trajectory

EPISODES_FILE, STATE_FILE = "ahead.parquet", "ahead.json"
POLL = 0.1
"""Seconds between looks for an interrupt while waiting."""


class RolloutsCancelled(BaseException):
    """Raised in the thread that plays, where what it plays is not wanted any more."""


@dataclass
class Pending:
    """The episodes of a step, under way or played."""

    step: int
    future: futures.Future[SourceBatch]

    @property
    def result(self) -> SourceBatch | None:
        """None: there is none yet, or it went wrong."""
        return self.future.result() if self.future.done() and self.future.exception() is None else None


class AsyncRollouts(Source):
    """Fresh rollouts, each step's played as the step before begins. The first step plays its own and the second's.

    What goes wrong in the thread is raised by the `next` of the step that was to learn from it.
    """

    def __init__(self, fresh: FreshRollouts, steps: int):
        """steps: of the stage; nothing is played beyond. Raises RunError in one of several processes."""
        if (
            distributed.size() > 1
        ):  # judging and measuring talk to the other processes, and would from two threads at once
            raise RunError(
                f"rollouts.ahead=1 is for one process, but this is a launch of {distributed.size()}: set it to 0"
            )
        self.fresh, self.steps, self.name = fresh, steps, fresh.name
        self.engine, self.tokenizer = fresh.sampler.engine, fresh.sampler.task.renderer.tokenizer
        self.check = self.engine.check
        self._pending: Pending | None = None
        self._cancelled = threading.Event()

    def next(self, step: int) -> SourceBatch:
        self.wait()
        if self._pending is None:
            self._pending = Pending(step, completed(self.fresh.next(step)))
        assert self._pending.step == step, (self._pending.step, step)
        batch = self._pending.future.result()
        # If playing ahead is interrupted, what is pending is still this step's, and a resumed run begins with it.
        self._pending = self._begin(step + 1) if step < self.steps else None
        return batch

    def _begin(self, step: int) -> Pending:
        self.engine.refresh()
        if self.engine.is_remote:
            return Pending(step, run_in_thread(lambda: self._play_in_background(step)))
        return Pending(step, completed(self.fresh.next(step)))

    def _play_in_background(self, step: int) -> SourceBatch:
        with self.engine.pinned_weights(self._raise_if_cancelled):
            return self.fresh.next(step)

    def _raise_if_cancelled(self) -> None:
        if self._cancelled.is_set():
            raise RolloutsCancelled
        self.check()

    def wait(self) -> list[Trajectory]:
        while self._pending is not None and not self._pending.future.done():
            futures.wait([self._pending.future], POLL)
            self.check()
        batch = self._pending and self._pending.result
        return batch.played if batch else []

    def stop(self, forget: bool = False) -> None:
        if self._pending is None:
            return
        self._cancelled.set()
        futures.wait([self._pending.future])
        self._cancelled.clear()
        if forget or self._pending.result is None:
            self._pending = None

    # ----------------------------------------------------------------------------------------------------- checkpoints
    def save(self, folder: Path) -> None:
        """What is under way is waited for, and kept with its log-probabilities and rewards."""
        self.wait()
        self.fresh.save(folder)
        pending = self._pending
        if pending is None or (batch := pending.result) is None:
            return
        places = {id(trajectory): place for place, trajectory in enumerate(batch.played)}
        state = {
            "step": pending.step,
            "staleness": max(self.engine.staleness(trajectory.version) for trajectory in batch.played),
            "learn": [places[id(trajectory)] for trajectory in batch.learn],
            "failed": batch.failed,
        }
        write_episodes(folder / EPISODES_FILE, batch.played, self.tokenizer)
        (folder / STATE_FILE).write_text(json.dumps(state) + "\n")

    def load(self, folder: Path) -> None:
        self.fresh.load(folder)
        if not (folder / STATE_FILE).exists():
            return
        state = json.loads((folder / STATE_FILE).read_text())
        played = read_episodes(folder / EPISODES_FILE, self.tokenizer)
        for trajectory in played:
            trajectory.version = self.engine.syncs + self.engine.stale - state["staleness"]
        batch = SourceBatch([played[place] for place in state["learn"]], played, state["failed"])
        self._pending = Pending(state["step"], completed(batch))


def completed(batch: SourceBatch) -> futures.Future[SourceBatch]:
    future: futures.Future[SourceBatch] = futures.Future()
    future.set_result(batch)
    return future


def run_in_thread(work: Callable[[], SourceBatch]) -> futures.Future[SourceBatch]:
    """Have `work` done by a thread that does not keep the process from ending; the future holds what comes of it."""
    future: futures.Future[SourceBatch] = futures.Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True, name="async rollouts").start()
    return future
