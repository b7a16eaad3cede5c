"""The attention of policies: transformers' `sdpa`, computed in another way where that is faster."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

ATTENTION = "lmrl"
SHORT = 256
"""Positions up to which a CPU's backward pass is faster in float32 than in bfloat16: five times at 20, and no longer from 384."""
PLACEHOLDER = torch.ones(1, 1, 1, 1, dtype=torch.bool)
"""A mask in four dimensions, which transformers hands through as it is where it would build one of its own."""


def attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | BlockMask | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of `query` (B, H, T, D) over `key` and `value` (B, H / G, S, D) as transformers calls it; returns (B, T, H, D)."""
    if isinstance(attention_mask, BlockMask):
        return block_attention(query, key, value, attention_mask, scaling), None
    starts, longest = kwargs.pop("cu_seq_lens_q", None), kwargs.pop("max_length_q", None)
    if starts is not None:
        window = kwargs.get("sliding_window")
        return packed_attention(query, key, value, starts, longest, dropout, scaling, window), None
    batch, heads, positions, width = query.shape
    groups = heads // key.shape[1]
    plain = attention_mask is None or attention_mask.shape[1] == 1
    if positions == 1 and groups > 1 and plain and kwargs.get("position_bias") is None:
        # In grouped-query attention (Ainslie et al., arXiv 2305.13245) the G queries of one position that share a key head
        # can stand in for G positions: (B, H, 1, D) becomes (B, H / G, G, D), and no key is copied G times.
        attended = scaled_dot_product_attention(
            query.reshape(batch, -1, groups, width),
            key,
            value,
            attn_mask=None if attention_mask is None else attention_mask.expand(-1, -1, groups, -1),
            dropout_p=dropout,
            scale=scaling,
        )
        return attended.reshape(batch, 1, heads, -1), None
    if 1 < positions <= SHORT and query.dtype == torch.bfloat16 and query.device.type == "cpu":
        # With and without gradient, so that an update finds the log-probabilities that were computed before it.
        if attention_mask is not None and attention_mask.is_floating_point():
            attention_mask = attention_mask.float()
        with torch.autocast("cpu", enabled=False):
            attended, _ = sdpa_attention_forward(
                module, query.float(), key.float(), value.float(), attention_mask, dropout, scaling, **kwargs
            )
        return attended.to(query.dtype), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)


AttentionInterface.register(ATTENTION, attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def take_attention(model: nn.Module) -> None:
    """Let the parts of a model whose attention is `sdpa` take the one above."""
    for part in model.modules():
        if getattr(part, "_supports_attention_backend", False) and part.config._attn_implementation == "sdpa":
            part.config._attn_implementation = {"": ATTENTION}  # of this config alone, not of those inside of it


# -------------------------------------------------------------------------------------------------- sequences end to end
def packed_arguments(sizes: list[int], device: torch.device) -> dict[str, Any]:
    """What a model takes for sequences of these sizes that stand end to end in one row, none of which sees another.

    The names are those of transformers' `FlashAttentionKwargs`.
    """
    starts_B = torch.zeros(len(sizes) + 1, dtype=torch.int32)
    starts_B[1:] = torch.tensor(sizes).cumsum(0)
    starts_B, longest = starts_B.to(device, non_blocking=True), max(sizes)
    return {
        "cu_seq_lens_q": starts_B,
        "cu_seq_lens_k": starts_B,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def packed_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    starts_B: torch.Tensor,
    longest: int,
    dropout: float,
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    """Causal attention within each of the sequences that stand end to end in the single row of (1, H, T, D); (1, T, H, D).

    starts_B: where each begins, and the end, (B + 1,). longest: tokens of the longest. window: tokens that one sees, itself included.
    """
    if query.device.type == "cuda" and query.dtype in (torch.bfloat16, torch.float16) and not dropout:
        # A model without `scaling` divides by the root of the width, as the kernel does.
        rows = (part[0].transpose(0, 1) for part in (query, key, value))
        return _kernel()(*rows, starts_B, longest, scaling, -1 if window is None else window - 1)[None]
    groups = query.shape[1] // key.shape[1]
    parts = []
    for own in zip(*(part.split(starts_B.diff().tolist(), dim=2) for part in (query, key, value)), strict=True):
        mask = None
        if window is not None and own[0].shape[2] > window:
            size = own[0].shape[2]
            mask = torch.ones(size, size, dtype=torch.bool, device=query.device).tril().triu(1 - window)
        parts.append(
            scaled_dot_product_attention(
                *own, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=scaling, enable_gqa=groups > 1
            )
        )
    return torch.cat(parts, 2).transpose(1, 2)


@cache
def _kernel() -> Callable[..., torch.Tensor]:
    """Flash attention over sequences end to end (Dao, arXiv 2307.08691), as torch brings it along: (T, H, D) to (T, H, D)."""
    from torch.nn.attention.varlen import varlen_attn

    grouped = "enable_gqa" in inspect.signature(varlen_attn).parameters

    def kernel(query, key, value, starts_B, longest, scaling, left):
        groups = query.shape[1] // key.shape[1]
        if groups > 1 and not grouped:
            key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        options = {"enable_gqa": True} if groups > 1 and grouped else {}
        return varlen_attn(
            query, key, value, starts_B, starts_B, longest, longest, scale=scaling, window_size=(left, 0), **options
        )

    return kernel


# ------------------------------------------------------------------------------------------------------ shared beginnings
def block_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: BlockMask, scaling: float | None
) -> torch.Tensor:
    """Attention (B, H, T, D) to (B, T, H, D) that skips blocks in which no token sees another (Dong et al., arXiv 2412.05496)."""
    groups = query.shape[1] // key.shape[1]
    if groups & (groups - 1):  # the kernel takes powers of two
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        groups = 1
    return _compiled_flex()(query, key, value, block_mask=mask, scale=scaling, enable_gqa=groups > 1).transpose(1, 2)


@cache
def _compiled_flex() -> Callable[..., torch.Tensor]:
    return torch.compile(flex_attention, dynamic=True)


def packed_branches_mask(branches_1T: torch.Tensor, sizes: list[int]) -> torch.Tensor | BlockMask:
    """What the tokens of packed sequences of these sizes see, where some have branches (see lmrl/trajectories/shared.py): in blocks on an
    accelerator, else (1, 1, T, T)."""
    branches_T, device = branches_1T[0], branches_1T.device
    rows_T = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes)).to(device, non_blocking=True)

    def sees(batch, head, query, key):
        branch = (branches_T[query] == branches_T[key]) | (branches_T[key] == 0)
        return (rows_T[query] == rows_T[key]) & (query >= key) & branch

    length = len(branches_T)
    if device.type == "cuda":
        return create_block_mask(sees, None, None, length, length, device=device, _compile=True)
    places_T = torch.arange(length, device=device)
    return sees(0, 0, places_T[:, None], places_T)[None, None]
