"""Attention of single new tokens over cached keys and values, without repeating these for grouped queries."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

GROUPED = "lmrl_grouped"


def grouped_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention as transformers' `sdpa` computes it; returns (B, T, H, D).

    In grouped-query attention (Ainslie et al., arXiv 2305.13245) the G queries of one position that share a key head can
    stand in for G positions: (B, H, 1, D) becomes (B, H / G, G, D), and no key is copied G times.
    """
    batch, heads, positions, width = query.shape
    groups = heads // key.shape[1]
    plain = attention_mask is None or attention_mask.shape[1] == 1
    if positions > 1 or groups == 1 or not plain or kwargs.get("position_bias") is not None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    attended = scaled_dot_product_attention(
        query.reshape(batch, -1, groups, width),
        key,
        value,
        attn_mask=None if attention_mask is None else attention_mask.expand(-1, -1, groups, -1),
        dropout_p=dropout,
        scale=scaling,
    )
    return attended.reshape(batch, 1, heads, -1), None


AttentionInterface.register(GROUPED, grouped_attention)
AttentionMaskInterface.register(GROUPED, sdpa_mask)


@contextmanager
def decoding_attention(*models: nn.Module) -> Iterator[None]:
    """Inside, models whose attention is `sdpa` take the attention above."""
    configs = {id(part.config): part.config for model in models for part in model.modules() if _takes_sdpa(part)}
    try:
        for config in configs.values():
            config._attn_implementation = {"": GROUPED}  # of this config alone, not of those inside of it
        yield
    finally:
        for config in configs.values():
            config._attn_implementation = {"": "sdpa"}


def _takes_sdpa(module: nn.Module) -> bool:
    return getattr(module, "_supports_attention_backend", False) and module.config._attn_implementation == "sdpa"
