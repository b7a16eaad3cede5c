"""The optimizer of a reward model: AdamW that skips updates that are not finite."""

from __future__ import annotations

from typing import Any

import torch

from lmrl.policy.classifier import Classifier
from lmrl.recipe import Optimizer
from lmrl.recipe.objectives.base import LONG_MEMORY


class SkippingAdamW(torch.optim.AdamW):
    """AdamW that skips updates with a non-finite gradient, and counts them; the counts are part of its state."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # trl's trainer passes no closure
        group = self.param_groups[0]
        gradients = [one.grad for each in self.param_groups for one in each["params"] if one.grad is not None]
        if all(bool(gradient.isfinite().all()) for gradient in gradients):
            group["skipped_in_a_row"] = 0
            super().step(closure)
        else:
            group["skipped"] = self.skipped + 1
            group["skipped_in_a_row"] = self.skipped_in_a_row + 1

    @property
    def skipped(self) -> int:
        return int(self.param_groups[0].get("skipped", 0))

    @property
    def skipped_in_a_row(self) -> int:
        return int(self.param_groups[0].get("skipped_in_a_row", 0))


def build_optimizer(classifier: Classifier, options: Optimizer) -> SkippingAdamW:
    """The optimizer of a reward model; `head_lr` is for its classification head."""
    trunk = {id(parameter) for parameter in classifier.trunk.parameters()}
    trained = [parameter for parameter in classifier.model.parameters() if parameter.requires_grad]
    head_lr = options.lr if options.head_lr is None else options.head_lr
    groups = [
        {"params": [one for one in trained if id(one) in trunk], "lr": options.lr},
        {"params": [one for one in trained if id(one) not in trunk], "lr": head_lr},
    ]
    return SkippingAdamW(groups, betas=options.betas or LONG_MEMORY, eps=options.eps, weight_decay=options.weight_decay)
