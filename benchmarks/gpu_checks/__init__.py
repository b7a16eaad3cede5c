"""The measurements of gpu.py, one in each module of its name."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import Any

from gpu_checks.attention import attention
from gpu_checks.decode import decode
from gpu_checks.fsdp1 import fsdp1
from gpu_checks.head import head
from gpu_checks.learn import learn
from gpu_checks.parity import parity
from gpu_checks.step import step
from gpu_checks.update import update

MEASUREMENTS: dict[str, Callable[[argparse.Namespace], Iterator[dict[str, Any]]]] = {
    "parity": parity,
    "head": head,
    "attention": attention,
    "update": update,
    "decode": decode,
    "step": step,
    "fsdp1": fsdp1,
    "learn": learn,
}
