"""The attention of policies: transformers' `sdpa`, computed in another way when that is faster."""

from __future__ import annotations

import inspect
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from lmrl.trajectories.batch import Packing

ATTENTION = "lmrl"
SHORT = 256
"""Positions up to which a CPU's backward pass is faster in float32 than in bfloat16: five times at 20, and no longer from 384."""
HAS_VARLEN = find_spec("torch.nn.attention.varlen") is not None


def _asks_for_groups() -> bool:
    if not HAS_VARLEN:
        return False
    from torch.nn.attention.varlen import varlen_attn

    return "enable_gqa" in inspect.signature(varlen_attn).parameters


ASKS_FOR_GROUPS = _asks_for_groups()


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
    if (ends := (kwargs.pop("cu_seq_lens_q", None), kwargs.pop("cu_seq_lens_k", None)))[0] is not None:
        longest = kwargs.pop("max_length_q"), kwargs.pop("max_length_k")
        window, tokens = kwargs.get("sliding_window"), kwargs.get("key_tokens")
        attended = packed_attention(
            query, key, value, dropout, scaling, window, ends=ends, longest=longest, key_tokens=tokens
        )
        return attended, None
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
    part: Any
    for part in model.modules():
        if getattr(part, "_supports_attention_backend", False) and part.config._attn_implementation == "sdpa":
            part.config._attn_implementation = {"": ATTENTION}  # of this config alone, not of those inside of it


# -------------------------------------------------------------------------------------------------- sequences end to end
def placeholder(device: torch.device) -> torch.Tensor:
    """A mask in four dimensions, which transformers passes through unchanged instead of building its own."""
    return torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)


def packed_arguments(packing: Packing) -> dict[str, Any]:
    """Arguments for sequences that stand end to end in one row, named as in transformers' `FlashAttentionKwargs`."""
    arguments = {
        "cu_seq_lens_q": packing.query_ends,
        "cu_seq_lens_k": packing.key_ends,
        "max_length_q": packing.longest_query,
        "max_length_k": packing.longest_key,
    }
    return arguments if packing.key_tokens is None else arguments | {"key_tokens": packing.key_tokens}


def packed_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    dropout: float = 0.0,
    scaling: float | None = None,
    window: int | None = None,
    *,
    ends: tuple[torch.Tensor, torch.Tensor],
    longest: tuple[int, int],
    key_tokens: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention within each part of the single row of (1, H, T, D); returns (1, T, H, D).

    ends, longest, key_tokens: of the queries and of the keys, as in `Packing`. window: keys that a query sees, its own included.
    """
    query, key = (
        query.to(value.dtype),
        key.to(value.dtype),
    )  # under autocast rotary embeddings have made float32 of them
    if key_tokens is not None:
        key, value = key.index_select(2, key_tokens), value.index_select(2, key_tokens)
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16) and not dropout:
        # Flash attention over sequences end to end (Dao, arXiv 2307.08691), as torch brings it along. It lines up the ends of queries
        # and keys, and takes fewer heads of keys than of queries. Without `scale` it divides by the root of the width, as models do.
        from torch.nn.attention.varlen import varlen_attn

        q, k, v = (part[0].transpose(0, 1) for part in (query, key, value))
        left = -1 if window is None else window - 1
        # Newer releases of torch have to be told that there are fewer heads of keys than of queries.
        told: dict[str, Any] = {"enable_gqa": True} if k.shape[1] < q.shape[1] and ASKS_FOR_GROUPS else {}
        attended = varlen_attn(q, k, v, *ends, *longest, scale=scaling, window_size=(left, 0), **told)
        assert isinstance(attended, torch.Tensor)
        return attended[None]
    sizes = [ends.diff().tolist() for ends in ends]
    queries, keys, values = query.split(sizes[0], 2), key.split(sizes[1], 2), value.split(sizes[1], 2)
    parts = []
    for q, k, v in zip(queries, keys, values, strict=True):
        before, mask = k.shape[2] - q.shape[2], None
        if before or (window is not None and k.shape[2] > window):
            mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril(before)
            mask = mask if window is None else mask.triu(before + 1 - window)
        grouped = k.shape[1] < q.shape[1]
        parts.append(
            scaled_dot_product_attention(
                q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=scaling, enable_gqa=grouped
            )
        )
    return torch.cat(parts, 2).transpose(1, 2)
