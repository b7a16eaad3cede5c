"""An entropy bonus that keeps a policy from becoming deterministic before it has learned enough.

A policy gradient makes more likely what has earned more, and a policy that tries nothing else cannot find out that it was
wrong. So entropy may fall to 0 at most in a straight line; below that, a bonus grows in proportion to what is missing.
Soft actor-critic adapts its temperature to a constant target (Haarnoja et al., arXiv 1812.05905, section 5); here the
target falls, because the best policy of most tasks is deterministic, and the bonus follows the entropy alone: one that
adds up what has been missing swings around the target.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lmrl.objectives.policy_gradient import PolicyGradient
from lmrl.sources.base import SourceBatch
from lmrl.training.listeners.listener import Listener

if TYPE_CHECKING:
    from lmrl.training.stage import Stage

LARGEST_BONUS = 0.3
"""The bonus of a policy without any entropy; advantages have a deviation of about 1."""


def target_entropy(first: float, step: int, last: float) -> float:
    """The least entropy after a step: from `first` at step 0 to 0 at step `last` in a straight line."""
    return first * max(1 - step / last, 0.0)


def bonus_for(entropy: float, target: float) -> float:
    """The bonus for a policy of this entropy, which should be at least `target`."""
    return LARGEST_BONUS * min(max(1 - entropy / target, 0.0), 1.0) if target > 0 else 0.0


class EntropyController(Listener):
    """Sets the weight of a policy gradient's entropy bonus after each step, to no less than the recipe's."""

    name = "entropy_bonus"

    def __init__(self, share: float):
        """share: of the stage's steps, in which entropy is held."""
        self.share, self.first, self.bonus = share, 0.0, 0.0

    def begin(self, stage: Stage, resumed: bool) -> None:
        self._apply(stage)

    def measure(self, stage: Stage, step: int, source_batch: SourceBatch, metrics: dict[str, Any]) -> dict[str, Any]:
        if "entropy" not in metrics:  # the critic warms up, or no update was made
            return {}
        self.first = self.first or metrics["entropy"]
        target = target_entropy(self.first, step, self.share * stage.recipe.training.steps)
        self.bonus = bonus_for(metrics["entropy"], target)
        self._apply(stage)
        return {self.name: self.bonus}

    def _apply(self, stage: Stage) -> None:
        assert isinstance(stage.objective, PolicyGradient)
        stage.objective.entropy_coef = max(self.bonus, stage.objective.options.entropy_coef)

    def state(self) -> dict[str, Any]:
        return {"first": self.first, "bonus": self.bonus}

    def load_state(self, state: dict[str, Any]) -> None:
        self.first, self.bonus = state.get("first", 0.0), state.get("bonus", 0.0)
