"""Abilities of a model, found by trial."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from lmrl.policy.attention import ATTENTION, HAS_VARLEN
from lmrl.policy.language_model import projection_of
from lmrl.policy.slots import SlotCache, slot_logits, slots_fit
from lmrl.trajectories.batch import Batch, Sequence
from lmrl.trajectories.shared import pack

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lmrl.policy.policy import Policy

LOGIT_SETTINGS = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")
"""Settings by which models of transformers cap or scale their logits; the probe below finds others."""

LONGEST_PROBE = 8192
"""Tokens of a window that the probe of packing goes beyond."""
EXACT = 1e-4
"""Nats by which a log-probability in float32 may differ by rounding."""
ROUNDING = 0.15
"""Share of a mistake's difference that rounding to bfloat16 may make: it makes up to 0.08 of it for SmolLM2 (of packing; of the
other abilities 0.02, as for small random models of five kinds), where ignored positions make 0.5."""


def can_pack(policy: Policy) -> bool:
    """True if sequences that stand end to end in one row are computed as each is alone, and that is faster: on an accelerator in
    bfloat16, by an attention that takes them. With `model.attention` named, wherever it is right."""
    if policy.attention in (None, "auto"):
        computed = torch.bfloat16 in (policy.autocast_dtype, policy.causal_lm.dtype)
        if policy.device.type != "cuda" or not computed or not HAS_VARLEN:
            return False
    if policy.attention in ("sdpa", "eager"):
        return False
    config = policy.causal_lm.config.get_text_config()
    window = getattr(config, "sliding_window", None) or 0
    longer = max(min(window, LONGEST_PROBE) + 8, 24)  # a window that is not applied shows only beyond it
    tokens = _some_tokens(policy, longer + 32)
    parts = tokens.split([16, longer, 16])
    starts = [0, 16, 16 + longer]
    plain = [Sequence(own, torch.arange(len(own) - 1), own[1:]) for own in parts]
    states = torch.cat([start + one.states for start, one in zip(starts, plain, strict=True)])
    careless = [Sequence(tokens, states, torch.cat([one.targets for one in plain]))]  # every part sees those before it
    ways = [(plain, [[0, 1, 2]], True), (plain, [[0], [1], [2]], False), (careless, [[0]], False)]
    was_training = policy.training
    policy.eval()
    try:
        with torch.no_grad():
            scores = [
                torch.cat([_logprobs(policy, given, row, packed) for row in rows]) for given, rows, packed in ways
            ]
    except (TypeError, ValueError, RuntimeError, IndexError, NotImplementedError, ImportError):
        return False
    finally:
        policy.train(was_training)
    # The last ones of each part: what a window hides has no effect on them.
    found, expected, ignoring = (
        torch.stack([part[-8:] for part in score.split([len(own) - 1 for own in parts])]) for score in scores
    )
    worst = (found - expected).abs().mean(1).max()
    return _agrees(policy, float(worst), _gap(ignoring, expected))


def _logprobs(policy: Policy, sequences: list[Sequence], rows: list[int], packed: bool) -> torch.Tensor:
    found: torch.Tensor = policy(Batch(sequences).collate(rows, policy.pad_id, packed).to(policy.device)).logprobs
    return found


def can_share_prompts(policy: Policy) -> bool:
    """True if the model computes sequences with a shared beginning (see lmrl/trajectories/shared.py) as it computes plain ones.

    Not those with a state instead of attention, with a window, or with an attention that ignores the mask.
    """
    config = policy.causal_lm.config.get_text_config()
    if policy.packs:
        return bool(policy.causal_lm.config._attn_implementation == ATTENTION)
    kinds = getattr(config, "layer_types", None) or ["full_attention"]
    if set(kinds) != {"full_attention"} or getattr(config, "sliding_window", None) is not None:
        return False
    part = min(8, (policy.max_length or 32) // 4)
    if part == 0:
        return False
    tokens = _some_tokens(policy, 4 * part)
    plain = [
        Sequence(torch.cat([tokens[:part], own]), torch.arange(part - 1, part - 1 + len(own)), own)
        for own in (tokens[part : 2 * part], tokens[2 * part :])
    ]
    packed = pack(plain)
    assert packed is not None  # they begin alike
    careless = replace(packed, branches=None)  # every token sees all before it
    was_training = policy.training
    try:
        scores = [torch.cat(policy.score(Batch(part))["logprobs"]) for part in ([packed], plain, [careless])]
    except (TypeError, ValueError, RuntimeError, IndexError, NotImplementedError):
        return False
    finally:
        policy.train(was_training)
    found, expected, ignoring = scores
    return _agrees(policy, _gap(found, expected), _gap(ignoring, expected))


def can_hold_slots(policy: Policy) -> bool:
    """True if the model computes tokens behind those that slots hold (see lmrl/policy/slots.py) as it computes all of them.

    Not those with a state instead of attention, with a window, or with an attention that ignores the mask.
    """
    config = policy.causal_lm.config
    if not slots_fit(config):
        return False
    tokens = _some_tokens(policy, 14).tolist()
    parts = [[tokens[:3], tokens[3:8], tokens[8:9]], [tokens[9:11], tokens[11:12], tokens[12:13]]]
    try:
        with policy.decoding():
            cache, starts = SlotCache(config, two=False), [0, 0]
            cache.resize(2, 16)
            for turn in range(3):  # a prompt, a prompt behind it, and one token
                new = [row[turn] for row in parts]
                found_2V = slot_logits(policy, cache, None, 0, starts, new)
                starts = [start + len(tokens) for start, tokens in zip(starts, new, strict=True)]
            whole_2V = torch.cat([_plain_logits(policy, sum(row, [])) for row in parts])
            careless_2V = torch.cat([_plain_logits(policy, row[-1]) for row in parts])  # nothing was kept
    except (TypeError, ValueError, RuntimeError, IndexError, NotImplementedError, AttributeError):
        return False
    found, expected, ignoring = (one.float().log_softmax(-1) for one in (found_2V, whole_2V, careless_2V))
    return _agrees(policy, _gap(found, expected), _gap(ignoring, expected))


def _plain_logits(policy: Policy, tokens: list[int]) -> torch.Tensor:
    """Logits after these tokens, (1, V), computed all at once."""
    every = torch.tensor([tokens], device=policy.device)
    positions = torch.arange(len(tokens), device=policy.device)[None]
    inputs = {"input_ids": every, "attention_mask": torch.ones_like(every), "position_ids": positions}
    return policy.next_token_logits(policy.new_cache(), None, **inputs)


def _some_tokens(policy: Policy, count: int) -> torch.Tensor:
    """Tokens from all over the vocabulary, the same ones every time. The lowest ids are special tokens in many vocabularies, for
    which bfloat16 is least exact."""
    return torch.randint(policy.vocabulary.shape[0], (count,), generator=torch.Generator().manual_seed(0))


def _agrees(policy: Policy, gap: float, mistake: float) -> bool:
    """True if log-probabilities that differ from the expected ones by `gap` nats on average do so by rounding alone.
    mistake: the difference that a model without the ability would have. In bfloat16 rounding alone may reach a tenth of
    a nat, so the gap is judged relative to it."""
    tolerance = _tolerance(policy)
    return gap < (tolerance if tolerance == EXACT else max(tolerance, ROUNDING * mistake))


def _gap(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().mean())


def _tolerance(policy: Policy) -> float:
    """Nats by which two ways to compute a log-probability may differ by rounding."""
    return EXACT if policy.causal_lm.dtype == torch.float32 and policy.autocast_dtype is None else 5e-2


@torch.no_grad()
def head_is_linear(lm: PreTrainedModel) -> bool:
    """True if the logits are a plain projection of the trunk's last hidden state.

    Some models cap or scale their logits; those go through the model's own head, with more memory.
    """
    head, trunk = projection_of(lm), getattr(lm, lm.base_model_prefix, None)
    if trunk is None or trunk is lm or getattr(head, "weight", None) is None or hasattr(head, "lora_A"):
        return False
    config = lm.config.get_text_config()
    if any(getattr(config, name, None) not in (None, 1, 1.0) for name in LOGIT_SETTINGS):
        return False
    was_training = lm.training
    lm.eval()  # type: ignore[no-untyped-call,unused-ignore]  # typed in some releases of transformers
    probe = torch.arange(8, device=head.weight.device)[None] % head.weight.shape[0]
    expected = lm(input_ids=probe, use_cache=False).logits.float()
    hidden = trunk(input_ids=probe, use_cache=False).last_hidden_state
    actual = nn.functional.linear(hidden.to(head.weight.dtype), head.weight, getattr(head, "bias", None)).float()
    lm.train(was_training)
    return expected.shape == actual.shape and torch.allclose(expected, actual, rtol=1e-2, atol=1e-3)
