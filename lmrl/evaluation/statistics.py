"""Means with 95 % intervals, for values that come in clusters: several samples of a prompt, episodes of a start state.

Values of one cluster resemble each other, so 20 prompts with 32 samples each say less about new prompts than 640
prompts would. `summarize` takes the interval from the means of clusters, by the first of these rules that applies:

- values with two limits, such as successes (0 or 1): Wilson's interval with the effective number of values, that is the
  number of independent ones that would have the same variance (`wilson`; all alike: `unanimous`);
- skewed values without limits, unless they are differences of pairs: the bootstrap-t over clusters (`skewed_ts`);
- otherwise Student's t with a cluster-robust variance and as many degrees of freedom as it has (`between_clusters`).

benchmarks/coverage.py measures the coverage of these intervals, and how wide they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from lmrl.evaluation.t_distribution import t95, upper_tail
from lmrl.seeding import stream

Limits = tuple[float, float]
UNLIMITED: Limits = (-math.inf, math.inf)
UNIT: Limits = (0.0, 1.0)

ROUNDING = 1e-28
"""Variance that equal values in [0, 1] may have from rounding."""
TIE = 1e-12
"""Difference, relative to large values, that equal scores may have from rounding: .7 + .2 + .1 is less than 1."""
RESAMPLES = 999
BOOTSTRAP_CLUSTERS = 8
"""With fewer, a resample has too few distinct clusters for a variance of its own."""


def summarize(
    values: Sequence[float],
    clusters: Sequence[Hashable] | None = None,
    limits: Limits | None = None,
    fixed: bool = False,
    unit: str = "value",
    paired: bool = False,
) -> dict[str, Any]:
    """`{"mean", "ci95": [low, high], "n", "clusters", "holds_for"}` of values: their mean and its 95 % interval.

    clusters: the prompt or start state of each value (None: values are independent). limits: the lowest and highest
    possible value (None: 0 and 1 if every value is one of these, otherwise none); a value outside disables them.
    fixed: True if these are all the clusters, so that the interval holds for new samples of them, not for new clusters.
    unit: the name of a cluster, for `holds_for`, which says what the interval generalises to.
    paired: True for differences of two scores each. Between equal policies these are symmetric, however skewed the
    scores, and the bootstrap-t would take a long tail that shows on one side by chance for skewness.

    A single value without limits has an interval of width 0: nothing is known about its spread. Raises ValueError if
    there is no value, or if values and clusters differ in number.
    """
    data = Clustered.of(values, clusters)
    low, high = limits_for(data, limits)
    fixed = fixed or data.clusters == 1
    within = is_within(data, fixed)
    if math.isfinite(high - low):
        below, above = limited_interval(data.scaled(low, high), within)
        bounds = low + below * (high - low), low + above * (high - low)
    else:
        bounds = unlimited_interval(data, within, paired)
    return {
        "mean": data.mean,
        "ci95": [max(bounds[0], low), min(bounds[1], high)],
        "n": data.values,
        "clusters": data.clusters,
        "holds_for": holds_for(data.clusters, fixed, unit),
    }


def p_value(
    values: Sequence[float],
    clusters: Sequence[Hashable] | None = None,
    limits: Limits | None = None,
    fixed: bool = False,
    null: float = 0.0,
) -> float:
    """Two-sided p-value of the hypothesis that the mean, as of differences, is `null`; other arguments and errors as for
    `summarize`.

    It inverts the interval of `summarize(paired=True)`: below 0.05 if that excludes `null`. A single value proves
    nothing: 1.
    """
    data = Clustered.of(values, clusters)
    low, high = limits_for(data, limits)
    within = is_within(data, fixed or data.clusters == 1)
    variance, df = within_clusters(data) if within else between_clusters(data)
    if data.mean == null or data.values == 1:
        return 1.0
    if math.isfinite(high - low):
        share = (null - low) / (high - low)
        return limited_p_value(data.scaled(low, high), share, variance / (high - low) ** 2, df, within)
    if variance == 0:
        return 0.0
    return 2 * upper_tail(abs(data.mean - null) / math.sqrt(variance), df)


def limited_p_value(data: Clustered, null: float, variance: float, df: float, within: bool) -> float:
    """The p-value of values in [0, 1] for the mean `null`: `limited_interval` inverted."""
    share = min(max(data.mean, 0.0), 1.0)
    if share * (1 - share) <= ROUNDING or variance <= ROUNDING:
        # `unanimous` reaches as far as `null` with the quantile q, if q^2 / (count + q^2) is this part of the way.
        part = abs(share - null) / (share if share > null else 1 - share)
        count = data.values if within else data.clusters
        return 2 * upper_tail(math.sqrt(count * part / (1 - part)) if part < 1 else math.inf, max(count - 1, 1))
    effective, df = effective_number(data, share, variance, df, within)
    if null * (1 - null) == 0:
        return 0.0
    return 2 * upper_tail(abs(share - null) * math.sqrt(effective / (null * (1 - null))), df)


def is_tie(one: float, other: float) -> bool:
    """True if two scores are equal but for rounding."""
    return math.isclose(one, other, rel_tol=TIE, abs_tol=TIE)


def are_within(values: Iterable[float], low: float, high: float) -> bool:
    """True if every value is within the limits, but for rounding."""
    return all(low <= value <= high or is_tie(value, low) or is_tie(value, high) for value in values)


def are_binary(values: Iterable[float]) -> bool:
    """True if every value is 0 or 1, but for rounding."""
    return all(is_tie(value, 0) or is_tie(value, 1) for value in values)


def limits_for(data: Clustered, limits: Limits | None) -> Limits:
    """The limits of these values: 0 and 1 if every value is one of them, and none if a value lies
    outside."""
    low, high = limits or (UNIT if data.is_binary else UNLIMITED)
    return (low, high) if are_within([data.lowest, data.highest], low, high) else UNLIMITED


def is_within(data: Clustered, fixed: bool) -> bool:
    """True if the spread within clusters is what counts, because they are fixed. If none has a second sample, the
    spread between clusters is used instead, which includes that of samples."""
    return fixed and data.values > data.clusters


def limited_interval(data: Clustered, within: bool) -> tuple[float, float]:
    """The interval of values in [0, 1]. within: for new samples of the same clusters."""
    variance, df = within_clusters(data) if within else between_clusters(data)
    share = min(max(data.mean, 0.0), 1.0)
    if share * (1 - share) <= ROUNDING or variance <= ROUNDING:
        return unanimous(share, data.values if within else data.clusters)
    effective, df = effective_number(data, share, variance, df, within)
    return wilson(share, effective, t95(df))


def effective_number(data: Clustered, share: float, variance: float, df: float, within: bool) -> tuple[float, float]:
    """For values in [0, 1]: the number of independent ones with the same variance of the mean, and degrees of
    freedom."""
    effective = share * (1 - share) / variance
    if not within and not data.is_independent:
        rare = rare_clusters(data)
        df = min(df, 0.5 + 2 * rare)
        if data.is_binary:
            effective = cautious(effective, data, rare)
    return effective, df


def unlimited_interval(data: Clustered, within: bool, paired: bool) -> tuple[float, float]:
    """The interval of values without limits. within: for new samples of the same clusters. paired: see `summarize`."""
    variance, df = within_clusters(data) if within else between_clusters(data)
    error, ts_B = math.sqrt(variance), None if within or paired else skewed_ts(data, variance)
    if ts_B is not None:
        low, high = np.quantile(ts_B, [0.025, 0.975])
        return float(data.mean - high * error), float(data.mean - low * error)
    half = t95(df) * error
    return data.mean - half, data.mean + half


def holds_for(clusters: int, fixed: bool, unit: str) -> str:
    """The population that an interval generalises to."""
    if not fixed:
        return f"new {unit}s"
    return f"new samples of this {unit}" if clusters == 1 else f"new samples of these {unit}s"


@dataclass
class Clustered:
    """Values by cluster. N: values, G: clusters, B: resamples."""

    sums_G: np.ndarray
    squares_G: np.ndarray
    """The sum of squared differences from its mean, for each cluster."""
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
        whole_N = np.rint(values_N)  # what a sum of rewards is but for rounding, which would take it over its limits
        values_N = np.where(np.abs(values_N - whole_N) <= TIE, whole_N, values_N)
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
        """The share of all values in each cluster."""
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
    """Interval of a mean in [0, 1] whose `count` independent parts are all equal.

    None of them differs, so the share that could is at most Wilson's upper bound for 0 of `count` (the rule of three,
    with a margin), and these may lie anywhere.
    """
    most = wilson(0.0, count, t95(max(count - 1, 1)))[1]
    return share - most * share, share + most * (1 - share)


def rare_clusters(data: Clustered) -> float:
    """Effective number of clusters that hold the rarer outcome: (sum k)^2 / sum k^2 of the amounts k they hold.

    Only these clusters show how strongly values in [0, 1] cluster, so the variance has about two degrees of freedom for
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
    """True if cluster means are so skewed that a t interval misses: significantly skewed, and too few for that
    skewness.

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


def skewed_ts(data: Clustered, variance: float) -> np.ndarray | None:
    """The t statistics around the mean of resamples of skewed clusters, for the studentised bootstrap (Hall, Annals of
    Statistics 16, 1988): the same draws every time.

    None if Student's t is the better one: clusters are not skewed, or so few differ from the others that more than
    2.5 % of resamples have none of these, thus no spread, and one end of the interval would be anything.
    """
    if not is_skewed(data):
        return None
    count = len(data.sizes_G)
    chosen_BG = stream("bootstrap-t", count).integers(count, size=(RESAMPLES, count))
    sizes_BG, sums_BG = data.sizes_G[chosen_BG], data.sums_G[chosen_BG]
    means_B = sums_BG.sum(1) / sizes_BG.sum(1)
    shares_BG = sizes_BG / sizes_BG.sum(1, keepdims=True)
    squares_BG = (shares_BG * (sums_BG / sizes_BG - means_B[:, None])) ** 2
    errors_B = np.sqrt((squares_BG / (1 - shares_BG)).sum(1))
    spread_B = errors_B > 1e-9 * math.sqrt(variance)  # equal values differ by rounding
    if spread_B.mean() < 0.975:
        return None
    ts_B: np.ndarray = (means_B - data.mean)[spread_B] / errors_B[spread_B]
    return ts_B


def bootstrap(statistic: Callable[[np.ndarray], float], count: int, draws: int) -> dict[str, Any]:
    """`{"mean", "ci95": [low, high], "n"}` of a statistic of `count` rows other than a mean: a percentile interval.

    statistic: called with row numbers, all of them first and then `draws` times as many drawn with replacement.
    """
    rng = stream("bootstrap", count)
    values = [statistic(rng.integers(count, size=count)) for _ in range(draws)]
    low, high = np.quantile(values, [0.025, 0.975]).tolist()
    return {"mean": statistic(np.arange(count)), "ci95": [low, high], "n": count}
