"""The guard: follows measurements that a stage makes anyway, warns of certain failures, and rolls a collapsed stage
back to its best policy.

It needs no pass of the model and plays nothing. Its cost is checkpoints: one at the start of the stage, and one
whenever the last steps are certainly better than those of the kept checkpoint, about twenty per stage at most.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from zlib import crc32

from lmrl import distributed
from lmrl.objectives import Objective
from lmrl.recipe import Recipe
from lmrl.sources.base import SourceBatch
from lmrl.training.checkpoint import checkpoint_path
from lmrl.training.listeners.evaluation import Evaluation
from lmrl.training.listeners.listener import Listener
from lmrl.training.listeners.recovery import end_with_best, go_back, leave_checkpoint, warn
from lmrl.training.monitoring.bundle import keep_update, rng_state
from lmrl.training.monitoring.collapse import KEEP, LEAST, START, RollbackPoint, Step, Tracker
from lmrl.training.monitoring.detectors import DETECTORS, WIDE, Row, Settings, between_groups
from lmrl.training.monitoring.measures import fresh
from lmrl.visible import visible

if TYPE_CHECKING:
    from lmrl.training.stage import Stage

LR_FACTOR, MAX_ROLLBACKS = 0.3, 3
"""Factor on the learning rate after a rollback, and maximum rollbacks per stage."""
CHECKPOINTS = 20
"""About how many checkpoints per stage the guard may ask for."""
UNKNOWN = "unknown_text"
"""Name of the warning of text that the vocabulary of a model from scratch lacks."""
FRESH = {"reward_std": "reward_std", "length": "length", "cut": "cut"}
OWN = {
    "entropy": "entropy",
    "explained": "explained_variance",
    "between": "reward_between",
    "held": "kl_factor",
    "grad_norm": "grad_norm",
}
"""The guard's names of measurements, and those in a step's metrics: of fresh episodes, and of the training batch."""


class Guard(Listener):
    """Watches a stage for collapse (collapse.py) and other failures (detectors.py). The last of the listeners."""

    name = "guard"

    def __init__(self, recipe: Recipe, objective: Objective, evaluation: Evaluation):
        self.recipe, self.objective, self.evaluation = recipe, objective, evaluation
        training = recipe.training
        self.on_collapse = training.on_collapse
        self.tracker = Tracker(every=max(KEEP, training.steps // CHECKPOINTS))
        self.first: list[Row] = []
        """The first START values of each measure, and the last WIDE steps since the stage began or was rolled back."""
        self.last: list[Row] = []
        self.said: list[str] = []
        self.rollbacks, self.lr_factor = 0, 1.0
        self.took_back_at: int | None = None
        self.unknown = False

    @property
    def keeps_checkpoints(self) -> bool:
        return self.on_collapse != "warn" and self.recipe.training.steps >= LEAST

    # ------------------------------------------------------------------------------------------------------------- steps
    def begin(self, stage: Stage, resumed: bool) -> None:
        self.settings = settings_of(stage)
        stage.updater.factors[self.name] = self.lr_factor
        if self.unknown:  # the checkpoint was saved without a guard: it is the first one to roll back to
            self.tracker.kept = RollbackPoint(stage.progress.step)
        if self.keeps_checkpoints and not resumed:
            # One process decides: the main one may write the checkpoint before another looks for it.
            if not distributed.broadcast(checkpoint_path(stage.run, stage.name, 0).exists()):
                stage.save()

    def measure(self, stage: Stage, step: int, source_batch: SourceBatch, metrics: dict[str, Any]) -> dict[str, Any]:
        """How much of the reward's variance prompts explain, if there is a critic that could learn it. Episodes of one
        prompt are told by its text: what the seed hides from the policy, it hides from the critic."""
        if "explained_variance" not in metrics or self.recipe.rollouts.samples == 1:
            return {}
        earned = distributed.all_gather(
            [(crc32(one.prompt.encode()), one.reward) for one in source_batch.played if one.reward is not None]
        )
        between = between_groups(earned)
        return {} if between is None else {"reward_between": between}

    def recorded(self, stage: Stage, step: int, source_batch: SourceBatch, metrics: dict[str, Any]) -> None:
        row = row_of(metrics, self.recipe, step, stage.task.sides)
        self.last = [*self.last, row][-WIDE:]
        note_first(self.first, row)
        measured = measured_of(metrics, self.recipe, self.objective, stage.task.sides)
        if measured is not None:
            self.tracker.add(step, measured)
        unknown = stage.task.renderer.unknown
        if unknown is not None and self.recipe.model.config is not None and UNKNOWN not in self.said:
            self.said.append(UNKNOWN)
            letters = "" if self.recipe.model.tokenizer == "char" else ", or set model.tokenizer=char"
            warn(
                stage,
                step,
                UNKNOWN,
                f"the vocabulary lacks {visible(unknown)[:40]!r}, so the policy can neither read nor write it: add it to the "
                f"environment's texts(){letters}",
            )
        gained = self.tracker.gained
        for name, detector in DETECTORS.items():
            if name not in self.said and (text := detector(self.first, self.last, self.settings, gained)):
                self.said.append(name)
                warn(stage, step, name, text)

    def after_step(self, stage: Stage, step: int) -> None:
        closing = step == self.recipe.training.steps
        if stage.progress.ended is not None or not distributed.broadcast(self.tracker.collapsed(closing)):
            return
        lost = self.tracker.loss()
        if self.on_collapse == "warn":
            if "collapse" not in self.said:
                self.said.append("collapse")
                warn(stage, step, "collapse", f"{lost}: set training.on_collapse=rollback, or {self._lower()}")
                self._keep(stage, step, lost)
            return
        kept = self._keep(stage, step, lost)
        if not stage.strategy.can_reload_weights:
            warn(stage, step, "collapse", f"{lost}: {self._lower()}")
            leave_checkpoint(stage, step, self.tracker.kept.step, self.name, "collapse")
            return
        self.rollbacks += 1
        to, given_up = self.tracker.kept.step, self.on_collapse == "stop" or self.rollbacks > MAX_ROLLBACKS or closing
        warn(stage, step, "collapse", f"{lost}: {self._lower()}")
        self.lr_factor *= LR_FACTOR
        line = go_back(stage, step, to, self.name, self.lr_factor, "collapse")
        stage.record(step, "guard", {"found": "collapse", "rollbacks": self.rollbacks, **line, **kept})
        self.took_back_at = step
        if given_up:
            why = "training.on_collapse=stop" if self.on_collapse == "stop" else "it was the last step"
            if self.rollbacks > MAX_ROLLBACKS:
                why = f"collapsed again after {MAX_ROLLBACKS} rollbacks"
            end_with_best(stage, step, self.name, to, why, self.evaluation)

    def _keep(self, stage: Stage, step: int, lost: str) -> dict[str, str]:
        """Write a bundle of the step's last minibatch, the collapsed weights, and what a pass measures with them;
        returns the metrics to record. Costs a pass, and a copy of the weights."""
        begun = stage.attempt
        if not distributed.broadcast(begun is not None):
            return {}
        assert begun is not None, "all ranks have begun an update, or none"
        stage.engine.release_memory()
        attempt = replace(begun, rng=rng_state(stage.policy.device))
        can_probe = stage.strategy.can_discard
        stats = stage.updater.probe(stage.policy, stage.objective, attempt.minibatch) if can_probe else {}
        details = {"collapse": lost, "best_step": self.tracker.kept.step, "last_steps": self.last}
        target, text = keep_update(stage, step, "collapse", attempt, stats, details)
        stage.display.say(f"collapse at step {step}: {text}")
        return {"bundle": str(target.relative_to(stage.run.folder))}

    def _lower(self) -> str:
        lr = self.settings.lr
        return f"lower optimizer.lr from {lr:.2g} to {lr * LR_FACTOR * self.lr_factor:.2g}"

    # ------------------------------------------------------------------------------------------------------- checkpoints
    def wants_checkpoint(self, stage: Stage, step: int) -> bool:
        if not self.keeps_checkpoints:
            return False
        candidate = self.tracker.candidate
        return step == self.took_back_at or (candidate is not None and candidate.step == step)

    def keeps(self, stage: Stage) -> Iterable[int]:
        if not self.keeps_checkpoints:
            return ()
        return [one.step for one in (self.tracker.kept, self.tracker.candidate) if one is not None]

    def rolled_back(self, stage: Stage, step: int) -> None:
        self.last = []
        self.tracker.taken_back(step)

    def ends(self, stage: Stage) -> bool:
        return stage.progress.ended is not None

    # ------------------------------------------------------------------------------------------------------------- state
    def state(self) -> dict[str, Any]:
        own = {"first": self.first, "last": self.last, "said": self.said}
        own |= {"rollbacks": self.rollbacks, "lr_factor": self.lr_factor}
        return own | {"tracker": self.tracker.state()}

    def load_state(self, state: dict[str, Any]) -> None:
        if not state:
            self.unknown = True
            return
        self.first, self.last, self.said = state["first"], state["last"], state["said"]
        self.rollbacks, self.lr_factor = state["rollbacks"], state["lr_factor"]
        self.tracker = Tracker.of(state["tracker"])


# ---------------------------------------------------------------------------------------------------- of a step's metrics
def settings_of(stage: Stage) -> Settings:
    options, recipe = stage.updater.options, stage.recipe
    heads = stage.objective.heads is not None
    return Settings(
        steps=recipe.training.steps,
        lr=options.lr or 0.0,
        head_lr=options.head_lr if heads else None,
        samples=recipe.rollouts.samples,
        max_new_tokens=recipe.rollouts.max_new_tokens,
        entropy_coef=getattr(recipe.objective, "entropy_coef", None),
        missing_eos_penalty=getattr(recipe.objective, "missing_eos_penalty", None),
        has_eos_penalty=hasattr(recipe.objective, "missing_eos_penalty"),
        max_turns=getattr(recipe.task, "max_turns", None),
        can_resample=hasattr(recipe.source, "resample"),
        self_play=stage.task.sides > 1,
    )


def row_of(metrics: dict[str, Any], recipe: Recipe, step: int, sides: int = 1) -> Row:
    """The part of a step's metrics that the detectors use. sides: trajectories per episode."""
    row = {name: metrics[own] for name, own in OWN.items() if own in metrics}
    if "repetition" in metrics:  # something was played
        row |= {name: value for name, own in FRESH.items() if (value := fresh(metrics, own)) is not None}
        row["alike"] = metrics.get("zero_spread", float(row.get("reward_std") == 0))
        row["failed"] = metrics["failed"] / (recipe.rollouts.prompts * recipe.rollouts.samples * sides)
    moved = metrics.get("policy_change", metrics.get("approx_kl") if metrics["updates"] > 1 else None)
    if moved is not None and "approx_kl" in metrics and step > recipe.optimizer.warmup_steps:
        row["moved"] = moved
    return row


def measured_of(metrics: dict[str, Any], recipe: Recipe, objective: Objective, sides: int = 1) -> Step | None:
    """The measurement that shows a collapse: the reward of fresh episodes, or the negative loss on logged data."""
    if "repetition" in metrics:
        failed, episodes = metrics["failed"], recipe.rollouts.prompts * recipe.rollouts.samples * sides
        mean, spread = fresh(metrics, "reward"), fresh(metrics, "reward_std")
        return None if mean is None or spread is None else Step(mean, spread, max(episodes - failed, 1))
    loss = metrics.get(objective.loss_of_data or "") if not recipe.source.plays else None
    return None if loss is None else Step(-loss, abs(loss))


def note_first(first: list[Row], row: Row) -> None:
    """Add each of a step's values to the first START of its measure."""
    for name, value in row.items():
        place = next((place for place, one in enumerate(first) if name not in one), len(first))
        if place < START:
            first += [{}] if place == len(first) else []
            first[place][name] = value
