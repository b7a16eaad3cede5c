"""Adapters that are added in one kernel.

peft computes W x + s B A x (Hu et al., "LoRA", arXiv 2106.09685) with an operation for each factor, in the adapter's
precision: beside a bfloat16 base, x is cast to float32, and every layer that reads x keeps a copy of its own for the
backward pass. Here A and B are cast to the precision of W x, as autocast does, and the last product adds to W x: this
saves several passes over tensors of the output's size, and what is kept of x is x itself.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear


def take_lora(model: nn.Module) -> None:
    """Make the linear layers of a peft model add their adapters in this way. Other kinds of adapters stay as they are."""
    from peft.tuners.lora.layer import Linear

    for part in model.modules():
        if type(part) is Linear:
            part.__class__ = _fused()  # type: ignore[assignment]


@cache
def _fused() -> type[nn.Module]:
    from peft.tuners.lora.layer import Linear

    def forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        name = None if args or kwargs else plain_adapter(self)
        # With fewer tokens than the rank, it costs less to cast x than A and B.
        if name is None or x.numel() < self.r[name] * x.shape[-1]:
            return Linear.forward(self, x, *args, **kwargs)
        result: torch.Tensor = self.base_layer(x)
        down_RD, up_ER = (factor[name].weight.to(result.dtype) for factor in (self.lora_A, self.lora_B))
        rows_NR = linear(self.lora_dropout[name](x).to(result.dtype), down_RD).flatten(0, -2)
        return torch.addmm(result.flatten(0, -2), rows_NR, up_ER.T, alpha=self.scaling[name]).view(result.shape)

    return type("LoraLinear", (Linear,), {"forward": forward, "__module__": __name__})


def plain_adapter(layer: Any) -> str | None:
    """The adapter that a layer adds, if it is a single one that W x + s B A x describes."""
    if layer.disable_adapters or layer.merged:
        return None
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    if len(active) != 1 or active[0] in layer.lora_variant or layer.lora_B[active[0]].bias is not None:
        return None
    # ZeRO-3 gathers a weight when its own module is called.
    return None if hasattr(layer.lora_A[active[0]].weight, "ds_id") else str(active[0])
