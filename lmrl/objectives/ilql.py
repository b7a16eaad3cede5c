"""Implicit language Q-learning: value-based learning from logged episodes, token by token.

Snell et al., "Offline RL for natural language generation with implicit language Q learning" (arXiv 2206.11871), after
Kostrikov et al., "Offline reinforcement learning with implicit Q-learning" (arXiv 2110.06169).
"""

from __future__ import annotations

import torch

from lmrl.objectives.base import Loss
from lmrl.objectives.q import QLearning
from lmrl.policy.passes import Outputs
from lmrl.recipe import ILQLObjective
from lmrl.trajectories.batch import Microbatch

MAX_WEIGHT = 20.0
"""Cap on the weight of an action in advantage-weighted imitation."""


def next_values(values_N: torch.Tensor) -> torch.Tensor:
    """Value of the state after each action, if an episode's next action is the next entry, (N,)."""
    return torch.cat([values_N[1:], values_N.new_zeros(1)])


def expectile_weights(errors_N: torch.Tensor, expectile: float) -> torch.Tensor:
    """|expectile - 1(error < 0)|: errors of values that are too low weigh more, (N,)."""
    return torch.where(errors_N < 0, 1 - expectile, expectile)


class ILQL(QLearning):
    """L = sum_i (Q_i - (r + discount V'))^2 + |tau - 1(u < 0)| u^2 + c CE(Q_i / T, a) - w log pi(a|s)

    with u = min(Qbar_1, Qbar_2) - V and w = exp(awbc_beta u), per action token. V' is a Polyak target as well: if Q and
    V share a trunk, a V' that moves with every update of Q makes both oscillate.
    """

    options: ILQLObjective
    label = "ILQL"

    def __init__(self, options: ILQLObjective):
        super().__init__(options, twins=2, value=True)
        self.polyak = options.polyak

    def loss(self, outputs: Outputs, batch: Microbatch) -> Loss:
        fields, values_N = batch.fields, outputs.values
        advantages_N = outputs.target_q - values_N
        targets_N = fields["rewards"] + fields["discounts"] * next_values(outputs.target_values)
        expectile_N = expectile_weights(advantages_N.detach(), self.options.expectile)
        if outputs.value_logits is None:
            v_N = expectile_N * advantages_N**2 / self.unit
        else:
            v_N = expectile_N * self.category_loss(outputs.value_logits, outputs.target_q)
        q_N = self.q_loss(outputs, targets_N)
        weights_N = (self.options.awbc_beta * advantages_N.detach()).exp().clamp(max=MAX_WEIGHT)
        loss = self.total(outputs, batch, q_N + v_N, weights_N)
        real_N, (mean, std) = fields["real"], self.returns_unit
        for name, value in {"q_loss": q_N, "v_loss": v_N, "v": mean + std * values_N}.items():
            loss.stats[name] = (value.detach() * real_N).sum()
        return loss
