"""REINFORCE++: advantages standardised over the batch (Hu et al., arXiv 2501.03262)."""

from __future__ import annotations

import torch

from lmrl import distributed
from lmrl.objectives.group import GroupPolicyGradient
from lmrl.objectives.policy_gradient import whiten
from lmrl.objectives.turns import Turns, less_group_mean


class ReinforcePP(GroupPolicyGradient):
    """A = R, standardised over all tokens of the batch; each token is charged its own divergence from the reference and
    all that follows.

    If any prompt has several episodes, the group's mean at the same turn is subtracted from R first (the paper's variant
    with a baseline); a prompt's only episode then has an advantage of about 0.
    """

    label = "REINFORCE++"
    penalises_reward = True
    pays_by_token = True

    def baseline(self, turns: Turns) -> torch.Tensor:
        episodes_G = torch.bincount(turns.group_K[turns.index_K == 0])
        several = distributed.all_max(int((episodes_G > 1).any()))
        return less_group_mean(turns) if several else turns.to_go_K

    def token_advantages(self, advantages_N: torch.Tensor) -> torch.Tensor:
        return whiten(advantages_N)

    def weights(self, fields: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.ones_like(fields["share"]), torch.ones_like(fields["share"])
