"""Requests to a forward pass of the policy, and its outputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class ForwardRequest:
    """The outputs that a forward pass should compute."""

    logprobs: bool = True
    values: bool = False
    target_values: bool = False
    """Also the values by the target heads; always included with `q`."""
    detach_values: bool = False
    """Stop the gradient of the values at the trunk."""
    value_pull: float | None = None
    """Bound the gradient of the values at a token's last hidden state to this many times the policy's (see pull.py)."""
    q: bool = False
    """Q of the actions, by each head and by the target heads."""
    push: float | None = None
    """The push-down of Q over the vocabulary, at this temperature."""
    floors: bool = False
    """Do not push Q below the batch's field `floors`."""
    probability: float | None = None
    """The outputs that Q-SFT needs, at this behaviour support."""
    greedy: bool = False
    """Whether each action is the most likely token."""


ABSENT: Any = None
"""An output that was not requested."""


@dataclass
class Outputs:
    """Per action token, flat over the microbatch: shape (N,), or (H, N) for H Q heads, (..., K) for K categories."""

    logprobs: torch.Tensor = ABSENT
    entropy: torch.Tensor = ABSENT
    values: torch.Tensor = ABSENT
    value_logits: torch.Tensor | None = None
    q: torch.Tensor = ABSENT
    q_logits: torch.Tensor | None = None
    target_q: torch.Tensor = ABSENT
    """The lower of the target twins."""
    target_values: torch.Tensor = ABSENT
    push: torch.Tensor | None = None
    bound: torch.Tensor | None = None
    """Share of the vocabulary that was raised to the floor."""
    greedy: torch.Tensor = ABSENT
    """True if the action is the most likely token."""
    other_logprobs: torch.Tensor = ABSENT
    """Sum of the second model's log-probabilities of all tokens except the action."""
    vocabulary: int = 0
    best_ratio: torch.Tensor = ABSENT
    """Highest Q of a supported token, by the target of the second model."""

    def zero_loss(self) -> torch.Tensor:
        """0, connected to every output that carries a gradient."""
        held = [value for value in vars(self).values() if isinstance(value, torch.Tensor) and value.requires_grad]
        return sum((value.sum() * 0.0 for value in held), torch.zeros(()))


@dataclass
class States:
    """All outputs of N states over the whole vocabulary V: for small batches."""

    features_ND: torch.Tensor
    """Last hidden states, which the heads take."""
    logits_NV: torch.Tensor
    q_NV: torch.Tensor | None = None
    """As decoding uses it: the lower of the target twins."""


@dataclass(frozen=True)
class Guidance:
    """How Q guides decoding: its weight, and the behaviour support."""

    beta: float
    support: float = 0.0
