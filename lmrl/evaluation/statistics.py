"""Means with 95 % intervals, for values that come in clusters: several samples of a prompt, episodes of a start state.

Values of one cluster resemble each other, so 20 prompts with 32 samples each say less about new prompts than 640
prompts would. `summarize` takes the interval from the means of clusters, by the first of these rules that applies:

- values with two limits, such as successes (0 or 1): Wilson's interval with the effective number of values, that is the
  number of independent ones that would have the same variance (`wilson`; all alike: `unanimous`);
- skewed values without limits: the bootstrap-t over clusters (`bootstrap_t`);
- otherwise Student's t with a cluster-robust variance and as many degrees of freedom as it has (`between_clusters`).

benchmarks/coverage.py measures how often these intervals hold what they promise, and how wide they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from lmrl.seeding import stream

Limits = tuple[float, float]
UNLIMITED: Limits = (-math.inf, math.inf)
UNIT: Limits = (0.0, 1.0)

# Two-sided 95 % quantiles of Student's t; beyond 30 degrees of freedom 1.96 + 2.4 / df is right to three digits.
_T95 = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131]
_T95 += [2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042]
_INVERSE_DF = 1 / np.arange(len(_T95), 0, -1.0)

ROUNDING = 1e-28
"""Variance that equal values in [0, 1] may have by rounding."""
RESAMPLES = 999
BOOTSTRAP_CLUSTERS = 8
"""With fewer, a resample has too few distinct clusters for a variance of its own."""


def summarize(
    values: Sequence[float],
    clusters: Sequence[Hashable] | None = None,
    limits: Limits | None = None,
    fixed: bool = False,
    unit: str = "value",
) -> dict[str, Any]:
    """`{"mean", "ci95": [low, high], "n", "clusters", "holds_for"}` of values: their mean and its 95 % interval.

    clusters: the prompt or start state of each value (None: values are independent). limits: the lowest and highest
    value that is possible (None: 0 and 1 where every value is one of these, otherwise none); a value outside refutes
    them. fixed: the clusters are all there are, so the interval is for new samples of them and not for new clusters.
    unit: the name of a cluster, for `holds_for`, which says what the interval generalises to.

    A single value without limits has an interval of width 0: nothing is known about its spread. Raises ValueError where
    there is no value, or where values and clusters differ in number.
    """
    data = Clustered.of(values, clusters)
    low, high = limits or (UNIT if data.is_binary else UNLIMITED)
    if not (low <= data.lowest and data.highest <= high):
        low, high = UNLIMITED
    fixed = fixed or data.clusters == 1
    # Without a second sample of any cluster, the spread between clusters stands in: it holds that of samples too.
    within = fixed and data.values > data.clusters
    if math.isfinite(high - low):
        below, above = limited_interval(data.scaled(low, high), within)
        bounds = low + below * (high - low), low + above * (high - low)
    else:
        bounds = unlimited_interval(data, within)
    return {
        "mean": data.mean,
        "ci95": [max(bounds[0], low), min(bounds[1], high)],
        "n": data.values,
        "clusters": data.clusters,
        "holds_for": holds_for(data.clusters, fixed, unit),
    }


def limited_interval(data: Clustered, within: bool) -> tuple[float, float]:
    """Of values in [0, 1]. within: for new samples of the same clusters."""
    variance, df = within_clusters(data) if within else between_clusters(data)
    share = min(max(data.mean, 0.0), 1.0)
    if share * (1 - share) <= ROUNDING or variance <= ROUNDING:
        return unanimous(share, data.values if within else data.clusters)
    effective = share * (1 - share) / variance
    if not within and not data.is_independent:
        rare = rare_clusters(data)
        df = min(df, 0.5 + 2 * rare)
        if data.is_binary:
            effective = cautious(effective, data, rare)
    return wilson(share, effective, t95(df))


def unlimited_interval(data: Clustered, within: bool) -> tuple[float, float]:
    """Of any values. within: for new samples of the same clusters."""
    variance, df = within_clusters(data) if within else between_clusters(data)
    if not within and is_skewed(data):
        return bootstrap_t(data, variance)
    half = t95(df) * math.sqrt(variance)
    return data.mean - half, data.mean + half


def holds_for(clusters: int, fixed: bool, unit: str) -> str:
    """What an interval generalises to."""
    if not fixed:
        return f"new {unit}s"
    return f"new samples of this {unit}" if clusters == 1 else f"new samples of these {unit}s"


@dataclass
class Clustered:
    """Values by cluster. N: values, G: clusters, B: resamples."""

    sums_G: np.ndarray
    squares_G: np.ndarray
    """Of each cluster, the sum of squared differences from its mean."""
    sizes_G: np.ndarray
    mean: float
    lowest: float
    highest: float
    is_binary: bool
    """True if every value is 0 or 1."""

    @classmethod
    def of(cls, values: Sequence[float], clusters: Sequence[Hashable] | None) -> Clustered:
        values_N = np.asarray(values, dtype=float)
        if not len(values_N):
            raise ValueError("no values to summarize")
        rows_N = np.arange(len(values_N)) if clusters is None else _numbered(clusters)
        if len(rows_N) != len(values_N):
            raise ValueError(f"{len(values_N)} values, but clusters for {len(rows_N)}")
        sizes_G = np.bincount(rows_N)
        sums_G = np.bincount(rows_N, values_N)
        apart_N = values_N - (sums_G / sizes_G)[rows_N]
        return cls(
            sums_G,
            np.bincount(rows_N, apart_N**2),
            sizes_G,
            math.fsum(values_N) / len(values_N),
            float(values_N.min()),
            float(values_N.max()),
            bool(np.all((values_N == 0) | (values_N == 1))),
        )

    @property
    def values(self) -> int:
        return int(self.sizes_G.sum())

    @property
    def clusters(self) -> int:
        return len(self.sizes_G)

    @property
    def is_independent(self) -> bool:
        """True if values are 0/1 and each a cluster: their variance then follows from their mean."""
        return self.is_binary and self.values == self.clusters

    @property
    def shares_G(self) -> np.ndarray:
        """Of all values, the share in each cluster."""
        return self.sizes_G / self.values

    @property
    def means_G(self) -> np.ndarray:
        means_G: np.ndarray = self.sums_G / self.sizes_G
        return means_G

    def scaled(self, low: float, high: float) -> Clustered:
        """The same values as shares of the way from `low` to `high`."""
        span = high - low
        return replace(
            self,
            sums_G=(self.sums_G - low * self.sizes_G) / span,
            squares_G=self.squares_G / span**2,
            mean=(self.mean - low) / span,
            is_binary=self.is_binary and (low, high) == UNIT,
            lowest=(self.lowest - low) / span,
            highest=(self.highest - low) / span,
        )


def _numbered(clusters: Sequence[Hashable]) -> np.ndarray:
    """Clusters as numbers from 0, in order of appearance."""
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(cluster, len(numbers)) for cluster in clusters])


# ------------------------------------------------------------------------------------------------------------ variances
def between_clusters(data: Clustered) -> tuple[float, float]:
    """Variance of the mean over new clusters, and its degrees of freedom.

    The bias-reduced cluster-robust variance (CR2) and Satterthwaite's degrees of freedom of Bell and McCaffrey, "Bias
    reduction in standard errors for linear regression with multi-stage samples", Survey Methodology 28 (2002), for a
    regression on a constant. With G clusters of one size: the variance of their means over G, and G - 1.
    """
    shares_G = data.shares_G
    if len(shares_G) < 2:
        return 0.0, 1.0
    squares_G = (shares_G * (data.means_G - data.mean)) ** 2
    ratios_G = shares_G**2 / (1 - shares_G)
    df = 1 / ((shares_G**2).sum() + ratios_G.sum() ** 2 - (ratios_G**2).sum())
    return float((squares_G / (1 - shares_G)).sum()), float(max(df, 1.0))


def within_clusters(data: Clustered) -> tuple[float, float]:
    """Variance of the mean over new samples of the same clusters, and its Satterthwaite degrees of freedom.

    The stratified estimate (Cochran, Sampling Techniques, 1977, section 5.4). Clusters of one value take the pooled
    variance of the others.
    """
    spare_G = data.sizes_G - 1
    pooled = data.squares_G.sum() / spare_G.sum()
    spreads_G = np.where(spare_G > 0, data.squares_G / np.maximum(spare_G, 1), pooled)
    parts_G = data.shares_G**2 * spreads_G / data.sizes_G
    variance = float(parts_G.sum())
    if variance == 0:
        return 0.0, float(spare_G.sum())
    return variance, float(variance**2 / (parts_G**2 / np.maximum(spare_G, 1)).sum())


# ------------------------------------------------------------------------------------------------------------ intervals
def t95(df: float) -> float:
    """Two-sided 95 % quantile of Student's t; between whole degrees of freedom interpolated in 1 / df."""
    if df > len(_T95):
        return 1.96 + 2.4 / df
    return float(np.interp(1 / df, _INVERSE_DF, _T95[::-1]))


