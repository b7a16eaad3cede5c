"""The attention of policies: transformers' `sdpa`, computed in another way where that is faster."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

ATTENTION = "lmrl"
SHORT = 256
"""Positions up to which a CPU's backward pass is faster in float32 than in bfloat16: five times at 20, and no longer from 384."""


def attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of `query` (B, H, T, D) over `key` and `value` (B, H / G, S, D) as transformers calls it; returns (B, T, H, D)."""
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
