"""Means over processes; here there is one."""

import torch

from lmrl import distributed


def test_means_of_many_numbers_are_exact():
    """In float32, 0.1 added up a million times is 100,958."""
    tenth = torch.tensor(0.1)
    assert distributed.mean(tenth.expand(1_000_000)) == float(tenth.double())
    assert distributed.mean([1.0, 2.0, 6.0]) == 3.0 and distributed.mean([]) == 0.0