def wilson(share: float, effective: float, quantile: float) -> tuple[float, float]:
    """Wilson's score interval (JASA 22, 1927) of a share of `effective` independent values.

    With the effective number from a survey's variance and a t quantile it holds better than Wald, logit and exact
    intervals in Franco et al., "Comparative study of confidence intervals for proportions in complex sample surveys",
    Journal of Survey Statistics and Methodology 7 (2019).
    """
    weight = quantile**2 / effective
    centre = (share + weight / 2) / (1 + weight)
    half = math.sqrt(weight * share * (1 - share) + weight**2 / 4) / (1 + weight)
    return centre - half, centre + half


def unanimous(share: float, count: int) -> tuple[float, float]:
    """Interval of a mean in [0, 1] whose `count` independent parts are all alike.

    None of them differs, so the share that does is at most Wilson's upper bound for 0 of `count` (the rule of three,
    with a margin), and these may lie anywhere.
    """
    most = wilson(0.0, count, t95(max(count - 1, 1)))[1]
    return share - most * share, share + most * (1 - share)


def rare_clusters(data: Clustered) -> float:
    """Effective number of clusters that hold the rarer outcome: (sum k)^2 / sum k^2 of the amounts k they hold.

    How strongly values in [0, 1] cluster shows in these alone, so the variance has about two degrees of freedom for
    each, however many clusters without the outcome there are. benchmarks/coverage.py chose the numbers of this rule and
    of `cautious`: with less, coverage is lost.
    """
    amounts_G = data.sums_G if data.mean <= 0.5 else data.sizes_G - data.sums_G
    return float(amounts_G.sum() ** 2 / (amounts_G**2).sum())


