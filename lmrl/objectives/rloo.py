"""RLOO: the other episodes of the group as the baseline (Ahmadian et al., arXiv 2402.14740)."""

from __future__ import annotations

import torch

from lmrl.objectives.group import TURN, GroupPolicyGradient
from lmrl.objectives.groups import episode_sums
from lmrl.objectives.turns import Turns, less_group_mean


class RLOO(GroupPolicyGradient):
    """A = R - mean of the other episodes of the group; a turn is one action, with the ratio of its tokens' joint
    probability.

    The divergence from the reference is subtracted from the turn's reward.
    """

    label = "RLOO"
    penalises_reward = True

    def baseline(self, turns: Turns) -> torch.Tensor:
        return less_group_mean(turns, leave_one_out=True)

    def weights(self, fields: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.ones_like(fields["share"]), fields["share"]

    def token_losses(
        self, logprobs_N: torch.Tensor, old_N: torch.Tensor, fields: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A turn's loss, split evenly over its tokens."""
        turn_N = fields[TURN]
        place_N = turn_N.unique(return_inverse=True)[1]
        size_N = episode_sums(torch.ones_like(logprobs_N), turn_N)[place_N]
        ratio_N = episode_sums(logprobs_N - old_N, turn_N)[place_N]
        losses_N, clipped_N = self.surrogate(ratio_N, torch.zeros_like(ratio_N), fields)
        return losses_N / size_N, clipped_N
