"""The kernels between two products with the vocabulary, by Triton's interpreter, against the plain computation."""

import importlib.util
import os
import subprocess
import sys

import pytest

COMPARISON = """
import copy, torch
from lmrl.policy import logprobs, logprobs_kernels as kernels

torch.manual_seed(0)
kernels.BLOCK = 64
rows, size = 7, 150
for first in (0, 150):  # slices with and without the target
    logits, targets = 3 * torch.randn(rows, size), torch.randint(0, 300, (rows,)) - first
    plain = logprobs.Totals(torch.randn(rows), torch.rand(rows) + 0.1, torch.randn(rows), torch.zeros(rows))
    fused = copy.deepcopy(plain)
    expected = logprobs.add_slice(logits.clone(), targets, plain)
    found = kernels.add_slice(logits.clone(), targets, fused, torch.float32)
    for name in ("top", "total", "weighted", "picked"):
        torch.testing.assert_close(getattr(fused, name), getattr(plain, name), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    lse, entropy, slope = logits.logsumexp(1), torch.rand(rows), torch.randn(rows)
    for other in (None, torch.randn(rows)):
        arguments = (targets, lse, entropy, slope, other, 0.7)
        expected = logprobs.slice_gradient(logits.clone(), *arguments)
        found = kernels.slice_gradient(logits.clone(), *arguments)
        torch.testing.assert_close(found.float(), expected, rtol=1e-2, atol=1e-2)
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_kernels_equal_the_plain_computation():
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-c", COMPARISON], check=True, env=environment, timeout=120)
