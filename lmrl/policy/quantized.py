"""Frozen base weights in 4 bits under trained adapters: QLoRA (Dettmers et al., arXiv 2305.14314), by bitsandbytes.

An adapter belongs to the rounded weights that it was trained on, so its folder says how they were rounded. Merged, in an
export or an engine, it is added to those same rounded weights.
"""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from lmrl.errors import ModelError
from lmrl.extras import need

FILE = "quantization.json"
"""Beside an adapter: how lmrl quantizes its base model."""


def arguments(quantization: str | None, dtype: torch.dtype, key: str) -> dict[str, Any]:
    """Arguments of `from_pretrained`. dtype: of what is not quantized, and of products. Raises ModelError without bitsandbytes."""
    if quantization is None:
        return {}
    need("bitsandbytes", f"{key}: quantization={quantization}", ModelError)
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    return {"quantization_config": config}


def keep_layout(model: nn.Module) -> None:
    """Keep 4-bit weights as they were read: on some CPUs bitsandbytes packs them for its kernel at the first pass without
    gradient, and a later pass with one would silently have none."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def is_quantized(parameter: torch.Tensor) -> bool:
    """True for a weight that bitsandbytes holds in 4 bits."""
    return getattr(parameter, "quant_state", None) is not None


def numel(parameter: torch.Tensor) -> int:
    """Numbers that a parameter stands for, however it is stored."""
    return math.prod(parameter.quant_state.shape) if is_quantized(parameter) else parameter.numel()


def dequantized(parameter: torch.Tensor) -> torch.Tensor:
    """The weight as passes compute with it; one that is not quantized as it is."""
    if not is_quantized(parameter):
        return parameter.detach()
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(parameter.data, parameter.quant_state)


def plain_config(lm: nn.Module) -> Any:
    """A model's configuration without its quantization, which merged weights have not."""
    config = copy.deepcopy(lm.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def plain_copy(lm: nn.Module, weights: dict[str, torch.Tensor]) -> nn.Module:
    """An ordinary model of these weights, named as in `merged_tensors`, with the configuration of a quantized one."""
    config = plain_config(lm)
    with torch.device("meta"):
        model = type(lm)(config)
    model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()
    left = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if left:
        raise ModelError(f"the quantized model has no weights for '{left[0]}'")
    for module in model.modules():  # computed from the configuration, and in no state_dict
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:
                own = lm.get_submodule(_name_of(model, module))
                module.register_buffer(
                    name, getattr(own, name), persistent=name not in module._non_persistent_buffers_set
                )
    model.generation_config = copy.deepcopy(getattr(lm, "generation_config", None))
    for name in ("_weight_conversions",):  # by which transformers writes weights under other names than it holds them
        if hasattr(lm, name):
            setattr(model, name, getattr(lm, name))
    return model


def _name_of(model: nn.Module, module: nn.Module) -> str:
    return next(name for name, one in model.named_modules() if one is module)


# ------------------------------------------------------------------------------------------------------------------ files
def save_quantization(quantization: str | None, folder: Path) -> None:
    if quantization is not None:
        (folder / FILE).write_text(json.dumps({"quantization": quantization}) + "\n")


def saved_quantization(folder: Path) -> str | None:
    """How the base of an adapter was quantized; None: not by lmrl."""
    file = folder / FILE
    if not file.is_file():
        return None
    try:
        return str(json.loads(file.read_text())["quantization"])
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f'{file} is damaged: it should hold {{"quantization": "nf4"}}') from error
