"""Muon for matrices, AdamW for everything else, as one optimizer.

Muon (Jordan et al., 2024) replaces a matrix's averaged gradient by the nearest matrix with orthonormal rows or columns.
Scaled as Moonlight does (Liu et al., "Muon is scalable for LLM training", arXiv 2502.16982, section 2.2), its steps are
as long as AdamW's, so both take the same learning rate and weight decay. Embeddings, the projection to the vocabulary,
norms, biases and heads stay with AdamW, as both papers advise.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from lmrl.policy.policy import Policy

MUON: dict[str, Any] = {"momentum": 0.95, "nesterov": True, "adjust_lr_fn": "match_rms_adamw"}
"""Momentum and its use as in both papers."""


class MuonWithAdamW(torch.optim.Optimizer):
    """torch's Muon and AdamW, each over its own groups; a group's `muon` says which. Both share one state."""

    def __init__(self, matrices: dict[str, Any], others: list[dict[str, Any]], **adamw: Any):
        """matrices, others: parameter groups, with `lr`. adamw: AdamW's settings; `weight_decay` applies to both."""
        self.muon = torch.optim.Muon([matrices | {"muon": True}], weight_decay=adamw["weight_decay"], **MUON)
        self.adamw = torch.optim.AdamW([group | {"muon": False} for group in others], **adamw)
        super().__init__([*self.muon.param_groups, *self.adamw.param_groups], {})
        self.muon.state = self.adamw.state = self.state
        self.inputs: dict[torch.Tensor, torch.Tensor] = {}
        """The inputs that the last step orthogonalized, in Muon's bfloat16: with them a step can be undone."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.muon.step()
        self.adamw.step()
        (group,) = self.muon.param_groups
        self.inputs = {
            weights: weights.grad.lerp(self.state[weights]["momentum_buffer"], group["momentum"]).bfloat16()
            for weights in group["params"]
            if weights.grad is not None
        }

    @torch.no_grad()
    def undo_matrices(self) -> None:
        """Undo the last step of the matrices, up to rounding, and drop the momentum that would repeat it."""
        (group,) = self.muon.param_groups
        for weights, averaged in self.inputs.items():
            moved = torch.zeros_like(weights)
            moved.grad = averaged.to(weights.dtype)
            settings = MUON | {"momentum": 0.0, "nesterov": False}
            torch.optim.Muon([moved], lr=group["lr"], weight_decay=0.0, **settings).step()
            weights.sub_(moved).div_(1 - group["lr"] * group["weight_decay"])
            self.state[weights]["momentum_buffer"].zero_()
        self.inputs = {}


def split_matrices(group: dict[str, Any], policy: Policy) -> tuple[dict[str, Any], dict[str, Any]]:
    """A group of a policy's trunk in two: the matrices of its layers, and the rest."""
    names = {id(parameter): name for name, parameter in policy.named_parameters()}
    tables = {id(parameter) for parameter in lookup_tables(policy)}

    def is_matrix(parameter: torch.Tensor) -> bool:
        in_table = id(parameter) in tables or ".lora_embedding_" in names[id(parameter)]
        return parameter.ndim == 2 and not in_table

    matrices = [one for one in group["params"] if is_matrix(one)]
    others = [one for one in group["params"] if not is_matrix(one)]
    return group | {"params": matrices}, group | {"params": others}


def lookup_tables(policy: Policy) -> Iterable[torch.Tensor]:
    """Matrices with a row for each token or position: embeddings, and projections to the vocabulary."""
    for module in policy.modules():
        if isinstance(module, nn.Embedding):
            yield module.weight
        find = getattr(module, "get_output_embeddings", None)
        head = find() if callable(find) else None
        if head is not None:
            yield head.weight
