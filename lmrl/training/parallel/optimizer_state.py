"""The entries of an optimizer's state as tensors that a checkpoint can hold."""

from __future__ import annotations

from typing import Any

import torch


def entry_to_tensor(key: str, value: Any) -> torch.Tensor:
    """An entry of a parameter's state as a tensor that shares no memory with another's (safetensors requires that)."""
    if not isinstance(value, torch.Tensor):
        return torch.tensor(value)  # bitsandbytes counts steps in a plain int
    return value.clone() if key.startswith("qmap") else value


def entry_from_tensor(key: str, value: torch.Tensor, device: torch.device, fused: bool = False) -> Any:
    """The entry again, on the parameter's device; the count of steps stays on the CPU, unless a fused kernel reads it
    (`fused`)."""
    if key == "step" and not value.is_floating_point():
        return int(value)
    return value.clone() if key == "step" and not fused else value.to(device, copy=True)


def fused_parameters(optimizer: torch.optim.Optimizer) -> set[torch.Tensor]:
    """Those that an optimizer updates in one kernel."""
    return {one for group in optimizer.param_groups if group.get("fused") for one in group["params"]}
