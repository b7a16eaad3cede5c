"""The optimizers that a recipe can name, and their state as tensors."""

from __future__ import annotations

from collections.abc import Iterable, Set
from typing import Any

import torch
from torch import nn

from lmrl.errors import RecipeError
from lmrl.extras import fix_of
from lmrl.policy.policy import Policy
from lmrl.recipe import Optimizer
from lmrl.recipe.objectives.base import LONG_MEMORY
from lmrl.training.muon import MuonWithAdamW, split_matrices
from lmrl.training.parallel.strategy import Strategy


def build_optimizer(
    options: Optimizer, groups: list[dict[str, Any]], policy: Policy, strategy: Strategy
) -> torch.optim.Optimizer:
    """The optimizer of these groups of a policy's parameters, the trunk's first. Raises RecipeError if it is not available here."""
    settings: dict[str, Any] = {
        "betas": options.betas or LONG_MEMORY,
        "eps": options.eps,
        "weight_decay": options.weight_decay,
    }
    fused = policy.device.type == "cuda" or None  # one kernel for all weights; on a CPU it would only round otherwise
    if options.name in ("adamw", None):
        return torch.optim.AdamW(groups, fused=fused, **settings)
    if options.name in ("muon", "namo"):
        if strategy.synchronized:
            raise RecipeError(
                f"optimizer.name={options.name} orthogonalizes whole matrices, which {strategy.name} shares out: set optimizer.name=adamw, or "
                "launch without --accelerate"
            )
        matrices, rest = split_matrices(groups[0], policy)
        floor = (options.norm_floor or 0.0) if options.name == "namo" else None
        return MuonWithAdamW(matrices, [rest, *groups[1:]], floor, fused=fused, **settings)
    if strategy.synchronized:
        raise RecipeError(
            f"optimizer.name=adamw_8bit: its 8-bit state cannot be shared out by {strategy.name}, which saves more: set "
            "optimizer.name=adamw"
        )
    try:
        # It exports both without saying so.
        from bitsandbytes.optim import AdamW8bit, GlobalOptimManager  # type: ignore[attr-defined,unused-ignore]
    except ImportError as error:
        fix = fix_of("bitsandbytes")
        raise RecipeError(f"optimizer.name=adamw_8bit needs bitsandbytes ({error}): {fix}") from error
    optimizer: Any = AdamW8bit(groups, **settings)  # type: ignore[no-untyped-call,unused-ignore]  # it has no types
    # A separate manager instead of the global one, which keys parameters by ids that outlive them.
    optimizer.mng = GlobalOptimManager.__new__(GlobalOptimManager)
    optimizer.mng.initialize()
    embeddings = [module.weight for module in policy.modules() if isinstance(module, nn.Embedding)]
    optimizer.mng.override_config(embeddings, "optim_bits", 32)  # as its authors advise: their gradients vary much
    eight_bit: torch.optim.Optimizer = optimizer
    return eight_bit


def undo_step(optimizer: torch.optim.Optimizer, moved: Set[torch.Tensor]) -> None:
    """Undo the last step of these weights, unless the optimizer keeps too little for it (AdamW in 8 bits). moved: with a
    gradient in that step."""
    if isinstance(optimizer, MuonWithAdamW):
        optimizer.undo_matrices(moved)
    elif not isinstance(optimizer, torch.optim.AdamW):
        return
    for group in optimizer.param_groups:
        if not group.get("muon"):
            undo_adamw(optimizer, group, moved)


@torch.no_grad()
def undo_adamw(optimizer: torch.optim.Optimizer, group: dict[str, Any], moved: Set[torch.Tensor]) -> None:
    """Undo the last step of a group's moved weights, but for rounding, and forget the momentum that would repeat it.

    AdamW's state holds what a step was made of (Loshchilov and Hutter, arXiv 1711.05101, algorithm 2), so no copy of the weights is
    needed.
    """
    (beta1, beta2), rate = group["betas"], group["lr"]
    for weights in group["params"]:
        if weights not in moved:
            continue
        state = optimizer.state[weights]
        steps = float(state["step"])
        deviation = (state["exp_avg_sq"] / (1 - beta2**steps)).sqrt_().add_(group["eps"])
        weights.addcdiv_(state["exp_avg"], deviation, value=rate / (1 - beta1**steps))
        weights.div_(1 - rate * group["weight_decay"])
        state["exp_avg"].zero_()


def state_bytes(options: Optimizer, parameters: Iterable[torch.Tensor]) -> int:
    """Bytes that the optimizer will hold for these parameters, at most; of 8 bits, embeddings too."""
    each = 2 if options.name == "adamw_8bit" else 8
    return each * sum(parameter.numel() for parameter in parameters)
