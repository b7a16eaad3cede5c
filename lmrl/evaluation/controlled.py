"""Differences between policies at equal length, or at equal any other metric.

Longer answers often score higher whatever they say. The difference of two scores of a prompt is regressed on the
difference of the two lengths; the intercept is the difference that remains at equal length.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lmrl.errors import RecipeError, counted
from lmrl.evaluation.t_distribution import t95, upper_tail

ROUNDING = 1e-10
"""Relative size of what an exact line leaves over."""
FEWEST = 4
"""Minimum number of prompts for estimating a slope."""


@dataclass
class Controlled:
    """A difference while the difference of another metric is held at 0."""

    mean: float
    ci95: list[float]
    p: float


def controlled(gaps_G: Sequence[float], others_G: Sequence[float], name: str) -> Controlled:
    """The mean of `gaps_G` where `others_G` is 0, one value of each per prompt. name: of the other metric, for
    messages.

    Least squares with the standard errors HC3 (MacKinnon and White, Journal of Econometrics 29, 1985), G - 2 degrees of
    freedom. Without spread in `others_G` there is nothing to control for, and the mean is returned as it is. Raises
    RecipeError for too few prompts.
    """
    y_G, x_G = np.asarray(gaps_G, float), np.asarray(others_G, float)
    count = len(y_G)
    if count < FEWEST:
        raise RecipeError(
            f"--control {name}: {counted(count, 'prompt')} cannot show its influence: take {FEWEST} or more"
        )
    columns = [np.ones(count)] + ([x_G] if np.ptp(x_G) > 0 else [])
    design_GP = np.stack(columns, 1)
    inverse_PG = np.linalg.pinv(design_GP)
    beta_P = inverse_PG @ y_G
    leverage_G = np.einsum("gp,pg->g", design_GP, inverse_PG)
    rest_G = y_G - design_GP @ beta_P
    for numbers in (beta_P[:1], rest_G):
        numbers[np.abs(numbers) <= ROUNDING * np.abs(y_G).max()] = 0.0
    residual_G = rest_G / np.maximum(1 - leverage_G, 1e-6)
    half_PG = inverse_PG * residual_G
    error = math.sqrt(float((half_PG @ half_PG.T)[0, 0]))
    df = count - design_GP.shape[1]
    mean = float(beta_P[0])
    p = 2 * upper_tail(abs(mean) / error, df) if error > 0 else float(mean == 0)
    return Controlled(mean, [mean - t95(df) * error, mean + t95(df) * error], p)
