"""The gate's listener: evaluates during a stage's first steps, rolls back, gives up."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from lmrl.recipe import Gate
from lmrl.training.display import interval
from lmrl.training.listeners.evaluation import Evaluation
from lmrl.training.listeners.listener import Listener
from lmrl.training.listeners.recovery import end_with_best, go_back
from lmrl.training.monitoring.gate import GateState, breached, drop, has_given_up, is_due

if TYPE_CHECKING:
    from lmrl.training.stage import Stage


class GateMonitor(Listener):
    """Compares evaluations with the start of the stage, and restores the best policy if too much was lost."""

    name = "gate"

    def __init__(self, gate: Gate, evaluation: Evaluation):
        """evaluation: the same stage's listener, called before this one at every step."""
        self.gate, self.evaluation = gate, evaluation
        assert evaluation.evaluator is not None, "a gate measures on a suite"
        self.evaluator = evaluation.evaluator
        self.rolled_back_at: int | None = None

    def begin(self, stage: Stage, resumed: bool) -> None:
        if resumed:
            stage.updater.factors[self.name] = GateState(**stage.progress.gate).lr_factor
            return
        before = self.evaluator.by_start(self.evaluation.played)
        stage.progress.gate = asdict(GateState(before))
        self.evaluation.consider(stage, 0, stage.progress.scores["start"])
        stage.save()

    def after_step(self, stage: Stage, step: int) -> None:
        best = stage.progress.best
        if best is not None and best["step"] < step == getattr(stage.recipe.source, "warmup_steps", 0):
            best["step"] = step  # the same weights, and the episodes collected until now to learn from
        if not is_due(self.gate, step):
            return
        if self.evaluation.step != step:
            self.evaluation.evaluate(stage, step)
        state = GateState(**stage.progress.gate)
        lost = drop(state.before, self.evaluator.by_start(self.evaluation.played))
        state.worst = max(state.worst, lost["mean"])
        rolled_back = breached(self.gate, lost)
        line: dict[str, Any] = {"drop": lost, "rolled_back": rolled_back}
        stage.display.say(f"gate at step {step}: {interval(lost)} points lost since the start of the stage")
        if rolled_back:
            line |= self._roll_back(stage, step, state)
        stage.progress.gate = asdict(state)
        stage.record(step, "gate", line)
        if not rolled_back:
            return
        if self.ends(stage):
            why = f"{state.rollbacks} rollbacks"
            end_with_best(stage, step, self.name, line["back_to"], why, self.evaluation)
        elif step == stage.recipe.training.steps:
            self.evaluation.evaluate(stage, step)

    def _roll_back(self, stage: Stage, step: int, state: GateState) -> dict[str, float]:
        """Continue with the best policy and a lower learning rate; returns the metrics to record."""
        state.rollbacks += 1
        state.lr_factor *= self.gate.lr_factor
        self.rolled_back_at = step
        why = f"more than the {self.gate.drop:g} points allowed"
        best = stage.progress.best
        assert best is not None, "the policy at the start was scored"
        return go_back(stage, step, best["step"], self.name, state.lr_factor, why)

    def wants_checkpoint(self, stage: Stage, step: int) -> bool:
        return step == self.rolled_back_at

    def ends(self, stage: Stage) -> bool:
        return has_given_up(self.gate, stage.progress.gate)
