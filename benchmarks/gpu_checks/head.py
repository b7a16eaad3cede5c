"""Log-probabilities over a whole vocabulary, against full logits and plain products."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import torch

from gpu_checks.building import VOCABULARY
from gpu_checks.timing import reset_peak, seconds


def head(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    from lmrl.policy.logprobs import token_logprobs

    rows, width, vocabulary = (64, 32, 512) if options.tiny else (8192, 1536, VOCABULARY)
    torch.manual_seed(0)
    hidden = torch.randn(rows, width, device=options.device, dtype=torch.bfloat16, requires_grad=True)
    weight = (0.05 * torch.randn(vocabulary, width, device=options.device)).requires_grad_()
    targets = torch.randint(vocabulary, (rows,), device=options.device)
    product = 2 * rows * width * vocabulary
    half = weight.detach().bfloat16()[:8192]
    plain = seconds(options, lambda: [hidden.detach() @ half.T for _ in range(8)], 10) / 8
    yield {
        "way": "a plain product of 8,192 columns",
        "seconds": plain,
        "tflops": 2 * rows * width * len(half) / plain / 1e12,
    }
    if options.device.type == "cuda":
        wide = (
            seconds(options, lambda: [torch.mm(hidden.detach(), half.T, out_dtype=torch.float32) for _ in range(8)], 10)
            / 8
        )
        yield {
            "way": "the same with its result in float32",
            "seconds": wide,
            "tflops": 2 * rows * width * len(half) / wide / 1e12,
        }
    coefficients = torch.randn(rows, device=options.device)

    def chunked(slice_size: int, entropy: bool = False, frozen: bool = False) -> None:
        hidden.grad = weight.grad = None
        matrix = weight.detach() if frozen else weight
        with torch.autocast(options.device.type, dtype=torch.bfloat16):
            logprobs, entropies = token_logprobs(hidden, matrix, None, targets, 1.0, slice_size)
        (logprobs * coefficients + (entropies * 0.01 if entropy else 0.0)).sum().backward()

    def full() -> None:
        hidden.grad = weight.grad = None
        with torch.autocast(options.device.type, dtype=torch.bfloat16):
            logits = hidden @ weight.T
        logprobs = logits.float().log_softmax(-1).gather(1, targets[:, None])[:, 0]
        (logprobs * coefficients).sum().backward()

    def forward_only() -> None:
        with torch.no_grad(), torch.autocast(options.device.type, dtype=torch.bfloat16):
            token_logprobs(hidden, weight, None, targets)

    sizes = (128,) if options.tiny else (8192, 16384, 32768)
    ways = {f"chunks of {size:,}": lambda size=size: chunked(size) for size in sizes}
    ways |= {"chunks, with an entropy term": lambda: chunked(sizes[0], entropy=True)}
    ways |= {
        "chunks, the matrix frozen": lambda: chunked(sizes[0], frozen=True),
        "chunks, forward alone": forward_only,
        "full logits": full,
    }
    counted = {"chunks, forward alone": 1, "chunks, the matrix frozen": 2}
    for name, work in ways.items():
        reset_peak(options)
        before = torch.cuda.memory_allocated() if options.device.type == "cuda" else 0
        taken = seconds(options, work, 5)
        peak = round((torch.cuda.max_memory_allocated() - before) / 2**30, 2) if options.device.type == "cuda" else None
        yield {"way": name, "seconds": taken, "tflops": counted.get(name, 3) * product / taken / 1e12, "peak_gib": peak}
