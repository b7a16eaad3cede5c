"""One stage of a run: the loop. build.py builds it from its recipe; what watches it are its listeners."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lmrl import world
from lmrl.errors import MemoryShortError
from lmrl.objectives import Objective
from lmrl.policy.policy import Policy
from lmrl.recipe import Recipe
from lmrl.rollouts.engine import Engine
from lmrl.rollouts.task import Task
from lmrl.run import Run
from lmrl.seeding import seed_everything, stream
from lmrl.training import checkpoint
from lmrl.training.bundle import Attempt, keep_pass, rng_state
from lmrl.training.checkpoint import Progress
from lmrl.training.display import Display
from lmrl.training.interrupt import Interrupt, Interrupted
from lmrl.training.listeners import Listener
from lmrl.training.measures import mean_of, measure, peak_memory_mb, repetition_of_all, sample_line, samples_to_keep
from lmrl.training.nonfinite import stop_on_nonfinite
from lmrl.training.sources import Drawn, Source
from lmrl.training.strategy import Strategy
from lmrl.training.trust import Trust
from lmrl.training.updater import Updater


@dataclass(kw_only=True, eq=False)
class Stage:
    """The parts of a stage. start: the checkpoint folder of the stage before, where it begins from one. checkpoint: where it goes on,
    if it does; the policy has the weights of it already."""

    run: Run
    name: str
    recipe: Recipe
    display: Display
    interrupt: Interrupt
    track: Callable[[dict[str, Any], int], None]
    objective: Objective
    policy: Policy
    task: Task
    engine: Engine
    trust: Trust
    source: Source
    strategy: Strategy
    updater: Updater
    listeners: list[Listener]
    checkpoint: Path | None
    progress: Progress
    start: Path | None = None
    now: int = field(default=0, init=False)
    """The step under way."""
    attempt: Attempt | None = field(default=None, init=False)
    """The last update of the step under way, or of the one that is done."""

    @property
    def seed(self) -> int:
        return self.recipe.training.seed

    @property
    def notes(self) -> list[str]:
        """What a person should know about the data, and what is played."""
        plays = self.source.logged is not self.source
        return [
            *self.task.notes,
            *(self.source.logged.notes if self.source.logged else ()),
            *(self.trust.notes if plays else ()),
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
            for step in range(progress.step + 1, steps + 1):
                if any(listener.ends(self) for listener in self.listeners):
                    break
                self._step(step)
                progress.step = step
                for listener in self.listeners:
                    listener.after_step(self, step)
                if self._wants_checkpoint(step):
                    self.save()
                if stop := world.largest(self.interrupt.number or 0):
                    raise Interrupted(stop)
            for listener in self.listeners:
                listener.finish(self)
        except MemoryShortError as error:
            error.args = (f"{error}; {keep_pass(self, max(self.now, progress.step), error)}",)
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
            self.display.say("computing what the cache lacks of the reference's log-probabilities")
        logged = self.source.logged.parts() if self.source.logged else ()
        self.objective.ready(self.policy, logged, fresh=not resumed)

    def _step(self, step: int) -> None:
        """Draw, learn, record."""
        started = time.monotonic()
        self.now, self.attempt = step, None
        seed_everything(self.seed, self.name, step)
        self.objective.begin(step)
        self.updater.begin(step)
        drawn = self._draw(step)
        staleness = [self.engine.staleness(one.version) for one in drawn.played]
        assert max(staleness, default=0) <= self.recipe.rollouts.ahead, staleness
        sampled = time.monotonic()
        kept = samples_to_keep(drawn.played)
        self.run.record_samples([sample_line(self.name, step, "train", one, self.task.environment) for one in kept])
        self._compare(step, drawn)
        judged = [one for one in drawn.played if one.reward is not None]
        played, played_well, learned, failed = map(
            round, world.totals([len(drawn.played), len(judged), len(drawn.learn), drawn.failed])
        )
        metrics = self._learn(step, drawn) if learned else {"updates": 0}
        finished = time.monotonic()
        if played_well and (self.source.logged or learned < played_well):  # it learned from others, or from some
            metrics |= {f"online/{name}": value for name, value in measure(judged).items()}
        if played_well:
            metrics["repetition"] = repetition_of_all(judged)
        metrics |= {"failed": failed, "skipped": self.updater.skipped}
        if self.recipe.rollouts.ahead and staleness:
            metrics["staleness"] = sum(staleness) / len(staleness)
        for listener in self.listeners:
            metrics |= listener.measure(self, step, drawn, metrics)
        times = {
            "source_s": round(sampled - started, 3),
            "update_s": round(finished - sampled, 3),
            "samples_per_s": round((played or learned) / (finished - started), 3),
            "peak_memory_mb": world.largest(peak_memory_mb()),
        }
        self.record(step, "train", {**metrics, "time": times})
        self.track({f"{self.name}/{name}": value for name, value in (metrics | times).items()}, step)
        self.display.step(step, metrics)
        for listener in self.listeners:
            listener.recorded(self, step, drawn, metrics)
        if step % self.recipe.evaluation.show_every == 0:
            self.display.samples(drawn.played, self.recipe.evaluation.show_samples)

    def _draw(self, step: int) -> Drawn:
        self.interrupt.safe = world.size() == 1  # several processes stop together, between two steps
        self.interrupt.check()
        with self.strategy.whole():
            if self.recipe.source.name != "dataset":
                self.source.wait()
                self.engine.refresh()
            drawn = self.source.next(step)
        self.interrupt.safe = False
        return drawn

    def _compare(self, step: int, drawn: Drawn) -> None:
        """Compare what the engine says of its samples with what the learner says, where that is due."""
        ahead = self.source.wait() if self.trust.due else []  # of the learner's weights, which drawn ones may not be
        if compared := self.trust([*drawn.played, *ahead]):
            self.record(step, "check", compared)
            self.trust.judge(compared, f"stage {self.name}, step {step}")

    def _learn(self, step: int, drawn: Drawn) -> dict[str, float]:
        self.engine.rest()
        batch = self.objective.prepare(self.policy, drawn.learn)
        if not world.largest(len(batch.sequences)):  # nothing to compare
            return measure(drawn.learn) | batch.stats | {"updates": 0}
        updates: list[dict[str, float]] = []
        rng = stream(self.seed, self.name, step, "minibatches")
        rejected: dict[str, float] = {}
        for minibatch in (
            part for _ in range(self.objective.epochs) for part in batch.minibatches(rng, self.objective.minibatches)
        ):
            self.attempt = Attempt(minibatch, rng_state(self.policy.device))
            stats = self.updater.step(self.policy, self.objective, minibatch)
            if "rejected" in stats:
                rejected = {"rejected_kl": stats["approx_kl"]}
                break
            updates.append(stats)
            self.engine.stale = True
            stop_on_nonfinite(self, step, self.attempt, stats)
        return measure(drawn.learn) | batch.stats | mean_of(updates) | rejected | {"updates": len(updates)}

    # ----------------------------------------------------------------------------------------------------- checkpoints
    def _resume(self) -> bool:
        """Go back to the newest checkpoint; False: there is none."""
        found = self.checkpoint
        if found:
            self.progress = checkpoint.load(found, self.objective, self.updater, self.source)
            for listener in self.listeners:
                listener.load_state(self.progress.listeners.get(listener.name, {}))
            self.display.say(f"resumed stage {self.name} at step {self.progress.step}")
        self.run.cut(self.name, self.progress.step if found else -1)
        return bool(found)

    def roll_back(self, step: int) -> None:
        """Go on from this step's checkpoint: weights, optimizer, objective and source. What has been played ahead is forgotten."""
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
        """Leave a checkpoint of the step that is done."""
        self._checkpoint(checkpoint.checkpoint_path(self.run, self.name, self.progress.step))
        wanted = {step for listener in self.listeners for step in listener.keeps(self)}
        self.run.prune(self.name, self.recipe.training.keep_checkpoints, wanted)

    def _checkpoint(self, target: Path) -> None:
        states = {listener.name: listener.state() for listener in self.listeners}
        self.progress.listeners = {name: state for name, state in states.items() if state}
        parts = (self.policy, self.objective, self.updater, self.source)
        tensors, weights = self.updater.tensors(), self.strategy.weights()
        with self.strategy.whole():
            checkpoint.save(self.run, self.name, target, self.recipe, *parts, self.progress, tensors, weights)
            world.wait()
