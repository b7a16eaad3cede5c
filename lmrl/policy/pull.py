"""Bounds on the gradient of the value loss, to protect the trunk that values share with the policy.

Both losses have a gradient at the last hidden state of each token, where they can be compared in the one backward pass
that is computed anyway. The values' gradient is scaled to at most `limit` times the norm of the policy's, token by
token, so the result depends neither on how a batch is cut into microbatches nor on how weights are sharded. If the
policy is certain of a token, its gradient vanishes, and so does the harm that a wrong value can do there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from lmrl.policy.language_model import Projection


def bounded(hidden_ND: torch.Tensor, limit: float, tally_3: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The hidden states twice: for the policy, and for the values.

    tally_3: the backward pass adds the summed norms of the values' and the policy's gradients, and the number of tokens
    at which the bound applied.
    """
    twice: tuple[torch.Tensor, torch.Tensor] = _Bounded.apply(hidden_ND, limit, tally_3)  # type: ignore[no-untyped-call,unused-ignore]
    return twice


@contextmanager
def bounded_input(head: Projection, limit: float | None, tally_3: torch.Tensor) -> Iterator[list[torch.Tensor]]:
    """As `bounded`, in a pass through a model's own head: inside, it gets its input for the policy, and the list the same
    for the values. limit: None for no bound, and an empty list."""
    for_values: list[torch.Tensor] = []

    def split(_: Any, given: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        own, other = bounded(given[0], limit or 0.0, tally_3)
        for_values.append(other)
        return own, *given[1:]

    hooked = head.register_forward_pre_hook(split) if limit is not None and torch.is_grad_enabled() else None
    try:
        yield for_values
    finally:
        if hooked is not None:
            hooked.remove()


def with_gradient_times(values: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """The same values, with their gradient multiplied by `factor` in the backward pass."""
    same: torch.Tensor = _Scaled.apply(values, factor)  # type: ignore[no-untyped-call,unused-ignore]
    return same


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(factor)
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        (factor,) = ctx.saved_tensors
        return gradient * factor.to(gradient.dtype), None


class _Bounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, limit: float, tally: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.limit, ctx.tally = limit, tally
        return hidden.view_as(hidden), hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, policy_ND: torch.Tensor, values_ND: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        precise = torch.promote_types(policy_ND.dtype, torch.float32)
        policy_N, values_N = (one.to(precise).norm(dim=-1) for one in (policy_ND, values_ND))
        allowed_N = ctx.limit * policy_N
        bound_N = values_N > allowed_N
        ctx.tally += torch.stack([values_N.sum(), policy_N.sum(), bound_N.sum()]).to(ctx.tally)
        factor_N = torch.where(bound_N, allowed_N / values_N.clamp(min=torch.finfo(values_N.dtype).tiny), 1.0)
        return policy_ND + values_ND * factor_N[..., None].to(values_ND.dtype), None, None
