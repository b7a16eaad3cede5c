"""Means with intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from lmrl.seeding import stream

# Two-sided 95 % quantiles of Student's t; beyond 30 degrees of freedom 1.96 + 2.4 / df is right to three digits.
_T95 = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131]
_T95 += [2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042]


def summarize(values: Sequence[float]) -> dict[str, Any]:
    """`{"mean", "ci95": [low, high], "n"}`: a Student-t interval for the mean of independent values."""
    count = len(values)
    mean = math.fsum(values) / count
    if count < 2:
        return {"mean": mean, "ci95": [mean, mean], "n": count}
    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    quantile = _T95[count - 2] if count <= 31 else 1.96 + 2.4 / (count - 1)
    half = quantile * math.sqrt(variance / count)
    return {"mean": mean, "ci95": [mean - half, mean + half], "n": count}


def bootstrap(statistic: Callable[[np.ndarray], float], count: int, draws: int) -> dict[str, Any]:
    """`{"mean", "ci95": [low, high], "n"}` of a statistic of `count` rows that is no mean: a percentile interval.

    statistic: called with row numbers, all of them first and then `draws` times as many drawn with replacement.
    """
    rng = stream("bootstrap", count)
    values = [statistic(rng.integers(count, size=count)) for _ in range(draws)]
    low, high = np.quantile(values, [0.025, 0.975]).tolist()
    return {"mean": statistic(np.arange(count)), "ci95": [low, high], "n": count}
