"""One stage of a run: the training loop. build.py builds it from its recipe; listeners watch it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lmrl import distributed
from lmrl.engines.base import Engine
from lmrl.errors import EpisodeError, MemoryShortError
from lmrl.objectives import Objective
from lmrl.policy.policy import Policy
from lmrl.recipe import Recipe
from lmrl.rollouts.task import Task
from lmrl.run import Run
from lmrl.seeding import seed_everything, stream
from lmrl.sources.base import Source, SourceBatch
from lmrl.training import checkpoint
from lmrl.training.checkpoint import Progress
from lmrl.training.display import Display, spread_out
from lmrl.training.interrupt import Interrupt, Interrupted
from lmrl.training.listeners import Listener
from lmrl.training.monitoring.bundle import Attempt, keep_pass, rng_state
from lmrl.training.monitoring.failed_batch import keep_failed
from lmrl.training.monitoring.measures import (
    fresh,
    mean_of,
    measure,
    peak_memory_mb,
    repetition_of_all,
    sample_line,
    samples_to_keep,
)
from lmrl.training.monitoring.nonfinite import stop_on_nonfinite
from lmrl.training.monitoring.sampler_check import SamplerCheck
from lmrl.training.parallel.strategy import Strategy
from lmrl.training.tracking import StageTracking
from lmrl.training.updater import Updater
from lmrl.trajectories.balance import Cost, deal, joined, labelled
from lmrl.trajectories.batch import Batch


@dataclass(kw_only=True, eq=False)
class Stage:
    """The parts of a stage.

    start: the previous stage's checkpoint folder, if the stage begins from one. checkpoint: the one to resume from, if
    any; the policy already holds its weights.
    """

    run: Run
    name: str
    recipe: Recipe
    display: Display
    interrupt: Interrupt
    track: StageTracking
    objective: Objective
    policy: Policy
    task: Task
    engine: Engine
    sampler_check: SamplerCheck
    source: Source
    strategy: Strategy
    updater: Updater
    listeners: list[Listener]
    checkpoint: Path | None
    progress: Progress
    cost: Cost | None = None
    """The cost of a sequence's pass; None: processes exchange no sequences."""
    start: Path | None = None
    now: int = field(default=0, init=False)
    """The current step."""
    attempt: Attempt | None = field(default=None, init=False)
    """The last update of the current step, or of the step that has just finished."""

    @property
    def seed(self) -> int:
        return self.recipe.training.seed

    @property
    def notes(self) -> list[str]:
        """Notes for the user about the data and the rollouts."""
        plays = self.source.dataset is not self.source
        return [
            *self.task.notes,
            *self.source.task_notes,
            *(self.source.dataset.notes if self.source.dataset else ()),
            *(self.sampler_check.notes if plays else ()),
        ]

    def record(self, step: int, kind: str, values: dict[str, Any]) -> None:
        """Append a line of this stage to metrics.jsonl."""
        self.run.record({"stage": self.name, "step": step, "kind": kind, **values})

    # -------------------------------------------------------------------------------------------------------- the loop
    def train(self) -> None:
        """Run the remaining steps and leave `final/`."""
        resumed = self._resume()
        steps, progress = self.recipe.training.steps, self.progress
        self.display.begin(self.name, progress.label, steps, progress.step)
        try:
            self._ready(resumed)
            for listener in self.listeners:
                listener.begin(self, resumed)
            self.display.steps_begin()
            for step in range(progress.step + 1, steps + 1):
                if any(listener.ends(self) for listener in self.listeners):
                    break
                self._step(step)
                progress.step = step
                for listener in self.listeners:
                    listener.after_step(self, step)
                if self._wants_checkpoint(step):
                    self.save()
                if stop := distributed.all_max(self.interrupt.number or 0):
                    raise Interrupted(stop)
            for listener in self.listeners:
                listener.finish(self)
        except MemoryShortError as error:
            error.args = (f"{error}; {keep_pass(self, max(self.now, progress.step), error)}",)
            raise
        except EpisodeError as error:
            keep_failed(self, error)
            raise
        except Interrupted:
            self.source.stop()
            if progress.step > 0:
                self.save()
                self.display.say(f"saved a checkpoint at step {progress.step} of stage {self.name}")
            raise
        finally:
            self.display.end()
            self.source.stop()
            self.engine.close()
        self._checkpoint(self.run.final(self.name))
        self.strategy.close()
        for listener in self.listeners:
            listener.end(self)

    def _ready(self, resumed: bool) -> None:
        if getattr(self.recipe.objective, "cache_reference", False):
            self.display.say("computing the reference's log-probabilities that are missing in the cache")
        dataset = self.source.dataset.parts() if self.source.dataset else ()
        self.objective.ready(self.policy, dataset, fresh=not resumed)

    def _step(self, step: int) -> None:
        """Get a batch, train on it, record."""
        started = time.monotonic()
        self.now, self.attempt = step, None
        seed_everything(self.seed, self.name, step)
        self.objective.begin(step)
        self.updater.begin(step)
        source_batch = self._next_batch(step)
        staleness = [self.engine.staleness(one.version) for one in source_batch.played]
        assert max(staleness, default=0) <= self.recipe.rollouts.ahead, staleness
        sampled = time.monotonic()
        kept = samples_to_keep(source_batch.played)
        self.run.record_samples([sample_line(self.name, step, "train", one, self.task.environment) for one in kept])
        self._compare(step, source_batch)
        judged = [one for one in source_batch.played if one.reward is not None]
        played, played_well, learned, failed = map(
            round,
            distributed.all_sum([len(source_batch.played), len(judged), len(source_batch.learn), source_batch.failed]),
        )
        metrics: dict[str, Any] = self._learn(step, source_batch) if learned else {"updates": 0}
        finished = time.monotonic()
        # Trained on logged data, or on a subset of the fresh episodes: these get their own metrics.
        if played_well and (self.source.dataset or learned < played_well):
            metrics |= {f"online/{name}": value for name, value in measure(judged).items()}
        if played_well:
            metrics["repetition"] = repetition_of_all(judged)
        metrics |= {"failed": failed, "skipped": self.updater.skipped}
        if dropped := round(distributed.all_sum([source_batch.dropped])[0]):
            metrics["dropped"] = dropped
        metrics |= source_batch.measures
        if self.recipe.rollouts.ahead and staleness:
            metrics["staleness"] = sum(staleness) / len(staleness)
        for listener in self.listeners:
            metrics |= listener.measure(self, step, source_batch, metrics)
        times = {
            "source_s": round(sampled - started, 3),
            "update_s": round(finished - sampled, 3),
            "samples_per_s": round((played or learned) / (finished - started), 3),
            "peak_memory_mb": distributed.all_max(peak_memory_mb()),
        }
        self.record(step, "train", {**metrics, "time": times})
        self.track({f"{self.name}/{name}": value for name, value in (metrics | times).items()}, step)
        # Of logged episodes, the reward says nothing of the policy; that of pairs is their order.
        self.display.step(step, metrics | {"reward": fresh(metrics, "reward") if played_well else None})
        for listener in self.listeners:
            listener.recorded(self, step, source_batch, metrics)
        if step % self.recipe.evaluation.show_every == 0:
            shown = spread_out(source_batch.played, self.recipe.evaluation.show_samples)
            self.display.samples(shown, len(shown))
            self.track.samples(shown, step)

    def _next_batch(self, step: int) -> SourceBatch:
        self.interrupt.safe = distributed.size() == 1  # several ranks stop together, between two steps
        self.interrupt.check()
        with self.strategy.gathered_weights():
            if self.recipe.source.plays:
                self.source.wait()
                self.engine.refresh()
            source_batch = self.source.next(step)
        self.interrupt.safe = False
        return source_batch

    def _compare(self, step: int, source_batch: SourceBatch) -> None:
        """Run the sampler check if it is due."""
        # Asynchronous rollouts: the batch comes from older weights, the pending episodes from the current ones.
        pending = self.source.wait() if self.sampler_check.due else []
        if compared := self.sampler_check([*source_batch.played, *pending]):
            self.record(step, "check", compared)
            self.sampler_check.raise_on_mismatch(compared, f"stage {self.name}, step {step}")

    def _learn(self, step: int, source_batch: SourceBatch) -> dict[str, float]:
        self.engine.release_memory()
        batch = self.objective.prepare(self.policy, source_batch.learn)
        if not distributed.all_max(len(batch.sequences)):  # no episodes to compare
            return measure(source_batch.learn, batch.stats) | batch.stats | {"updates": 0}
        updates: list[dict[str, float]] = []
        rejected: dict[str, float] = {}
        with distributed.prompt():  # all ranks are here, and none has much more to do than the others
            for minibatch in self._minibatches(step, batch):
                self.attempt = Attempt(minibatch, rng_state(self.policy.device))
                stats = self.updater.step(self.policy, self.objective, minibatch)
                if "rejected" in stats:
                    rejected = {"rejected_kl": stats["approx_kl"]}
                    break
                updates.append(stats)
                self.engine.stale = True
                stop_on_nonfinite(self, step, self.attempt, stats)
        stats = batch.stats | mean_of(updates) | rejected | {"updates": len(updates)}
        return measure(source_batch.learn, stats) | stats

    def _minibatches(self, step: int, batch: Batch) -> Iterator[Batch]:
        """This rank's parts of the minibatches of all epochs, about as costly as the other ranks'."""
        rng = stream(self.seed, self.name, step, "minibatches")
        cost, index_fields, count = self.cost, self.objective.index_fields, self.objective.minibatches
        if distributed.size() == 1 or cost is None or index_fields is None:
            for _ in range(self.objective.epochs):
                yield from batch.minibatches(rng, count)
            return
        batch = labelled(batch, index_fields)
        for _ in range(self.objective.epochs):
            parts = deal(batch, rng, count, cost)
            yield from parts
            batch = joined(parts)

    # ----------------------------------------------------------------------------------------------------- checkpoints
    def _resume(self) -> bool:
        """Load the newest checkpoint; False if there is none."""
        found = self.checkpoint
        if found:
            self.progress = checkpoint.load(found, self.objective, self.updater, self.source)
            for listener in self.listeners:
                listener.load_state(self.progress.listeners.get(listener.name, {}))
            self.display.say(f"resumed stage {self.name} at step {self.progress.step}")
        self.run.cut(self.name, self.progress.step if found else -1)
        return bool(found)

    def roll_back(self, step: int) -> None:
        """Continue from this step's checkpoint: weights, optimizer, objective and source. Pending rollouts are
        dropped."""
        kept = checkpoint.checkpoint_path(self.run, self.name, step)
        self.source.stop(forget=True)
        checkpoint.roll_back(kept, self.recipe, self.policy, self.objective, self.updater, self.source, self.strategy)
        self.engine.stale = True
        self.source.stop(forget=True)
        for listener in self.listeners:
            listener.rolled_back(self, step)

    def _wants_checkpoint(self, step: int) -> bool:
        every = self.recipe.training.checkpoint_every
        return bool(every and step % every == 0) or any(one.wants_checkpoint(self, step) for one in self.listeners)

    def save(self) -> None:
        """Save a checkpoint of the last finished step."""
        self._checkpoint(checkpoint.checkpoint_path(self.run, self.name, self.progress.step))
        wanted = {step for listener in self.listeners for step in listener.keeps(self)}
        self.run.prune(self.name, self.recipe.training.keep_checkpoints, wanted)

    def _checkpoint(self, target: Path) -> None:
        states = {listener.name: listener.state() for listener in self.listeners}
        self.progress.listeners = {name: state for name, state in states.items() if state}
        parts = (self.policy, self.objective, self.updater, self.source)
        tensors, weights = self.updater.tensors(), self.strategy.weights()
        with self.strategy.gathered_weights():
            checkpoint.save(self.run, self.name, target, self.recipe, *parts, self.progress, tensors, weights)
            distributed.barrier()
