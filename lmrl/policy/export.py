"""From a policy with Q heads to an ordinary checkpoint that decodes as value guidance does, at full speed.

Where Q is linear in the hidden state, logits + beta Q = (W_lm + beta gain scale W_q) h + constant, and the constant drops out of the
softmax: one matrix does both. The twins enter by their mean, since the lower of two is not linear.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from lmrl.errors import ModelError
from lmrl.policy.language_model import merged_model, projection_of
from lmrl.policy.merged import merged_weights
from lmrl.policy.policy import Policy
from lmrl.policy.quantized import is_quantized, plain_copy

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def fold(policy: Policy, beta: float) -> torch.Tensor:
    """The vocabulary matrix (V, D), float32, of pi exp(beta mean(Qbar_1, Qbar_2)). Raises ModelError if Q is not linear."""
    values = policy.values
    if values is None or values.spec.q is None:
        raise ModelError("--beta folds Q heads into the model, but this policy has none: leave it out")
    if values.spec.q not in ("linear", "tied"):
        raise ModelError(
            f"Q heads of kind '{values.spec.q}' are not linear and cannot be folded into the vocabulary matrix: train with "
            "objective.name=ilql, objective.q_head=tied (or linear) and objective.trunk=shared (or detached), fit a plain model "
            "to the guided policy with --distill, or leave the heads behind with --beta 0"
        )
    if values.trunk is not None:
        raise ModelError(
            "the Q heads stand on a trunk of their own, which the exported model would not have: train with "
            "objective.trunk=shared or detached, or fit a plain model to the guided policy with --distill"
        )
    if not policy.splits_head:
        raise ModelError(
            "this model caps or scales its logits, so that Q cannot be folded into its vocabulary matrix: fit a plain model to the guided policy with --distill"
        )
    matrix_VD = policy.vocabulary.detach().float()
    parts = [head.linear_weight(matrix_VD) for head in values.target_q]
    q_VD = torch.stack([part.detach() for part in parts]).mean(0) * values.scale * values.gain
    q_VD = q_VD - q_VD.mean(0)  # a constant for every state, which would only cost precision
    return matrix_VD + beta * q_VD


def save_plain(policy: Policy, folder: Path, beta: float | None = None) -> None:
    """Write an ordinary transformers folder: adapters merged, and with `beta` above 0 the Q heads folded in, float32.

    A quantized base becomes ordinary weights again, in bfloat16.
    """
    matrix_VD = fold(policy, beta) if beta else None
    ends = sorted(policy.eos_ids)
    model = plain_model(policy)
    if matrix_VD is not None:
        bias = getattr(projection_of(model), "bias", None)
        folded = nn.Linear(matrix_VD.shape[1], matrix_VD.shape[0], bias=bias is not None)
        folded.weight = nn.Parameter(matrix_VD, requires_grad=False)
        if bias is not None:
            folded.bias = nn.Parameter(bias.detach().float(), requires_grad=False)
        model.set_output_embeddings(folded)  # type: ignore[no-untyped-call,unused-ignore]  # typed in some releases
        for config in {id(one): one for one in (model.config, model.config.get_text_config())}.values():
            config.tie_word_embeddings = False
    if ends and model.generation_config is not None:  # a base model's may lack the tokenizer's, which ended turns too
        model.generation_config.eos_token_id = ends if len(ends) > 1 else ends[0]
    model.save_pretrained(folder)
    policy.tokenizer.save_pretrained(folder)


def plain_model(policy: Policy) -> PreTrainedModel:
    """The language model without adapters and quantization; what the policy holds may be taken apart for it."""
    if not policy.is_lora:
        return policy.causal_lm
    if any(is_quantized(parameter) for parameter in policy.causal_lm.parameters()):
        weights = {name: tensor.to(torch.bfloat16) for name, tensor in merged_weights(policy)}
        return plain_copy(policy.causal_lm, weights)
    return merged_model(policy.adapted_model)


def save_adapter(policy: Policy, folder: Path) -> None:
    """Write the LoRA adapter alone. Raises ModelError if there is none."""
    if not policy.is_lora:
        raise ModelError("--adapter-only needs a run with model.lora; this one trained all weights: leave it out")
    policy.save_adapter(folder)
    policy.tokenizer.save_pretrained(folder)
