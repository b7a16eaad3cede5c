"""The accelerator of this machine: CUDA, ROCm, XPU, NPU or whatever torch was built for."""

from __future__ import annotations

import os
from typing import Literal

import torch


def default_device() -> torch.device:
    """The accelerator if there is one, else the CPU."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor on a device. A copy from the CPU to CUDA joins the queue there, and does not wait for what is before it."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def has_memory() -> bool:
    """True if there is an accelerator with its own memory accounting and with collectives between processes. Apple's
    MPS has neither."""
    return default_device().type not in ("cpu", "mps")


def quieten_deepspeed() -> None:
    """Tell deepspeed, which peft and accelerate import if it is installed, where there is no accelerator: it warns
    otherwise."""
    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def default_precision(device: torch.device) -> Literal["float32", "bfloat16"]:
    """The precision of passes if the recipe sets none: bfloat16 on an accelerator that supports it, else float32."""
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    return "bfloat16" if device.type in ("xpu", "npu") else "float32"
