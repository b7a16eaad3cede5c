"""Log-probabilities of chosen tokens without ever holding positions x vocabulary.

Every objective uses the primitive `token_logprobs`. It takes hidden states at action positions
only, projects them to the vocabulary in slices with a running log-sum-exp, and recomputes each slice in the backward
pass, as fused cross-entropy kernels do (see Wijmans et al., "Cut your losses in large-vocabulary language models",
arXiv 2411.09009).

Where the vocabulary matrix W is frozen, nothing is recomputed: d log p(a) / d hidden = W_a - sum_v p_v W_v, and that
sum is attention with W as keys and values, so the forward pass keeps it with the same running maximum (Milakov and
Gimelshein, "Online normalizer calculation for softmax", arXiv 1805.02867).

Under autocast on an accelerator, matrix products take bfloat16 and accumulate in float32, and everything else is
float32; the work on a slice between its products is then a single kernel (logprobs_kernels.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from lmrl.policy import logprobs_kernels
from lmrl.policy.language_model import Projection
from lmrl.recipe.estimates import SLICE
from lmrl.trajectories.allowed import Allowed

FORBIDDEN = -1e30
"""Logit of a token that was not allowed: its probability is exactly 0, and no sum of such logits overflows."""


def token_logprobs(
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    bias_V: torch.Tensor | None,
    targets_N: torch.Tensor,
    temperature: float = 1.0,
    slice_size: int = SLICE,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each target and entropy of each distribution, both of shape (N,), in nats.

    The distribution is softmax((hidden @ weight.T + bias) / temperature). Accumulates in float32 at least.
    """
    logprobs_N, entropy_N, _ = greedy_logprobs(hidden_ND, weight_VD, bias_V, targets_N, temperature, slice_size)
    return logprobs_N, entropy_N


