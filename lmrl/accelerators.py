"""The accelerator of this machine: CUDA, ROCm, XPU, NPU or whatever torch was built for."""

from __future__ import annotations

import torch


def default_device() -> torch.device:
    """The accelerator where there is one, else the CPU."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def has_memory() -> bool:
    """True if there is an accelerator with memory of its own, which is counted, and with processes that can meet on it. Apple's
    MPS has neither."""
    return default_device().type not in ("cpu", "mps")
