"""Asynchronous rollouts (`rollouts.ahead=1`): while a step trains, the next step's episodes are sampled with older
weights.

Staleness is at most one step: Noukhovitch et al., "Asynchronous RLHF: faster and more efficient off-policy RL for
language models" (arXiv 2410.18252). The weights are those from before the step's update, so the samples do not depend
on timing. A remote engine samples in a thread while the learner trains; an engine that shares the learner's weights or
process samples before the update, with the same result.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from concurrent import futures
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lmrl import distributed
from lmrl.errors import RunError
from lmrl.sources.base import Source, SourceBatch
from lmrl.trajectories.store import read_episodes, write_episodes
from lmrl.trajectories.trajectory import Trajectory

if TYPE_CHECKING:
    from lmrl.sources.fresh import FreshRollouts

EPISODES_FILE, STATE_FILE = "ahead.parquet", "ahead.json"
POLL = 0.1
"""Seconds between checks for an interrupt while waiting."""


class RolloutsCancelled(BaseException):
    """Raised in the sampling thread when its episodes are no longer needed."""


@dataclass
class Pending:
    """A step's episodes, in progress or finished."""

    step: int
    future: futures.Future[SourceBatch]

    @property
    def result(self) -> SourceBatch | None:
        """None while sampling, and if it failed."""
        return self.future.result() if self.future.done() and self.future.exception() is None else None


class AsyncRollouts(Source):
    """Fresh rollouts, sampled when the previous step begins. The first step samples its own episodes and the second's.

    An error in the thread is raised by `next` of the step that needs the episodes.
    """

    def __init__(self, fresh: FreshRollouts, steps: int):
        """steps: length of the stage; nothing is sampled beyond it. Raises RunError in a launch of several
        processes."""
        # Scoring and metrics use collectives, which two threads must not call at once.
        if distributed.size() > 1:
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
        # If this is interrupted, `_pending` is still this step's, and a resumed run begins with it.
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
        """Wait for the episodes in progress, and save them with log-probabilities and rewards."""
        self.wait()
        self.fresh.save(folder)
        pending = self._pending
        if pending is None or (batch := pending.result) is None:
            return
        places = {id(trajectory): place for place, trajectory in enumerate(batch.played)}
        state = {
            "step": pending.step,
            "staleness": max(self.engine.staleness(trajectory.version) for trajectory in batch.played),
            "steady": [trajectory.steady for trajectory in batch.played],
            "learn": [places[id(trajectory)] for trajectory in batch.learn],
            "failed": batch.failed,
            "dropped": batch.dropped,
        }
        write_episodes(folder / EPISODES_FILE, batch.played, self.tokenizer)
        (folder / STATE_FILE).write_text(json.dumps(state) + "\n")

    def load(self, folder: Path) -> None:
        self.fresh.load(folder)
        if not (folder / STATE_FILE).exists():
            return
        state = json.loads((folder / STATE_FILE).read_text())
        played = read_episodes(folder / EPISODES_FILE, self.tokenizer)
        for trajectory, steady in zip(played, state.get("steady", [None] * len(played)), strict=True):
            trajectory.steady = steady
            trajectory.version = self.engine.syncs + self.engine.stale - state["staleness"]
        batch = SourceBatch(
            [played[place] for place in state["learn"]], played, state["failed"], state.get("dropped", 0)
        )
        self._pending = Pending(state["step"], completed(batch))


def completed(batch: SourceBatch) -> futures.Future[SourceBatch]:
    future: futures.Future[SourceBatch] = futures.Future()
    future.set_result(batch)
    return future


def run_in_thread(work: Callable[[], SourceBatch]) -> futures.Future[SourceBatch]:
    """Run `work` in a daemon thread; the future holds its result or error."""
    future: futures.Future[SourceBatch] = futures.Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True, name="async rollouts").start()
    return future
