"""Activations in autocast's precision.

Trained weights are float32, and autocast casts them for matrix products only. Activations between these would then be
float32: embeddings are, each RMSNorm's weight promotes its output, and every product casts its input again. Here
embeddings and norms output autocast's precision, as in a model with weights of that precision; sums within a norm stay
float32.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import nn
from torch.nn.functional import rms_norm

TAKEN = "hands_on_autocast"
"""Attribute that marks norm classes that already do so."""


def take_mixed_precision(model: nn.Module) -> None:
    """Make the embeddings and RMSNorms of a model output autocast's precision; without autocast nothing changes."""
    for part in model.modules():
        if isinstance(part, nn.Embedding) and _lowered not in part._forward_hooks.values():
            part.register_forward_hook(_lowered)
        elif (offset := _offset(part)) is not None:
            part.__class__ = _fused(type(part), offset)  # type: ignore[arg-type]


def _lowered(module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
    dtype = _autocast_dtype(output)
    return output if dtype is None else output.to(dtype)


def _autocast_dtype(tensor: torch.Tensor) -> torch.dtype | None:
    device = tensor.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def _offset(part: nn.Module) -> float | None:
    """The number that an RMSNorm (Zhang and Sennrich, arXiv 1910.07467) adds to its weight: usually 0, Gemma's 1; None for
    modules that do not compute one."""
    weight, eps = getattr(part, "weight", None), _eps(part)
    is_norm = type(part).__name__.endswith("RMSNorm") and not isinstance(part, nn.RMSNorm)
    if hasattr(part, TAKEN) or not is_norm or weight is None or eps is None or weight.is_meta:
        return None
    states = torch.linspace(-1, 2, weight.numel(), dtype=weight.dtype, device=weight.device).view(1, 1, -1)
    rounding = 1e-5 if weight.dtype.itemsize > 2 else 5e-2
    with torch.no_grad():
        try:
            wanted = part(states)
        except (TypeError, RuntimeError):  # it takes more arguments than states, such as a gate
            return None
        for offset in (0.0, 1.0):
            if torch.allclose(rms_norm(states, weight.shape, weight + offset, eps), wanted, atol=rounding):
                return offset
    return None


def _eps(part: nn.Module) -> float | None:
    return getattr(part, "variance_epsilon", getattr(part, "eps", None))


@cache
def _fused(kind: type[nn.Module], offset: float) -> type[nn.Module]:
    """A subclass of an RMSNorm that is one kernel under autocast, and unchanged otherwise."""

    def forward(self: Any, states: torch.Tensor) -> torch.Tensor:
        dtype = _autocast_dtype(states)
        if dtype is None:
            plain: torch.Tensor = kind.forward(self, states)
            return plain
        weight = self.weight + offset if offset else self.weight
        with torch.autocast(states.device.type, enabled=False):
            return rms_norm(states.to(dtype), weight.shape, weight.to(dtype), _eps(self))

    return type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__, TAKEN: True})
