"""Agreement of a reward model with preferences: accuracy, margin, calibration."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from lmrl.evaluation.scoring import Scores
from lmrl.evaluation.statistics import UNIT, UNLIMITED, bootstrap, summarize

COLUMNS = ["accuracy", "margin", "ece", "brier"]
"""Metrics of held-out pairs in the closing table; see `agreement`."""
ECE_BINS = 10
BOOTSTRAP = 1000


def agreement(margins: Sequence[float]) -> Scores:
    """Agreement of a reward model's margins (chosen minus rejected) with held-out preferences.

    accuracy: share of pairs with the chosen completion above (a tie counts half). margin: mean margin. ece: expected
    calibration error of the probability sigmoid(margin), in ten bins of equal width, biased upwards if there are few
    pairs (Guo et al., arXiv 1706.04599); its interval is a bootstrap over pairs. brier: mean squared error of that
    probability (0.25: a coin). nll: its negative log-likelihood, the training loss without centring.
    """
    margins_N = torch.tensor(margins, dtype=torch.float64)
    wins_N = (margins_N > 0).double() + 0.5 * (margins_N == 0).double()
    confidence_N = torch.sigmoid(margins_N.abs())
    return {
        "accuracy": summarize(wins_N.tolist(), limits=UNIT, unit="pair"),
        "margin": summarize(margins_N.tolist(), limits=UNLIMITED, unit="pair"),
        "ece": bootstrap(lambda rows: calibration_error(confidence_N[rows], wins_N[rows]), len(margins), BOOTSTRAP),
        "brier": summarize(torch.sigmoid(-margins_N).square().tolist(), limits=UNIT, unit="pair"),
        "nll": summarize((-torch.nn.functional.logsigmoid(margins_N)).tolist(), limits=(0.0, math.inf), unit="pair"),
    }


def calibration_error(confidence_N: torch.Tensor, wins_N: torch.Tensor) -> float:
    """Expected calibration error of confidences in [0.5, 1]: mean gap between confidence and share of wins in a bin."""
    bins_N = ((confidence_N - 0.5) * 2 * ECE_BINS).long().clamp(max=ECE_BINS - 1)
    gaps = torch.zeros(ECE_BINS, dtype=torch.float64).index_add_(0, bins_N, wins_N - confidence_N)
    return float(gaps.abs().sum()) / len(confidence_N)
