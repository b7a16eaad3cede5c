"""Trials of a model's abilities: rounding passes, a mistake does not."""

import math

import pytest
import torch

from lmrl.policy.probes import _agrees


@pytest.mark.parametrize(
    ("autocast", "gap", "mistake", "agrees"),
    [
        (None, 5e-5, 2.0, True),
        (None, 2e-4, 2.0, False),
        (torch.bfloat16, 0.04, 0.04, True),  # too small a difference to tell
        (torch.bfloat16, 0.1, 2.0, True),
        (torch.bfloat16, 0.4, 2.0, False),
        (torch.bfloat16, 2.0, 2.0, False),
    ],
)
def test_bfloat16_is_judged_relative_to_a_mistake(tiny_policy, monkeypatch, autocast, gap, mistake, agrees):
    monkeypatch.setattr(tiny_policy, "autocast_dtype", autocast)
    assert _agrees(tiny_policy, gap, mistake) is agrees
    assert not _agrees(tiny_policy, math.nan, mistake)