def greedy_logprobs(
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    bias_V: torch.Tensor | None,
    targets_N: torch.Tensor,
    temperature: float = 1.0,
    slice_size: int = SLICE,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `token_logprobs`, and whether no token is more likely than the target, (N,)."""
    return _logprobs(hidden_ND, weight_VD, bias_V, targets_N, temperature, slice_size, None)


def restricted_logprobs(
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    bias_V: torch.Tensor | None,
    targets_N: torch.Tensor,
    allowed: Allowed,
    temperature: float = 1.0,
    slice_size: int = SLICE,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `greedy_logprobs`, with the distribution of a restricted action renormalised over the tokens it was chosen
    from.

    For restricted actions, only the part of the vocabulary that any of them may choose is computed.
    """
    rows_R, restricted = allowed.rows_R, len(allowed.rows_R)
    weight_UD = weight_VD[allowed.tokens_U]
    bias_U = None if bias_V is None else bias_V[allowed.tokens_U]
    columns_R = allowed.columns(targets_N[rows_R])
    masks = Masks(allowed.members_SU, allowed.sets_R)
    found = _logprobs(hidden_ND[rows_R], weight_UD, bias_U, columns_R, temperature, slice_size, masks)
    if restricted == len(targets_N):
        return found
    free_N = torch.ones_like(targets_N, dtype=torch.bool)
    free_N[rows_R] = False
    others = greedy_logprobs(hidden_ND[free_N], weight_VD, bias_V, targets_N[free_N], temperature, slice_size)
    # Back to the batch's order, from the free rows followed by the restricted ones.
    order_N = torch.argsort(torch.cat([free_N.nonzero()[:, 0], rows_R]))
    logprobs_N, entropy_N, greedy_N = (torch.cat(pair)[order_N] for pair in zip(others, found, strict=True))
    return logprobs_N, entropy_N, greedy_N


def restricted_logits(logits_NV: torch.Tensor, allowed: Allowed | None) -> torch.Tensor:
    """Logits in which tokens that were not allowed have a probability of 0."""
    if allowed is None:
        return logits_NV
    forbidden_NV = torch.zeros_like(logits_NV, dtype=torch.bool)
    forbidden_NV[allowed.rows_R] = True
    forbidden_NV[allowed.rows_R[:, None], allowed.tokens_U] = ~allowed.members_SU[allowed.sets_R]
    return logits_NV.masked_fill(forbidden_NV, FORBIDDEN)


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """The wider of the type and float32."""
    return torch.promote_types(dtype, torch.float32)


@dataclass(frozen=True)
class Masks:
    """Which tokens rows may choose from: row n may choose those of set `sets_N[n]`."""

    members_SV: torch.Tensor
    sets_N: torch.Tensor

    def apply(self, logits_NS: torch.Tensor, start: int) -> torch.Tensor:
        """Forbid tokens in a slice of logits, in place. start: token of the slice's first column."""
        allowed_NS = self.members_SV[:, start : start + logits_NS.shape[1]][self.sets_N]
        return logits_NS.masked_fill_(~allowed_NS, FORBIDDEN)


@dataclass
class Totals:
    """Running sums over the slices so far, of shape (N,), in float32 at least.

    top: the largest logit. total: sum of exp(logit - top). weighted: sum of exp(logit - top) * logit. picked: the
    target's logit.
    """

    top: torch.Tensor
    total: torch.Tensor
    weighted: torch.Tensor
    picked: torch.Tensor

    @classmethod
    def none(cls, hidden_ND: torch.Tensor) -> Totals:
        top_N = hidden_ND.new_full(hidden_ND.shape[:1], -math.inf, dtype=at_least_float32(hidden_ND.dtype))
        return cls(top_N, *(torch.zeros_like(top_N) for _ in range(3)))


def product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """A product of two matrices in their own precision, with its result in float32 at least."""
    if left.is_cuda and left.dtype in (torch.bfloat16, torch.float16):
        exact: torch.Tensor = _ProductInFloat32.apply(left, right)  # type: ignore[no-untyped-call,unused-ignore]
        return exact  # otherwise sums are rounded to the inputs' precision
    result = left @ right
    return result.to(at_least_float32(result.dtype))


def whole_logits(hidden_ND: torch.Tensor, head: Projection) -> torch.Tensor:
    """Logits over the whole vocabulary, (N, V), as `token_logprobs` computes them: autocast does not round them."""
    dtype = products_in(head.weight)
    with torch.autocast(hidden_ND.device.type, enabled=False):
        return _logits(hidden_ND.to(dtype), head.weight, getattr(head, "bias", None), 1.0, dtype)


def products_in(weight: torch.Tensor) -> torch.dtype:
    """The precision of products with a weight: autocast's on an accelerator, else the weight's own."""
    device = weight.device.type
    if device != "cpu" and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return weight.dtype


def _logprobs(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probability, entropy and whether the target is the most likely token; arguments of
    `_TokenLogprobs.forward`."""
    found: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = _TokenLogprobs.apply(*arguments)  # type: ignore[no-untyped-call,unused-ignore]
    return found


def _logits(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, temperature: float, dtype: torch.dtype
) -> torch.Tensor:
    logits = product(hidden, weight.to(dtype).T)
    if bias is not None:
        logits += bias
    return logits if temperature == 1 else logits.div_(temperature)


def add_slice(logits_NS: torch.Tensor, targets_N: torch.Tensor, totals: Totals) -> tuple[torch.Tensor, torch.Tensor]:
    """Add a slice of logits to the totals. targets_N: counted from the slice's first column.

    Returns exp(logit - top), (N, S), in the memory of the logits, and the factor that earlier sums were scaled by,
    (N,).
    """
    inside_N = (targets_N >= 0) & (targets_N < logits_NS.shape[1])
    found_N = logits_NS.gather(1, targets_N.clamp(0, logits_NS.shape[1] - 1)[:, None])[:, 0]
    totals.picked = torch.where(inside_N, found_N, totals.picked)
    top_N = torch.maximum(totals.top, logits_NS.amax(dim=1))
    shrink_N = (totals.top - top_N).exp()
    exp_NS = (logits_NS - top_N[:, None]).exp_()
    totals.total = totals.total * shrink_N + exp_NS.sum(dim=1)
    totals.weighted = totals.weighted * shrink_N + logits_NS.mul_(exp_NS).sum(dim=1)
    totals.top = top_N
    return exp_NS, shrink_N


def slice_gradient(
    logits_NS: torch.Tensor,
    targets_N: torch.Tensor,
    lse_N: torch.Tensor,
    entropy_N: torch.Tensor,
    grad_logprob_N: torch.Tensor,
    grad_entropy_N: torch.Tensor | None,
    temperature: float,
) -> torch.Tensor:
    """Gradient with respect to a slice of logits before the temperature, (N, S). targets_N: counted from its first
    column."""
    # d logprob / d logit = 1[target] - p;  d entropy / d logit = -p (log p + H)
    logprob_NS = logits_NS.sub_(lse_N[:, None])
    if grad_entropy_N is None:
        grad_NS = logprob_NS.exp_().mul_(grad_logprob_N[:, None]).neg_()
    else:
        slope_NS = grad_entropy_N[:, None] * (logprob_NS + entropy_N[:, None]) + grad_logprob_N[:, None]
        grad_NS = logprob_NS.exp_().mul_(slope_NS).neg_()
    inside_N = (targets_N >= 0) & (targets_N < logits_NS.shape[1])
    grad_NS.scatter_add_(
        1, targets_N.clamp(0, logits_NS.shape[1] - 1)[:, None], torch.where(inside_N, grad_logprob_N, 0)[:, None]
    )
    return grad_NS.div_(temperature)


class _ProductInFloat32(torch.autograd.Function):
    """Of matrices in less precision, on CUDA; torch has no derivative of it."""

    @staticmethod
    def forward(ctx: Any, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(left, right)
        return torch.mm(left, right, out_dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        left, right = ctx.saved_tensors
        need_left, need_right = ctx.needs_input_grad
        grad = grad.to(left.dtype)
        return grad @ right.T if need_left else None, left.T @ grad if need_right else None


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        temperature: float,
        slice_size: int,
        masks: Masks | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        mean_wanted = need_hidden and not (need_weight or need_bias)
        device = hidden.device.type
        dtype = products_in(weight)
        kernels = logprobs_kernels.available(hidden.device, dtype)
        with torch.autocast(device, enabled=False):
            hidden = hidden.to(dtype)
            totals = Totals.none(hidden)
            mean = torch.zeros_like(hidden, dtype=totals.top.dtype) if mean_wanted else None
            for start in range(0, weight.shape[0], slice_size):
                end = min(start + slice_size, weight.shape[0])
                own = weight[start:end].to(dtype)
                logits = _logits(hidden, own, None if bias is None else bias[start:end], temperature, dtype)
                if masks is not None:
                    masks.apply(logits, start)
                if kernels:
                    exp, shrink = logprobs_kernels.add_slice(
                        logits, targets - start, totals, dtype if mean_wanted else None
                    )
                else:
                    exp, shrink = add_slice(logits, targets - start, totals)
                if mean is not None:
                    mean.mul_(shrink[:, None]).add_(product(exp.to(dtype), own))
                del logits, exp  # before the next slice takes memory
            lse = totals.top + totals.total.log()
            entropy = lse - totals.weighted / totals.total
            if mean is not None:
                mean.div_(totals.total[:, None])
        # Not the parameter itself: if weights are sharded over processes, it is empty by the backward pass.
        ctx.save_for_backward(
            hidden, weight.detach(), None if bias is None else bias.detach(), targets, lse, entropy, mean
        )
        ctx.temperature, ctx.slice_size, ctx.dtype, ctx.kernels = temperature, slice_size, dtype, kernels
        ctx.masks = masks
        ctx.set_materialize_grads(False)
        greedy = totals.picked >= totals.top
        ctx.mark_non_differentiable(greedy)
        return totals.picked - lse, entropy, greedy

    @staticmethod
    def backward(
        ctx: Any, grad_logprob: torch.Tensor | None, grad_entropy: torch.Tensor | None, _: Any
    ) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, bias, targets, lse, entropy, mean = ctx.saved_tensors
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        if grad_logprob is None and grad_entropy is None:
            return (None,) * 7
        grad_logprob = torch.zeros_like(lse) if grad_logprob is None else grad_logprob
        if mean is not None and grad_entropy is None:
            slope = (weight[targets] - mean).mul_(grad_logprob[:, None] / ctx.temperature)
            return slope.to(hidden.dtype), *(None,) * 6
        grad_hidden = torch.zeros_like(hidden, dtype=lse.dtype) if need_hidden else None
        grad_weight = torch.empty_like(weight) if need_weight else None
        grad_bias = torch.empty_like(bias) if need_bias and bias is not None else None
        gradient_of = logprobs_kernels.slice_gradient if ctx.kernels else slice_gradient
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, weight.shape[0], ctx.slice_size):
                end = min(start + ctx.slice_size, weight.shape[0])
                own = weight[start:end].to(ctx.dtype)
                logits = _logits(hidden, own, None if bias is None else bias[start:end], ctx.temperature, ctx.dtype)
                if ctx.masks is not None:
                    ctx.masks.apply(logits, start)
                grad = gradient_of(logits, targets - start, lse, entropy, grad_logprob, grad_entropy, ctx.temperature)
                if grad_bias is not None:
                    grad_bias[start:end] = grad.sum(dim=0, dtype=lse.dtype)
                grad = grad.to(ctx.dtype)
                if grad_hidden is not None:
                    grad_hidden += product(grad, own)
                if grad_weight is not None:
                    grad_weight[start:end] = product(grad.T, hidden)
                del logits, grad  # before the next slice takes memory
        return None if grad_hidden is None else grad_hidden.to(hidden.dtype), grad_weight, grad_bias, *(None,) * 4
