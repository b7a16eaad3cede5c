"""Agreement of margins with preferences, against arithmetic by hand."""

import math

import pytest
import torch

from lmrl.training.agreement import agreement, calibration_error


def test_agreement_by_hand():
    scores = agreement([2.0, -1.0, 0.0, 3.0])
    assert scores["accuracy"]["mean"] == pytest.approx((1 + 0 + 0.5 + 1) / 4)
    assert scores["margin"]["mean"] == 1.0
    assert agreement([0.1])["margin"]["mean"] == 0.1  # in double

    def sigmoid(x):
        return 1 / (1 + math.exp(-x))

    assert scores["brier"]["mean"] == pytest.approx(sum(sigmoid(-m) ** 2 for m in (2, -1, 0, 3)) / 4)
    assert scores["nll"]["mean"] == pytest.approx(sum(-math.log(sigmoid(m)) for m in (2, -1, 0, 3)) / 4)
    low, high = scores["ece"]["ci95"]
    assert 0 <= low <= high <= 1


def test_calibration_error_by_hand():
    confidence = torch.tensor([0.52, 0.54, 0.91, 1.0], dtype=torch.float64)
    wins = torch.tensor([1.0, 0.0, 1.0, 1.0], dtype=torch.float64)
    expected = (abs(1 - 0.52 - 0.54) + (1 - 0.91) + 0.0) / 4
    assert calibration_error(confidence, wins) == pytest.approx(expected)
