"""Abilities of a model, found by trial."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from lmrl.trajectories.batch import Batch, Sequence
from lmrl.trajectories.shared import pack

if TYPE_CHECKING:
    from lmrl.policy.policy import Policy

LOGIT_SETTINGS = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")
"""Settings by which models of transformers cap or scale their logits; the probe below finds others."""


def can_pack(policy: Policy) -> bool:
    """True if the model computes packed sequences (see lmrl/trajectories/shared.py) as it computes plain ones.

    Not those with a state instead of attention, with a window, or with an attention that ignores the mask.
    """
    config = policy.causal_lm.config.get_text_config()
    kinds = getattr(config, "layer_types", None) or ["full_attention"]
    if set(kinds) != {"full_attention"} or getattr(config, "sliding_window", None) is not None:
        return False
    tokens = torch.arange(12) % policy.vocabulary.shape[0]
    plain = [
        Sequence(torch.cat([tokens[:4], own]), torch.arange(3, 3 + len(own)), own) for own in (tokens[4:7], tokens[7:])
    ]
    was_training = policy.training
    try:
        scores = [policy.score(Batch(part))["logprobs"] for part in (plain, [pack(plain)])]
    except (TypeError, ValueError, RuntimeError, IndexError, NotImplementedError):
        return False
    finally:
        policy.train(was_training)
    tolerance = 1e-4 if policy.causal_lm.dtype == torch.float32 and policy.autocast_dtype is None else 5e-2
    return torch.allclose(torch.cat(scores[0]), torch.cat(scores[1]), atol=tolerance, rtol=0)


@torch.no_grad()
def head_is_linear(lm: nn.Module) -> bool:
    """True if the logits are a plain projection of the trunk's last hidden state.

    Some models cap or scale their logits; those go through the model's own head, with more memory.
    """
    head, trunk = lm.get_output_embeddings(), getattr(lm, lm.base_model_prefix, None)
    if trunk is None or trunk is lm or getattr(head, "weight", None) is None:
        return False
    config = lm.config.get_text_config()
    if any(getattr(config, name, None) not in (None, 1, 1.0) for name in LOGIT_SETTINGS):
        return False
    was_training = lm.training
    lm.eval()
    probe = torch.arange(8, device=head.weight.device)[None] % head.weight.shape[0]
    expected = lm(input_ids=probe, use_cache=False).logits.float()
    hidden = trunk(input_ids=probe, use_cache=False).last_hidden_state
    actual = nn.functional.linear(hidden.to(head.weight.dtype), head.weight, getattr(head, "bias", None)).float()
    lm.train(was_training)
    return expected.shape == actual.shape and torch.allclose(expected, actual, rtol=1e-2, atol=1e-3)
