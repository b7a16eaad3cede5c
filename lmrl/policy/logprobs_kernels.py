"""Triton kernels for the work of logprobs.py on a slice of logits between two products: one read of it instead of about
ten."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from lmrl.policy.logprobs import Totals

if find_spec("triton") is not None:
    import triton
    import triton.language as tl

    @triton.jit
    def _add_slice(
        logits,
        targets,
        top,
        total,
        weighted,
        picked,
        exp,
        shrink,
        size: tl.constexpr,
        BLOCK: tl.constexpr,
        EXP: tl.constexpr,
    ):
        row = tl.program_id(0).to(tl.int64)
        logits += row * size
        old = tl.load(top + row)
        best = old
        for start in range(0, size, BLOCK):
            column = start + tl.arange(0, BLOCK)
            own = tl.load(logits + column, mask=column < size, other=-float("inf"))
            best = tl.maximum(best, tl.max(own, 0))
        factor = tl.exp(old - best)
        sum_exp, sum_weighted = tl.load(total + row) * factor, tl.load(weighted + row) * factor
        for start in range(0, size, BLOCK):
            column = start + tl.arange(0, BLOCK)
            inside = column < size
            own = tl.load(logits + column, mask=inside, other=-float("inf"))
            power = tl.exp(own - best)
            sum_exp += tl.sum(power, 0)
            sum_weighted += tl.sum(tl.where(inside, power * own, 0.0), 0)
            if EXP:
                tl.store(exp + row * size + column, power.to(exp.dtype.element_ty), mask=inside)
        target = tl.load(targets + row)
        hit = (target >= 0) & (target < size)
        tl.store(picked + row, tl.load(logits + target, mask=hit), mask=hit)
        tl.store(top + row, best)
        tl.store(total + row, sum_exp)
        tl.store(weighted + row, sum_weighted)
        tl.store(shrink + row, factor)

    @triton.jit
    def _slice_gradient(
        logits,
        targets,
        lse,
        entropy,
        grad_logprob,
        grad_entropy,
        out,
        scale,
        size: tl.constexpr,
        BLOCK: tl.constexpr,
        ENTROPY: tl.constexpr,
    ):
        row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
        column = part * BLOCK + tl.arange(0, BLOCK)
        inside = column < size
        logprob = tl.load(logits + row * size + column, mask=inside, other=-float("inf")) - tl.load(lse + row)
        slope = tl.load(grad_logprob + row)
        hit = column == tl.load(targets + row)
        grad = tl.where(hit, slope, 0.0)
        if ENTROPY:
            slope = slope + tl.load(grad_entropy + row) * (logprob + tl.load(entropy + row))
        grad = (grad - tl.exp(logprob) * slope) * scale
        tl.store(out + row * size + column, grad.to(out.dtype.element_ty), mask=inside)


BLOCK = 4096
"""Columns of a slice per block of a Triton program."""


@cache
def available(device: torch.device, dtype: torch.dtype) -> bool:
    """True if there are kernels for products of such numbers on this device."""
    return device.type == "cuda" and dtype == torch.bfloat16 and find_spec("triton") is not None


def add_slice(
    logits_NS: torch.Tensor, targets_N: torch.Tensor, totals: Totals, exp_dtype: torch.dtype | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `logprobs.add_slice`, with totals changed in place. exp_dtype: of the exponentials (None: the logits are
    returned instead)."""
    rows, size = logits_NS.shape
    exp_NS = logits_NS if exp_dtype is None else torch.empty_like(logits_NS, dtype=exp_dtype)
    shrink_N = torch.empty_like(totals.top)
    sums = (totals.top, totals.total, totals.weighted, totals.picked)
    wanted = exp_dtype is not None
    if rows:
        _add_slice[(rows,)](logits_NS, targets_N, *sums, exp_NS, shrink_N, size, BLOCK=BLOCK, EXP=wanted, num_warps=8)
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
    """As `logprobs.slice_gradient`, in bfloat16, which the following products take."""
    rows, size = logits_NS.shape
    out_NS = torch.empty_like(logits_NS, dtype=torch.bfloat16)
    if rows:
        _slice_gradient[(rows, triton.cdiv(size, BLOCK))](
            logits_NS,
            targets_N,
            lse_N,
            entropy_N,
            grad_logprob_N.contiguous(),
            lse_N if grad_entropy_N is None else grad_entropy_N.contiguous(),
            out_NS,
            1 / temperature,
            size,
            BLOCK=BLOCK,
            ENTROPY=grad_entropy_N is not None,
            num_warps=8,
        )
    return out_NS
