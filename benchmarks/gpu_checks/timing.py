"""Seconds and memory of a piece of work, and the FLOPs that it is worth."""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

PEAK = 989e12
"""FLOP/s: the dense bfloat16 rate of the H100 and H200."""


def matrix_parameters(policy: Any) -> int:
    """Parameters of a token's products: all of the layers, and the projection to the vocabulary."""
    own = sum(
        one.numel() for name, one in policy.causal_lm.named_parameters() if "layers." in name and ".lora_" not in name
    )
    return own + policy.vocabulary.numel()


def flops(policy: Any, tokens: int, squares: float, actions: int, trained: bool = True) -> float:
    """Of a forward and a backward pass. squares: sum of the squared lengths of the sequences. trained: all weights, else an adapter's."""
    config = policy.causal_lm.config
    layers = matrix_parameters(policy) - policy.vocabulary.numel()
    each = 6 if trained else 4
    attention = (
        6
        * config.num_hidden_layers
        * config.num_attention_heads
        * (config.hidden_size // config.num_attention_heads)
        * squares
    )
    return each * (layers * tokens + policy.vocabulary.numel() * actions) + attention


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize()


def seconds(options: argparse.Namespace, work: Callable[[], Any], repeats: int = 5, warm: int = 2) -> float:
    """Median time of a call, after some that are not counted."""
    times = []
    for number in range(warm + repeats):
        synchronize(options.device)
        started = time.perf_counter()
        work()
        synchronize(options.device)
        if number >= warm:
            times.append(time.perf_counter() - started)
    return statistics.median(times)


def reset_peak(options: argparse.Namespace) -> None:
    if options.device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_gib(options: argparse.Namespace) -> float | None:
    return round(torch.cuda.max_memory_allocated() / 2**30, 2) if options.device.type == "cuda" else None
