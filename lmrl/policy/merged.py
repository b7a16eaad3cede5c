"""A policy's weights as the plain checkpoint that other programs know: adapters merged, names without wrappers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

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
            tensor = merged(adapted[owner], tensor)
        yield (f"{owner}.{last}" if wrapped else name), tensor


def merged(layer: Any, weight: torch.Tensor) -> torch.Tensor:
    """A layer's weight with its adapter, in float32."""
    from peft.tuners.lora import Linear

    if type(layer) is Linear and not layer.fan_in_fan_out and ADAPTER not in layer.lora_variant:
        # In one product: engines are given all weights after every update.
        down, up = (part[ADAPTER].weight.float() for part in (layer.lora_A, layer.lora_B))
        return torch.addmm(weight.float(), up, down, alpha=layer.scaling[ADAPTER])
    return weight.float() + layer.get_delta_weight(ADAPTER).float()
