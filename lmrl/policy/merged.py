"""A policy's weights as a plain checkpoint that other programs can read: adapters merged, names without wrappers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from lmrl.policy.policy import Policy
from lmrl.policy.quantized import dequantized

ADAPTER = "default"
WRAPPERS = (".base_layer", f".modules_to_save.{ADAPTER}")
"""What peft inserts into the names of parameters that a plain checkpoint also has."""
OWN_PARTS = (".lora_", ".original_module.", ".modules_to_save.")
"""Parts of the names of parameters that a plain checkpoint does not have, or that another one replaces."""


def merged_weights(policy: Policy) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and tensors of the language model, one at a time; a weight with an adapter is merged in float32.

    Heads other than the vocabulary projection are skipped, and tied weights come once.
    """
    return merged_tensors(policy.causal_lm)


@torch.no_grad()
def merged_tensors(lm: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """As `merged_weights`, for a transformers model that peft and bitsandbytes may have changed."""
    adapted: dict[int, Any] = {}
    for layer in lm.modules():
        if hasattr(layer, "get_delta_weight") and ADAPTER in getattr(layer, "scaling", ()):
            adapted.setdefault(id(adapted_parameter(layer)), layer)
    for name, parameter in lm.named_parameters():
        plain = name
        for wrapper in WRAPPERS:
            plain = plain.replace(wrapper, "")
        if any(part in plain for part in OWN_PARTS):
            continue
        tensor = dequantized(parameter)
        if id(parameter) in adapted:
            tensor = merged(adapted[id(parameter)], tensor)
        yield plain, tensor


def adapted_parameter(layer: Any) -> torch.Tensor:
    """The parameter that a peft layer adapts."""
    parameter: torch.Tensor = layer.get_param() if hasattr(layer, "get_param") else layer.get_base_layer().weight
    return parameter


def merged(layer: Any, weight: torch.Tensor) -> torch.Tensor:
    """A layer's weight with its adapter, in float32."""
    from peft.tuners.lora import Linear

    variant = layer.lora_variant.get(ADAPTER)
    if variant is not None:
        whole: torch.Tensor = variant.merge_safe(layer, ADAPTER, weight.float())
        return whole
    if type(layer) is Linear and not getattr(layer, "fan_in_fan_out", False):
        # In one product, because engines get all weights after every update.
        factors: Any = layer
        down, up = (part[ADAPTER].weight.float() for part in (factors.lora_A, factors.lora_B))
        return torch.addmm(weight.float(), up, down, alpha=layer.scaling[ADAPTER])
    delta: torch.Tensor = layer.get_delta_weight(ADAPTER)
    return weight.float() + delta.float()
