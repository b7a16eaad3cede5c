"""An optimizer that skips what is not finite."""

import math

import torch

from lmrl.training.skipping_adamw import SkippingAdamW


def test_non_finite_updates_are_skipped_and_counted():
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = SkippingAdamW([{"params": [parameter], "lr": 0.1}])
    for gradient, expected in ((1.0, (0, 0)), (math.nan, (1, 1)), (math.inf, (2, 2)), (1.0, (2, 0))):
        parameter.grad = torch.full((2,), gradient)
        before = parameter.detach().clone()
        optimizer.step()
        assert torch.equal(before, parameter) == (not math.isfinite(gradient))
        assert (optimizer.skipped, optimizer.skipped_in_a_row) == expected