def cautious(effective: float, data: Clustered, rare: float) -> float:
    """The effective number of 0/1 values, drawn towards that of an intra-cluster correlation of 1/2.

    The prior weighs as much as half a cluster with the rarer outcome: two such clusters with one success each are
    little evidence that successes do not come in clusters. In logarithms, because the number is a ratio of variances.
    """
    equal = 1 / float((data.shares_G**2).sum())
    prior = equal / (0.5 + 0.5 * equal / data.values)
    return math.exp((rare * math.log(effective) + 0.5 * math.log(prior)) / (rare + 0.5))


def is_skewed(data: Clustered) -> bool:
    """True if cluster means are so skewed that a t interval misses: surely skewed, and few for that.

    The t interval's error on one side is about 0.08 skewness / sqrt(G) (Hall, The Bootstrap and Edgeworth Expansion,
    1992).
    """
    count = len(data.sizes_G)
    if count < BOOTSTRAP_CLUSTERS:
        return False
    apart_G = data.means_G - data.means_G.mean()
    deviation = math.sqrt((apart_G**2).mean())
    if deviation <= 1e-12 * max(abs(data.mean), 1e-300):
        return False
    skewness = abs(float((apart_G**3).mean())) / deviation**3
    return skewness > max(math.sqrt(6 / count), 0.1 * math.sqrt(count))


def bootstrap_t(data: Clustered, variance: float) -> tuple[float, float]:
    """The studentised bootstrap over clusters (Hall, Annals of Statistics 16, 1988): the same draws every time."""
    count = len(data.sizes_G)
    chosen_BG = stream("bootstrap-t", count).integers(count, size=(RESAMPLES, count))
    sizes_BG, sums_BG = data.sizes_G[chosen_BG], data.sums_G[chosen_BG]
    means_B = sums_BG.sum(1) / sizes_BG.sum(1)
    shares_BG = sizes_BG / sizes_BG.sum(1, keepdims=True)
    squares_BG = (shares_BG * (sums_BG / sizes_BG - means_B[:, None])) ** 2
    errors_B = np.sqrt((squares_BG / (1 - shares_BG)).sum(1))
    moved_B = errors_B > 0
    low, high = np.quantile((means_B - data.mean)[moved_B] / errors_B[moved_B], [0.025, 0.975])
    error = math.sqrt(variance)
    return float(data.mean - high * error), float(data.mean - low * error)


def bootstrap(statistic: Callable[[np.ndarray], float], count: int, draws: int) -> dict[str, Any]:
    """`{"mean", "ci95": [low, high], "n"}` of a statistic of `count` rows that is no mean: a percentile interval.

    statistic: called with row numbers, all of them first and then `draws` times as many drawn with replacement.
    """
    rng = stream("bootstrap", count)
    values = [statistic(rng.integers(count, size=count)) for _ in range(draws)]
    low, high = np.quantile(values, [0.025, 0.975]).tolist()
    return {"mean": statistic(np.arange(count)), "ci95": [low, high], "n": count}
