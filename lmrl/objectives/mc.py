"""Monte Carlo returns: Q by regression on the observed returns, and decoding guided by it.

The one-step improvement over the behaviour that Snell et al. (arXiv 2206.11871) and LMRL-Gym (arXiv 2311.18232) compare
ILQL with.
"""

from __future__ import annotations

from lmrl.objectives.base import Loss
from lmrl.objectives.q import QLearning
from lmrl.policy.passes import Outputs
from lmrl.recipe import MCObjective
from lmrl.trajectories.batch import Microbatch


class MCReturns(QLearning):
    """L = known ((Q - sum_k gamma^k r_k)^2 + c CE(Q / T, a)) - log pi(a|s), per action token.

    known = 0 where a truncation hides what followed, unless discounting makes that negligible: such a token has no
    return to regress on, and the push-down alone would raise its Q without bound. The statistic `known` is the share of
    tokens with known 1.
    """

    label = "MC returns"
    polyak = 1.0  # decoding reads the targets, which here are Q itself

    def __init__(self, options: MCObjective):
        super().__init__(options, twins=1, value=False)
        self.needs_returns = True

    def loss(self, outputs: Outputs, batch: Microbatch) -> Loss:
        known_N = batch.fields["floors"].isfinite().float()
        q_N = known_N * self.q_loss(outputs, batch.fields["returns"])
        loss = self.total(outputs, batch, q_N, pushed_N=known_N)
        for name, value in {"q_loss": q_N, "known": known_N}.items():
            loss.stats[name] = (value.detach() * batch.fields["real"]).sum()
        return loss
