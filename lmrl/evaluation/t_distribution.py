"""Student's t distribution with any, also fractional, degrees of freedom."""

from __future__ import annotations

import math
from functools import lru_cache

EPSILON = 1e-15
"""Relative change at which the continued fraction has converged."""
NORMAL = 1.959963984540054
"""97.5 % quantile of the normal distribution."""


def upper_tail(t: float, df: float) -> float:
    """P(T > t) of Student's t with `df` degrees of freedom."""
    if math.isinf(t):
        return 0.0 if t > 0 else 1.0
    half = 0.5 * incomplete_beta(df / 2, 0.5, df / (df + t * t), t * t / (df + t * t))
    return half if t >= 0 else 1 - half


def t95(df: float) -> float:
    """Two-sided 95 % quantile: P(T > t) is 0.025."""
    return _t95(float(df))  # not a numpy scalar, which the cache would return for equal Python numbers


@lru_cache(maxsize=4096)
def _t95(df: float) -> float:
    """By Newton's method from the normal quantile, which converges from below on a convex tail."""
    t = NORMAL
    for _ in range(100):
        step = (upper_tail(t, df) - 0.025) / density(t, df)
        t += step
        if abs(step) < 1e-12 * t:
            break
    return t


def density(t: float, df: float) -> float:
    """Density of Student's t."""
    log_scale = math.lgamma((df + 1) / 2) - math.lgamma(df / 2) - 0.5 * math.log(df * math.pi)
    return math.exp(log_scale - (df + 1) / 2 * math.log1p(t * t / df))


def incomplete_beta(a: float, b: float, x: float, rest: float) -> float:
    """The regularized incomplete beta function I_x(a, b). rest: 1 - x, passed separately because it may be tiny.

    The continued fraction 26.5.8 of Abramowitz and Stegun, by Lentz's method.
    """
    if x <= 0:
        return 0.0
    if rest <= 0:
        return 1.0
    if x > (a + 1) / (a + b + 2):  # where the fraction of the other side converges faster
        return 1 - incomplete_beta(b, a, rest, x)
    log_front = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log(rest)
    c, d = 1.0, 1 / (1 - (a + b) * x / (a + 1))
    value, m = d, 1
    while True:
        for term in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            c, d = 1 + term / c, 1 / (1 + term * d)
            value *= c * d
        if abs(c * d - 1) < EPSILON or m > 10_000:
            return math.exp(log_front) * value / a
        m += 1
