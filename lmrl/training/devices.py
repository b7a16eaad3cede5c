"""The accelerators of this machine, assigned to runs in parallel."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import torch

from lmrl.accelerators import default_device

VISIBLE = {
    "cuda": "CUDA_VISIBLE_DEVICES",
    "xpu": "ZE_AFFINITY_MASK",
    "npu": "ASCEND_RT_VISIBLE_DEVICES",
    "mlu": "MLU_VISIBLE_DEVICES",
    "musa": "MUSA_VISIBLE_DEVICES",
}
"""The environment variable that limits which devices a process sees, by device type."""


def variable_of(kind: str, hip: str | None = None) -> str | None:
    """The environment variable for a device type (None: there is none). hip: ROCm's version; torch calls its devices
    cuda."""
    return "HIP_VISIBLE_DEVICES" if kind == "cuda" and hip else VISIBLE.get(kind)


def visible(variable: str, environment: Mapping[str, str], count: int) -> list[str]:
    """The `count` devices that this process sees, as the variable names them for its children."""
    named = [name.strip() for name in environment.get(variable, "").split(",") if name.strip()]
    return named[:count] if named else [str(number) for number in range(count)]


def deal(devices: Sequence[str], jobs: int, slot: int) -> list[str]:
    """The devices of one of `jobs` runs at a time: an equal part for each, or a shared one if there are more runs than
    devices."""
    share = len(devices) // jobs
    return list(devices[slot * share : (slot + 1) * share]) if share else [devices[slot % len(devices)]]


class Slots:
    """Places for `jobs` runs at a time, each with its own devices."""

    def __init__(self, jobs: int, variable: str | None = None, devices: Sequence[str] = ()):
        self.jobs, self.variable, self.devices = jobs, variable, devices
        self.taken: dict[str, int] = {}

    def take(self, name: str) -> dict[str, str]:
        """Give a run the first free place; returns the environment that limits it to its devices."""
        self.taken[name] = next(slot for slot in range(self.jobs) if slot not in self.taken.values())
        if self.variable is None or not self.devices or self.jobs == 1:
            return {}
        return {self.variable: ",".join(deal(self.devices, self.jobs, self.taken[name]))}

    def free(self, name: str) -> None:
        self.taken.pop(name, None)


def slots_here(jobs: int) -> Slots:
    """Places on this machine. A single run at a time, and runs on a CPU, see the same devices as this process."""
    kind = default_device().type
    variable = variable_of(kind, torch.version.hip)
    if variable is None:
        return Slots(jobs)
    return Slots(jobs, variable, visible(variable, os.environ, torch.accelerator.device_count()))
