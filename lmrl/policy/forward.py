"""A pass through a policy: log-probabilities, values and Q of the actions of a microbatch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from lmrl.errors import ModelError
from lmrl.policy.attention import ATTENTION, packed_arguments, placeholder
from lmrl.policy.heads import CHUNK, guide, probability_ratio
from lmrl.policy.language_model import projection_of, trunk_of
from lmrl.policy.logprobs import (
    at_least_float32,
    greedy_logprobs,
    restricted_logits,
    restricted_logprobs,
    token_logprobs,
    whole_logits,
)
from lmrl.policy.passes import ABSENT, ForwardRequest, Outputs
from lmrl.policy.pull import bounded, bounded_input
from lmrl.trajectories.batch import Microbatch
from lmrl.trajectories.shared import visible
from lmrl.trajectories.trajectory import TOKENS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lmrl.policy.policy import Policy


def run_pass(policy: Policy, lm: PreTrainedModel, batch: Microbatch, request: ForwardRequest) -> Outputs:
    """One pass through a policy's trunks and heads. lm: the policy's own language model, or its reference.

    Log-probabilities and entropy of restricted actions are those of the distribution over the allowed tokens; Q values know no
    restriction. Raises ModelError for actions of another kind than tokens.
    """
    if batch.kind != TOKENS:
        raise ModelError(f"a language model chooses tokens, but the episodes hold actions of the kind '{batch.kind}'")
    outputs = Outputs()
    with policy.autocast():
        inputs = _inputs(policy, batch)
        trunks = policy.values.trunks if policy.values is not None else None
        hidden_ND = None
        if request.logprobs or trunks is None:
            hidden_ND = _policy_outputs(policy, lm, inputs, batch, request, outputs)
        if request.probability is not None:
            _second_model(policy, inputs, batch, request.probability, outputs)
        elif request.values or request.q:
            if trunks is not None:
                hidden_ND = trunks.own(**inputs).last_hidden_state[batch.rows_N, batch.cols_N]
                with torch.no_grad():
                    target_ND = trunks.target(**inputs).last_hidden_state[batch.rows_N, batch.cols_N]
            else:
                target_ND = hidden_ND
            assert hidden_ND is not None and target_ND is not None
            with torch.autocast(hidden_ND.device.type, enabled=False):
                hidden_ND = hidden_ND.detach() if request.detach_values else hidden_ND
                _head_outputs(policy, hidden_ND, target_ND, batch, request, outputs)
    return outputs


def _inputs(policy: Policy, batch: Microbatch) -> dict[str, Any]:
    inputs = {"input_ids": batch.tokens_BT, "position_ids": batch.positions_BT, "use_cache": False}
    own = policy.causal_lm.config._attn_implementation == ATTENTION
    if batch.packing is not None:
        mask = placeholder(batch.tokens_BT.device) if own else None
        return inputs | {"attention_mask": mask, **packed_arguments(batch.packing)}
    if batch.branches_BT is not None:
        mask_B1TT = visible(batch.branches_BT)[:, None]
        # Eager attention adds its mask to the scores.
        if policy.causal_lm.config._attn_implementation not in ("sdpa", ATTENTION):
            dtype = policy.causal_lm.dtype
            mask_B1TT = torch.zeros_like(mask_B1TT, dtype=dtype).masked_fill(~mask_B1TT, torch.finfo(dtype).min)
        return inputs | {"attention_mask": mask_B1TT}
    # Padding is on the right, so no token of a causal model sees it; without a mask attention takes its fastest path.
    return {"input_ids": batch.tokens_BT, "attention_mask": None, "use_cache": False}


def _policy_outputs(
    policy: Policy,
    lm: PreTrainedModel,
    inputs: dict[str, Any],
    batch: Microbatch,
    request: ForwardRequest,
    outputs: Outputs,
) -> torch.Tensor:
    """Fill in log-probabilities and entropy; return the hidden states of the action tokens for the heads, (N, D)."""
    hidden_BTD: torch.Tensor
    if policy.splits_head:
        hidden_BTD = trunk_of(lm)(**inputs).last_hidden_state
    else:
        limit = request.value_pull if request.logprobs else None
        with bounded_input(projection_of(lm), limit, policy.value_pull) as for_values:
            result = lm(**inputs, output_hidden_states=True)
        hidden_BTD = for_values[0] if for_values else result.hidden_states[-1]
    hidden_ND = values_ND = hidden_BTD[batch.rows_N, batch.cols_N]
    if request.logprobs and request.value_pull is not None and policy.splits_head and hidden_ND.requires_grad:
        hidden_ND, values_ND = bounded(hidden_ND, request.value_pull, policy.value_pull)
    if request.logprobs and policy.splits_head:
        head = projection_of(lm)
        bias = getattr(head, "bias", None)
        if batch.allowed is not None:
            found = restricted_logprobs(
                hidden_ND, head.weight, bias, batch.targets_N, batch.allowed, policy.temperature
            )
            outputs.logprobs, outputs.entropy, greedy = found
            outputs.greedy = greedy if request.greedy else ABSENT
        elif request.greedy:
            found = greedy_logprobs(hidden_ND, head.weight, bias, batch.targets_N, policy.temperature)
            outputs.logprobs, outputs.entropy, outputs.greedy = found
        else:
            outputs.logprobs, outputs.entropy = token_logprobs(
                hidden_ND, head.weight, bias, batch.targets_N, policy.temperature
            )
    elif request.logprobs:
        logits_NV = result.logits[batch.rows_N, batch.cols_N]
        logits_NV = logits_NV.to(at_least_float32(logits_NV.dtype)) / policy.temperature
        logits_NV = restricted_logits(logits_NV, batch.allowed)
        logprobs_NV = logits_NV.log_softmax(-1)
        outputs.logprobs = logprobs_NV.gather(1, batch.targets_N[:, None])[:, 0]
        outputs.entropy = -(logprobs_NV.exp() * logprobs_NV).sum(-1)
        if request.greedy:
            outputs.greedy = outputs.logprobs >= logprobs_NV.amax(-1)
    return values_ND


def _head_outputs(
    policy: Policy,
    hidden_ND: torch.Tensor,
    target_ND: torch.Tensor,
    batch: Microbatch,
    request: ForwardRequest,
    outputs: Outputs,
) -> None:
    values, actions_N, matrix = policy.values, batch.targets_N, policy.vocabulary
    if request.values:
        outputs.values, outputs.value_logits = values.value(hidden_ND)
    if request.q:
        taken = [values.taken(q, hidden_ND, actions_N, matrix) for q in values.q]
        outputs.q = torch.stack([q_N for q_N, _ in taken])
        if values.spec.bins:
            outputs.q_logits = torch.stack([logits for _, logits in taken if logits is not None])
        with torch.no_grad():
            targets = [values.taken(q, target_ND, actions_N, matrix)[0] for q in values.target_q]
            outputs.target_q = torch.stack(targets).amin(0)
    if values.target_v is not None and (request.q or request.target_values):
        with torch.no_grad():
            outputs.target_values = values.value(target_ND, values.target_v)[0]
    if request.push is not None:
        floors = batch.fields["floors"] if request.floors else None
        pushed = [values.push_down(q, hidden_ND, actions_N, matrix, request.push, floors) for q in values.q]
        outputs.push = torch.stack([push for push, _ in pushed])
        if request.floors:
            outputs.bound = torch.stack([bound for _, bound in pushed if bound is not None]).mean(0)


def _second_model(policy: Policy, inputs: dict[str, Any], batch: Microbatch, support: float, outputs: Outputs) -> None:
    """Q-SFT: log-probabilities of the second model, and the best supported ratio of its target to the policy."""
    rows, cols, actions_N = batch.rows_N, batch.cols_N, batch.targets_N
    values, trunks = policy.values, policy.values.trunks
    assert trunks is not None
    head = projection_of(trunks.own)
    bias = getattr(head, "bias", None)
    hidden_ND = trunk_of(trunks.own)(**inputs).last_hidden_state[rows, cols]
    logprobs_N, _ = token_logprobs(hidden_ND, head.weight, bias, actions_N)
    taken_N = (hidden_ND * head.weight[actions_N]).sum(-1)
    every_N = (hidden_ND * head.weight.sum(0)).sum(-1)  # the sum of all logits, without the logits
    if bias is not None:
        taken_N, every_N = taken_N + bias[actions_N], every_N + bias.sum()
    outputs.logprobs, outputs.vocabulary = logprobs_N, values.tokens
    outputs.other_logprobs = every_N - values.tokens * (taken_N - logprobs_N) - logprobs_N
    with torch.no_grad():
        pi_ND = trunk_of(policy.causal_lm)(**inputs).last_hidden_state[rows, cols]
        p_ND = trunk_of(trunks.target)(**inputs).last_hidden_state[rows, cols]
        best = []
        for pi, p in zip(*(part.split(max(CHUNK // values.tokens, 1)) for part in (pi_ND, p_ND)), strict=True):
            pi_logits = whole_logits(pi, projection_of(policy.causal_lm))
            ratio = probability_ratio(whole_logits(p, projection_of(trunks.target)), pi_logits)
            supported = guide(pi_logits, torch.zeros_like(pi_logits), 0.0, support).isfinite()
            best.append(ratio.masked_fill(~supported, 0).amax(-1))
        outputs.best_ratio = torch.cat(best)
