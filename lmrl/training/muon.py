"""Muon or NAMO for matrices, AdamW for everything else, as one optimizer.

Muon (Jordan et al., 2024) replaces a matrix's averaged gradient by a nearly orthonormal matrix of the same direction.
Scaled as Moonlight does (Liu et al., "Muon is scalable for LLM training", arXiv 2502.16982, section 2.2), its steps are
about as long as AdamW's, so both take the same learning rate and weight decay; but they are equally long whatever the
gradients are. NAMO (Zhang et al., "Adam improves Muon", arXiv 2602.17080) makes them as long as Adam would if a matrix
were one number: short where gradients disagree. With a floor they are also short where gradients have become small: a
policy that is nearly deterministic has hardly any gradient, and steps as long as before would be noise that changes
what it does in states that it rarely meets. Embeddings, the projection to the vocabulary, norms, biases and heads stay
with AdamW, as these papers advise.

torch.optim.Muon computes in bfloat16 on all devices, which is slow on CPUs, and in which rounding decides what
equivalent rewards teach; and it cannot undo a step.
"""

from __future__ import annotations

from collections.abc import Iterable, Set
from typing import Any

import torch
from torch import nn

from lmrl.policy.policy import Policy

MOMENTUM = 0.95
"""Weight of past gradients, and Nesterov's look ahead, as in both papers."""
LENGTH = 0.2
"""Root mean square of Muon's steps, relative to the learning rate, as Moonlight found it of AdamW."""
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
"""Coefficients and number of iterations as Jordan et al. chose them."""


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon or NAMO, and AdamW, each over its own groups; a group's `muon` says which. Both share one state."""

    def __init__(
        self, matrices: dict[str, Any], others: list[dict[str, Any]], norm_floor: float | None = None, **adamw: Any
    ):
        """matrices, others: parameter groups, with `lr`. norm_floor: of NAMO, see `lmrl.recipe.Optimizer`; None: Muon.
        adamw: AdamW's settings, of which `weight_decay` and the second of `betas` apply to both."""
        self.adamw = torch.optim.AdamW([group | {"muon": False} for group in others], **adamw)
        own = {"muon": True, "weight_decay": adamw["weight_decay"], "beta2": adamw["betas"][1]}
        super().__init__([matrices | own, *self.adamw.param_groups], {})
        self.adamw.state = self.state
        self.norm_floor = norm_floor
        self.moved: dict[torch.Tensor, torch.Tensor] = {}
        """What the last step subtracted from each matrix: with it a step can be undone."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.adamw.step()
        group, self.moved = self.param_groups[0], {}
        for weights in group["params"]:
            if weights.grad is None:
                continue
            state = self.state[weights]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(weights)
            average = state["momentum_buffer"].lerp_(weights.grad, 1 - MOMENTUM)
            length = self._length(state, weights.grad, group["beta2"])
            step = orthogonalized(weights.grad.lerp(average, MOMENTUM))
            self.moved[weights] = step.mul_(length * group["lr"] * max(weights.shape) ** 0.5)
            weights.mul_(1 - group["lr"] * group["weight_decay"]).sub_(step)

    def _length(self, state: dict[str, Any], gradient: torch.Tensor, beta2: float) -> torch.Tensor | float:
        """Root mean square of the next step, relative to the learning rate. NAMO's is the norm of the averaged gradient by
        the average norm of gradients (algorithm 1), or by `norm_floor` of its peak."""
        if self.norm_floor is None:
            return LENGTH
        if "step" not in state:
            state |= {"step": torch.zeros(()), "mean_square": torch.zeros_like(mean_square(gradient))}
        state["step"] += 1
        steps = int(state["step"])
        square = state["mean_square"].lerp_(mean_square(gradient), 1 - beta2) / (1 - beta2**steps)
        state["peak"] = torch.maximum(square, state.get("peak", square))
        own = mean_square(state["momentum_buffer"]).sqrt() / (1 - MOMENTUM**steps)
        norm = torch.maximum(square, self.norm_floor**2 * state["peak"]).sqrt()
        length: torch.Tensor = own / norm.clamp(min=torch.finfo(norm.dtype).tiny)
        return length

    @torch.no_grad()
    def undo_matrices(self, wanted: Set[torch.Tensor]) -> None:
        """Undo the last step of these matrices, up to rounding, and drop the momentum that would repeat it."""
        group = self.param_groups[0]
        for weights in wanted & self.moved.keys():
            weights.add_(self.moved[weights]).div_(1 - group["lr"] * group["weight_decay"])
            self.state[weights]["momentum_buffer"].zero_()
        self.moved = {}


def mean_square(matrix: torch.Tensor) -> torch.Tensor:
    """In float32 or better: a running mean stands still in bfloat16."""
    return matrix.to(torch.promote_types(matrix.dtype, torch.float32)).square().mean()


def orthogonalized(matrix: torch.Tensor) -> torch.Tensor:
    """A matrix with the same singular vectors, whose singular values are near 1 (Jordan et al., 2024).

    In bfloat16 on accelerators, else in the matrix's own precision.
    """
    a, b, c = NEWTON_SCHULZ
    found = matrix if matrix.device.type == "cpu" else matrix.bfloat16()
    tall = matrix.shape[0] > matrix.shape[1]
    found = found.T if tall else found
    found = found / found.norm().clamp(min=torch.finfo(found.dtype).tiny)
    for _ in range(ITERATIONS):
        square = found @ found.T
        found = torch.addmm(found, torch.addmm(square, square, square, beta=b, alpha=c), found, beta=a)
    return (found.T if tall else found).to(matrix.dtype)


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
