"""Bradley-Terry ratings of several policies from their wins, ties and losses on the same prompts (Biometrika 39,
1952)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lmrl.seeding import stream

RESAMPLES = 500
PRIOR = 0.5
"""Imaginary ties added to every pair, so that the rating of a policy that always wins stays finite."""
ELO = 400 / math.log(10)
"""Points for a factor e of the odds: 400 points are odds of 10 to 1."""
STEPS, CLOSE = 1000, 1e-9
"""Steps of the fit at most, and the change of the logarithm of odds at which it ends."""


@dataclass
class Rating:
    """Strength of a policy in points; the first policy has 0."""

    key: str
    points: float
    ci95: list[float]
    """From resampled prompts."""


def ratings(keys: Sequence[str], scores_KG: np.ndarray) -> list[Rating]:
    """Ratings from the scores of each policy on each prompt, (K, G): the higher score wins, equal ones tie.

    Intervals are percentiles of ratings from resampled prompts, so they hold for new prompts.
    """
    wins_GKK = outcomes(scores_KG)
    rated = fit(wins_GKK.sum(0))
    rng, count = stream("ratings", len(keys), wins_GKK.shape[0]), wins_GKK.shape[0]
    drawn_BK = np.stack(
        [fit(wins_GKK[rng.integers(0, count, count)].sum(0)) for _ in range(RESAMPLES if count > 1 else 1)]
    )
    low_K, high_K = np.percentile(drawn_BK, (2.5, 97.5), axis=0)
    return [
        Rating(key, float(points), [float(low), float(high)])
        for key, points, low, high in zip(keys, rated, low_K, high_K, strict=True)
    ]


def outcomes(scores_KG: np.ndarray) -> np.ndarray:
    """Results of each pair on each prompt, (G, K, K): 1 for a win, 1/2 for a tie; 0 on the diagonal."""
    first_KKG, second_KKG = scores_KG[:, None, :], scores_KG[None, :, :]
    alike_KKG = np.isclose(first_KKG, second_KKG, rtol=1e-12, atol=1e-12)
    wins_KKG = np.where(alike_KKG, 0.5, (first_KKG > second_KKG).astype(float))
    wins_KKG[np.arange(len(scores_KG)), np.arange(len(scores_KG))] = 0.0
    moved: np.ndarray = np.moveaxis(wins_KKG, -1, 0)
    return moved


def fit(wins_KK: np.ndarray) -> np.ndarray:
    """Points of each policy, (K,): the maximum of the likelihood, which is concave, by Newton's method."""
    count = len(wins_KK)
    wins_KK = wins_KK + PRIOR / 2 * (1 - np.eye(count))
    games_KK, strength_K = wins_KK + wins_KK.T, np.zeros(count)
    for _ in range(STEPS):
        odds_KK = strength_K[:, None] - strength_K[None, :]
        chance_KK = 0.5 + 0.5 * np.tanh(odds_KK / 2)
        gradient_K = (wins_KK - games_KK * chance_KK).sum(1)
        weights_KK = games_KK * chance_KK * (1 - chance_KK)
        curvature_KK = np.diag(weights_KK.sum(1)) - weights_KK
        step_K = np.linalg.solve(curvature_KK[1:, 1:], gradient_K[1:])
        longest = np.abs(step_K).max()
        strength_K[1:] += step_K / max(longest, 1.0)  # where odds are long, a full step may overshoot
        if longest < CLOSE:
            break
    points_K: np.ndarray = ELO * strength_K
    return points_K
