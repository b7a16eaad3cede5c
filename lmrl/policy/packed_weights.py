"""Weights in the layout in which a CPU multiplies fastest, for decoding.

oneDNN multiplies blocked matrices, and blocks a weight again for every product: with the few rows of decoding that takes
as long as the product itself. Here it is done once. In float32 torch multiplies with MKL instead, which gains more: on an
AMD EPYC it takes 2 to 6 times as long with 4 rows, and 1.5 times with 64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeGuard

import torch
from torch import nn

from lmrl.process_memory import limit_bytes

SMALLEST = 100_000
"""Numbers in a weight below which the call costs more than it saves."""
SHARE = 8
"""Of the memory that this process may use, copies take at most one part in this many."""


def pack_weights(lm: nn.Module, autocast_dtype: torch.dtype | None) -> list[nn.Linear]:
    """Let the large linear layers of a model on a CPU multiply by packed copies of their weights, in autocast's
    precision if there is one; returns them, for `unpack_weights`.

    Not in passes with gradient. Results are those of the plain product: to the bit in bfloat16, up to the order of sums
    in float32. If a weight changes in place its layer multiplies by it again, but a change through `.data` is not seen.
    """
    dtypes = {part: autocast_dtype or part.weight.dtype for part in lm.modules() if _is_plain(part)}
    chosen = {layer: dtype for layer, dtype in dtypes.items() if _is_multiplied(dtype)}
    size = sum(layer.weight.numel() * dtype.itemsize for layer, dtype in chosen.items())
    if not size or size > limit_bytes() // SHARE:
        return []
    # All copies before any layer changes: memory may run out.
    for layer, product in [(layer, _packed_product(layer, dtype)) for layer, dtype in chosen.items()]:
        layer.forward = product  # type: ignore[assignment, method-assign]
    return list(chosen)


def unpack_weights(layers: list[nn.Linear]) -> None:
    """Back to the plain products."""
    for layer in layers:
        del layer.forward


def _is_plain(part: nn.Module) -> TypeGuard[nn.Linear]:
    """True for linear layers of a fair size on a CPU whose weights are neither quantized nor spread over processes."""
    if type(part) is not nn.Linear or type(part.weight) is not nn.Parameter or hasattr(part.weight, "ds_id"):
        return False
    if "forward" in vars(part):  # packed by another engine
        return False
    return part.weight.device.type == "cpu" and part.weight.numel() >= SMALLEST


def _is_multiplied(dtype: torch.dtype) -> bool:
    """True if oneDNN multiplies in this precision here."""
    if not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _packed_product(layer: nn.Linear, dtype: torch.dtype) -> Callable[[torch.Tensor], torch.Tensor]:
    """A linear layer's function, by a packed copy of its weight while that is the same and needs no gradient."""
    version = layer.weight._version
    weight = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach().to(dtype))
    bias = None if layer.bias is None else layer.bias.detach().to(dtype)

    def forward(x: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled() or layer.weight._version != version:
            return nn.Linear.forward(layer, x)
        result: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x.to(dtype), weight, bias, "none", [], "")
        return result

    return forward
