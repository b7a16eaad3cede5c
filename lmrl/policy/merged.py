"""A policy's weights as the plain checkpoint that other programs know: adapters merged, names without wrappers."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from lmrl.policy.policy import Policy

ADAPTER, BASE_LAYER = "default", ".base_layer."


@torch.no_grad()
def merged_weights(policy: Policy) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and tensors of the language model, one at a time; a weight with an adapter is merged in float32.

    Heads beside the vocabulary projection are left out, and tied weights come once.
    """
    lm = policy.causal_lm
    adapted = {name: module for name, module in lm.named_modules() if hasattr(module, "get_delta_weight")}
    for name, parameter in lm.named_parameters():
        owner, wrapped, last = name.partition(BASE_LAYER)
        if ".lora_" in name:
            continue
        tensor = parameter.detach()
        if wrapped and last == "weight" and ADAPTER in adapted[owner].scaling:
            tensor = tensor.float() + adapted[owner].get_delta_weight(ADAPTER).float()
        yield (f"{owner}.{last}" if wrapped else name), tensor
