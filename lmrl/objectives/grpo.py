"""GRPO: advantages standardised in the group (Shao et al., arXiv 2402.03300)."""

from __future__ import annotations

import torch

from lmrl.objectives.group import GroupPolicyGradient


class GRPO(GroupPolicyGradient):
    """A = (R - mean of the group) / standard deviation of the group; the mean over each episode's tokens.

    In a group whose episodes all earned the same, advantages are 0.
    """

    label = "GRPO"

    def weights(self, fields: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        return fields["share"], fields["share"]
