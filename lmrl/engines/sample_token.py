"""Sampling one token per row from logits over the vocabulary, by inverting the cumulative distribution."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from lmrl.accelerators import to_device
from lmrl.engines.base import Sampling
from lmrl.trajectories.allowed import AllowedTokens

BLOCK = 256
"""Size of the vocabulary blocks whose probabilities are summed before a token is looked for in one of them."""
CANDIDATES = 1024
"""Most likely tokens among which the edge of top-p is looked for first."""
GREEDY = 1e-30
"""Below this temperature the most likely token is drawn: logits divided by a smaller one overflow."""


def sample_token(
    logits_BV: torch.Tensor, sampling: Sampling, uniforms_B: np.ndarray
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sample one token per row: the one at which the cumulative distribution passes a given uniform number in [0, 1).

    Returns tokens (B,) and their log-probabilities (B,) under the sampling distribution (after temperature, top-k,
    top-p).
    """
    if sampling.temperature < GREEDY:
        tokens_B = logits_BV.argmax(-1)
        return tokens_B, torch.zeros(len(tokens_B), device=logits_BV.device)
    tempered_BV = logits_BV if sampling.temperature == 1 else logits_BV / sampling.temperature
    probs_BV = _truncate(tempered_BV, sampling).softmax(-1)
    tokens_B = invert(probs_BV, to_device(torch.from_numpy(uniforms_B), logits_BV.device))
    return tokens_B, probs_BV.gather(1, tokens_B[:, None])[:, 0].log()


def restrict(logits_BV: torch.Tensor, allowed_B: Sequence[AllowedTokens | None]) -> torch.Tensor:
    """Set logits of tokens that a row may not choose to minus infinity (None: it may choose all)."""
    restricted = [row for row, allowed in enumerate(allowed_B) if allowed is not None]
    if not restricted:
        return logits_BV
    sets = [allowed for allowed in allowed_B if allowed is not None]
    device = logits_BV.device
    rows = torch.tensor(restricted, device=device).repeat_interleave(torch.tensor(list(map(len, sets)), device=device))
    columns = torch.tensor([token for allowed in sets for token in allowed], device=device)
    chosen = logits_BV.clone()
    chosen[torch.tensor(restricted, device=device)] = -torch.inf
    chosen[rows, columns] = logits_BV[rows, columns]
    return chosen


def invert(weights_BV: torch.Tensor, uniforms_B: torch.Tensor) -> torch.Tensor:
    """Indices (B,) at which the running sums of weights (float32, not all zero) pass this share (float64) of the total.

    First a block of the vocabulary, then a token in it, both from running sums in float64: in float32 those over a
    large vocabulary lose its tail, and in float64 those over all of it take as long as everything else together.
    """
    tokens = weights_BV.shape[1]
    whole = tokens // BLOCK * BLOCK
    sums = [weights_BV[:, :whole].unflatten(1, (whole // BLOCK, BLOCK)).sum(-1)] if whole else []
    rest = [weights_BV[:, whole:].sum(-1, keepdim=True)] if whole < tokens else []
    blocks_B, inside_B = _invert(torch.cat(sums + rest, 1).double(), uniforms_B)
    columns_BK = blocks_B[:, None] * BLOCK + torch.arange(BLOCK, device=weights_BV.device)
    weights_BK = weights_BV.gather(1, columns_BK.clamp(max=tokens - 1)).double() * (columns_BK < tokens)
    return blocks_B * BLOCK + _invert(weights_BK, inside_B)[0]


def _invert(weights_BN: torch.Tensor, shares_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the running sums pass these shares of the total, and the share of the weight there that was passed."""
    sums_BN = weights_BN.cumsum(-1)
    total_B1 = sums_BN[:, -1:]
    below_B1 = total_B1.nextafter(torch.zeros_like(total_B1))  # rounding must not select an index without weight
    targets_B1 = torch.minimum(shares_B[:, None] * total_B1, below_B1)
    found_B1 = torch.searchsorted(sums_BN, targets_B1, right=True)
    weights_B1 = weights_BN.gather(1, found_B1)
    passed_B1 = (targets_B1 - sums_BN.gather(1, found_B1) + weights_B1) / weights_B1
    return found_B1[:, 0], passed_B1[:, 0].clamp(0, 1)


def _truncate(logits_BV: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Set the logits outside top-k and top-p to minus infinity; the most likely token always stays."""
    if 0 < sampling.top_k < logits_BV.shape[-1]:
        kth = logits_BV.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < kth, -torch.inf)
    if sampling.top_p < 1:
        total_B1 = logits_BV.logsumexp(-1, keepdim=True)
        for count in (CANDIDATES, logits_BV.shape[-1]):
            ordered, order = logits_BV.topk(min(count, logits_BV.shape[-1]), dim=-1)
            probs = (ordered - total_B1).exp()
            before = probs.cumsum(-1) - probs
            if bool((before[:, -1] >= sampling.top_p).all()):  # the edge lies among these candidates
                break
        outside = before >= sampling.top_p
        outside[:, 0] = False  # also if top_p is 0 in float32
        ordered = ordered.masked_fill(outside, -torch.inf)
        logits_BV = torch.full_like(logits_BV, -torch.inf).scatter(1, order, ordered)
    return logits_BV
