"""The learning rate, limited by the measured change of the policy per step.

A rate that is right at the start of a run may be far too high near its end, when the policy has little entropy left. So
after each step's updates the policy is compared with the one that sampled, on a few of the step's tokens, as in
Schulman et al. (arXiv 1707.06347, section 4) and in the rules of RSL-RL and rl_games. Here the band has only an upper
edge: a policy that hardly moves may have nothing to learn, so the rate is never raised above the recipe's. A step's
divergence grows with the square of the rate. If it is more than the objective allows, the last update is undone as
well. If that was the step's only update, the divergence that led to its undoing counts.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from lmrl import distributed
from lmrl.objectives.policy_gradient import OPEN_ENTROPY, bearable, k3
from lmrl.sources.base import SourceBatch
from lmrl.training.listeners.listener import Listener
from lmrl.training.monitoring.sampler_check import logprob_differences, pick_segments

if TYPE_CHECKING:
    from lmrl.training.stage import Stage

EPISODES, TOKENS = 64, 512
"""Maximum episodes that are compared, and their maximum total tokens, over all processes."""
LOWEST_CUT, RAISE = 0.25, 1.1
"""The smallest multiplier of the factor in one step, and the multiplier that raises it again."""


def controlled(factor: float, moved: float, band: float) -> float:
    """The factor on the learning rate after a step that moved the policy by `moved` nats per token."""
    if moved > band:
        return factor * max(math.sqrt(band / moved), LOWEST_CUT)
    return min(factor * RAISE, 1.0) if moved < band / 2 else factor


class RateController(Listener):
    """Lowers the rate at once if a step moved the policy beyond the band, and raises it again slowly."""

    name = "kl_factor"

    def __init__(self, band: float):
        self.band, self.factor = band, 1.0

    def begin(self, stage: Stage, resumed: bool) -> None:
        stage.updater.factors[self.name] = self.factor

    def measure(self, stage: Stage, step: int, source_batch: SourceBatch, metrics: dict[str, Any]) -> dict[str, Any]:
        if not metrics["updates"]:
            return {}
        segments = pick_segments(source_batch.played, EPISODES // distributed.size(), TOKENS // distributed.size())
        gaps_N = logprob_differences(stage.policy, segments, stage.recipe.rollouts.temperature)
        if not distributed.all_max(len(gaps_N)):
            return {}
        moved = distributed.mean(k3(gaps_N, gaps_N.new_zeros(())))
        entropy = metrics.get("entropy", OPEN_ENTROPY)  # none while the critic warms up
        if stage.objective.rejects({"approx_kl": moved, "entropy": entropy}):
            stage.updater.undo_step()  # no later minibatch tested the last update
        if metrics["updates"] == 1:  # if it was undone, the policy is back where it was, which says nothing of the rate
            moved = max(moved, metrics.get("rejected_kl", 0.0))
        self.factor = controlled(self.factor, moved, bearable(self.band, entropy))
        stage.updater.factors[self.name] = self.factor
        return {"policy_change": moved, self.name: self.factor}

    def state(self) -> dict[str, Any]:
        return {"factor": self.factor}

    def load_state(self, state: dict[str, Any]) -> None:
        self.factor = state.get("factor", 1.0)
