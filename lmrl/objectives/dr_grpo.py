"""Dr. GRPO: GRPO without its bias for some lengths and difficulties (Liu et al., arXiv 2503.20783)."""

from __future__ import annotations

import torch

from lmrl.objectives.group import GroupPolicyGradient
from lmrl.recipe.objectives.policy_gradient import DrGRPOObjective


class DrGRPO(GroupPolicyGradient):
    """A = R - mean of the group, not divided by its standard deviation; the sum over tokens is divided by a
    constant."""

    options: DrGRPOObjective
    label = "Dr. GRPO"

    def weights(self, fields: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.full_like(fields["share"], 1 / self.options.constant_length), fields["share"]
