"""A pass for whole rows of the vocabulary: logits, and Q values, of a few chosen states. Training goes by forward.py instead."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from lmrl.policy.cache import Cache, cache_arguments
from lmrl.policy.heads import probability_ratio
from lmrl.policy.language_model import projection_of, trunk_of
from lmrl.policy.logprobs import whole_logits
from lmrl.policy.passes import States
from lmrl.policy.slots import SlotCache

if TYPE_CHECKING:
    from lmrl.policy.policy import Policy

Pick = Callable[[torch.Tensor], torch.Tensor]
"""Chooses states from a tensor over all positions: (B, T, D) to (N, D)."""


def run_states(
    policy: Policy, inputs: dict[str, Any], pick: Pick, with_q: bool, cache: Cache | SlotCache | None = None
) -> States:
    """Run the policy's trunk, and with_q the one that its Q values stand on; inputs: as the trunks take them."""
    lm, values = policy.causal_lm, policy.values
    kept = cache.policy if cache else None
    with policy.autocast():
        if policy.splits_head:
            trunk = trunk_of(lm)
            hidden_ND = pick(trunk(**inputs, **cache_arguments(trunk, kept)).last_hidden_state)
            logits_NV = policy.logits_of(hidden_ND)
        else:
            result = lm(**inputs, **cache_arguments(lm, kept), output_hidden_states=True)
            hidden_ND, logits_NV = pick(result.hidden_states[-1]), pick(result.logits)
        states = States(hidden_ND, logits_NV)
        if not with_q:
            return states
        if (trunks := values.trunks) is not None:
            trunk = trunk_of(trunks.target) if values.spec.q == "probability" else trunks.target
            arguments = cache_arguments(trunk, cache.values if cache else None)
            states.features_ND = pick(trunk(**inputs, **arguments).last_hidden_state)
            if values.spec.q == "probability":
                states.q_NV = probability_ratio(
                    whole_logits(states.features_ND, projection_of(trunks.target)), logits_NV
                )
                return states
        with torch.autocast(hidden_ND.device.type, enabled=False):
            states.q_NV = values.guiding(states.features_ND, policy.vocabulary)
    return states
