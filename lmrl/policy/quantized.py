"""Frozen base weights in 4 bits under trained adapters: QLoRA (Dettmers et al., arXiv 2305.14314), by bitsandbytes.

An adapter belongs to the rounded weights that it was trained on, so its folder records how they were rounded. For an
export or an engine, it is merged into those same rounded weights.
"""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import nn

from lmrl.errors import ModelError
from lmrl.extras import need

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FILE = "quantization.json"
"""File next to an adapter that records how lmrl quantizes its base model."""


def arguments(quantization: str | None, dtype: torch.dtype, key: str) -> dict[str, Any]:
    """Arguments of `from_pretrained`. dtype: of unquantized weights and of products. Raises ModelError without
    bitsandbytes."""
    if quantization is None:
        return {}
    need("bitsandbytes", f"{key}: quantization={quantization}", ModelError)
    config = transformers.BitsAndBytesConfig(  # type: ignore[no-untyped-call]
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    return {"quantization_config": config}


def keep_layout(model: nn.Module) -> None:
    """Keep 4-bit weights as they were read: on some CPUs bitsandbytes packs them for its kernel at the first pass
    without gradient, and a later pass with one would silently have none."""
    module: Any
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def is_quantized(parameter: Any) -> bool:
    """True for a weight that bitsandbytes holds in 4 bits."""
    return getattr(parameter, "quant_state", None) is not None


def numel(parameter: Any) -> int:
    """Number of elements that a parameter represents, however it is stored."""
    return math.prod(parameter.quant_state.shape) if is_quantized(parameter) else int(parameter.numel())


def dequantized(parameter: Any) -> torch.Tensor:
    """The dequantized weight, as passes compute with it; unquantized weights are returned unchanged."""
    whole: torch.Tensor = parameter.detach()
    if is_quantized(parameter):
        from bitsandbytes.functional import dequantize_4bit

        whole = dequantize_4bit(parameter.data, parameter.quant_state)
    return whole


def plain_config(lm: Any) -> Any:
    """A model's configuration without its quantization, which merged weights do not have."""
    config = copy.deepcopy(lm.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def plain_copy(lm: Any, weights: dict[str, torch.Tensor]) -> PreTrainedModel:
    """An ordinary model of these weights, named as in `merged_tensors`, from a quantized model's configuration."""
    config = plain_config(lm)
    with torch.device("meta"):
        model: Any = type(lm)(config)
    model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()
    left = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if left:
        raise ModelError(f"the quantized model has no weights for '{left[0]}'")
    for place, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:  # computed from the configuration, and not in any state_dict
                kept = name not in module._non_persistent_buffers_set
                module.register_buffer(name, getattr(lm.get_submodule(place), name), persistent=kept)
    model.generation_config = copy.deepcopy(getattr(lm, "generation_config", None))
    if hasattr(
        lm, "_weight_conversions"
    ):  # transformers saves some weights under names that differ from those in memory
        model._weight_conversions = lm._weight_conversions
    whole: PreTrainedModel = model
    return whole


# ------------------------------------------------------------------------------------------------------------------ files
def save_quantization(quantization: str | None, folder: Path) -> None:
    if quantization is not None:
        (folder / FILE).write_text(json.dumps({"quantization": quantization}) + "\n")


def saved_quantization(folder: Path) -> str | None:
    """The quantization of an adapter's base; None: not by lmrl."""
    file = folder / FILE
    if not file.is_file():
        return None
    try:
        return str(json.loads(file.read_text())["quantization"])
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f'{file} is damaged: it should hold {{"quantization": "nf4"}}') from error
