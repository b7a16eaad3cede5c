"""Intervals by hand, and their coverage on simulated values."""

import math

import numpy as np
import pytest
import torch

from lmrl.evaluation.statistics import (
    UNIT,
    UNLIMITED,
    Clustered,
    between_clusters,
    bootstrap,
    p_value,
    summarize,
    wilson,
    within_clusters,
)
from lmrl.evaluation.t_distribution import t95


def test_interval_by_hand():
    # mean 2, standard deviation 1, t(2) = 4.302653: half width 4.302653 / sqrt(3)
    summary = summarize([1.0, 2.0, 3.0])
    half = 4.302653 / math.sqrt(3)
    assert summary == {
        "mean": 2,
        "ci95": pytest.approx([2 - half, 2 + half]),
        "n": 3,
        "clusters": 3,
        "holds_for": "new values",
    }


def test_single_value_has_no_width():
    summary = summarize([5.0], unit="prompt")
    assert summary["ci95"] == [5.0, 5.0] and summary["holds_for"] == "new samples of this prompt"


def test_no_values_are_refused():
    with pytest.raises(ValueError, match="no values"):
        summarize([])
    with pytest.raises(ValueError, match="3 values, but clusters for 2"):
        summarize([1.0, 2.0, 3.0], ["a", "b"])


def test_clusters_of_one_size_are_judged_by_their_means():
    values, prompts = [1.0, 3.0, 5.0, 5.0, 7.0, 9.0], ["a", "a", "b", "b", "c", "c"]
    means = summarize([2.0, 5.0, 8.0])
    found = summarize(values, prompts, unit="prompt")
    assert found["ci95"] == pytest.approx(means["ci95"]) and (found["n"], found["clusters"]) == (6, 3)
    assert found["holds_for"] == "new prompts"
    order = [4, 0, 2, 5, 3, 1]
    assert summarize([values[i] for i in order], [prompts[i] for i in order])["ci95"] == pytest.approx(found["ci95"])


def test_clusters_of_different_sizes_by_hand():
    # Sizes 1, 1, 2 and means 0, 4, 8: mean 5, shares 1/4, 1/4, 1/2.
    variance, df = between_clusters(Clustered.of([0.0, 4.0, 8.0, 8.0], [0, 1, 2, 2]))
    assert variance == pytest.approx((5 / 4) ** 2 / (3 / 4) + (1 / 4) ** 2 / (3 / 4) + (3 / 2) ** 2 / (1 / 2))
    # Under equal independent values the terms above have covariance D (S - 1 1') D, D = w / sqrt(1 - w), S = 1 / w.
    shares = np.array([0.25, 0.25, 0.5])
    scale = np.diag(shares / np.sqrt(1 - shares))
    covariance = scale @ (np.diag(1 / shares) - 1) @ scale
    assert df == pytest.approx(np.trace(covariance) ** 2 / (covariance**2).sum()) and 1 < df < 2


def test_fixed_clusters_by_hand():
    # Two start states of 2 and 4 episodes: variances 2 and 4/3, shares 1/3 and 2/3.
    values, starts = [1.0, 3.0, 10.0, 10.0, 12.0, 12.0], [0, 0, 1, 1, 1, 1]
    variance, df = within_clusters(Clustered.of(values, starts))
    parts = [2 / 2 / 9, 4 / 3 / 4 * 4 / 9]
    assert variance == pytest.approx(sum(parts))
    assert df == pytest.approx(sum(parts) ** 2 / (parts[0] ** 2 / 1 + parts[1] ** 2 / 3))
    found = summarize(values, starts, fixed=True, unit="start state")
    assert found["ci95"][1] - found["mean"] == pytest.approx(t95(df) * math.sqrt(variance))
    assert found["holds_for"] == "new samples of these start states"


def test_fixed_clusters_of_one_value_take_the_wider_spread():
    assert summarize([1.0, 2.0, 3.0], fixed=True)["ci95"] == summarize([1.0, 2.0, 3.0])["ci95"]


def test_one_cluster_is_fixed():
    found = summarize([1.0, 2.0, 3.0], ["a", "a", "a"], unit="prompt")
    assert found["ci95"] == pytest.approx(summarize([1.0, 2.0, 3.0])["ci95"])
    assert found["holds_for"] == "new samples of this prompt" and found["clusters"] == 1


def test_wilson_by_hand():
    # Published example (Newcombe 1998): 81 of 263 is 0.2553 to 0.3662.
    assert wilson(81 / 263, 263, 1.959964) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    low, high = summarize([1.0] * 30 + [0.0] * 10)["ci95"]
    assert (low, high) == pytest.approx(wilson(0.75, 39, t95(39)))  # the variance of a sample counts n - 1


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_equal_outcomes_leave_room(value):
    low, high = summarize([value] * 60)["ci95"]
    assert (low, high) == pytest.approx((1 - 3.8 / 60, 1) if value else (0, 3.8 / 60), abs=0.005)
    # 60 answers to 6 prompts say no more about new prompts than 6 answers do.
    prompts = [number // 10 for number in range(60)]
    assert summarize([value] * 60, prompts)["ci95"] == pytest.approx(summarize([value] * 6)["ci95"])
    # Each of two prompts always ends alike: nothing varies, and 20 samples leave room still.
    low, high = summarize([0.0] * 10 + [1.0] * 10, [0] * 10 + [1] * 10, fixed=True)["ci95"]
    assert 0.35 < low < 0.45 and 0.55 < high < 0.65


def test_rounding_refutes_no_limits():
    sums = [0.1 + 0.2, 0.0, 0.1] * 4  # the first is above 0.3
    found, exact = (summarize(values, limits=(0.0, 0.3))["ci95"] for values in (sums, [0.3, 0.0, 0.1] * 4))
    assert sums[0] > 0.3 and found == pytest.approx(exact)


def test_limits_hold():
    scores = [0.97, 1.0, 1.0, 0.2, 1.0, 1.0]
    assert summarize(scores, limits=UNLIMITED)["ci95"][1] > 1
    low, high = summarize(scores, limits=UNIT)["ci95"]
    assert 0 <= low < np.mean(scores) < high <= 1
    twice = summarize([2 * score - 1 for score in scores], limits=(-1.0, 1.0))["ci95"]
    assert twice == pytest.approx([2 * low - 1, 2 * high - 1])
    # 0 is in the middle of these limits, so that no rare outcome makes the interval cautious.
    assert summarize([0.0, 1.0] * 20, limits=(-1.0, 1.0))["ci95"] == pytest.approx(
        summarize([0.0, 1.0] * 20)["ci95"], abs=0.05
    )
    assert summarize([0.0, 0.0, 9.0], limits=(0.0, math.inf))["ci95"][0] == 0
    assert summarize([0.3] * 50, limits=UNIT)["ci95"] != [0.3, 0.3]  # equal, but they might not have been
    assert summarize([0.5, 2.0, 1.5], limits=UNIT) == summarize([0.5, 2.0, 1.5])  # 2 refutes the limits
    assert summarize([0.3] * 50)["ci95"] == pytest.approx([0.3, 0.3])
    assert summarize([1.0] * 50, limits=UNLIMITED)["ci95"] == [1, 1]


def test_rounding_breaks_no_limits():
    whole, below, above = 1.0, 0.7 + 0.2 + 0.1, 1 + 2**-52
    assert below < 1 < above
    for value in (below, above):
        assert summarize([value] * 20) == summarize([whole] * 20)
        assert summarize([value] * 9 + [0.5], limits=UNIT) == summarize([whole] * 9 + [0.5], limits=UNIT)


def test_few_clumps_widen_the_interval():
    """32 successes of one prompt among 20 say less than 32 successes spread over all."""
    prompts = [number // 32 for number in range(640)]
    clumped = [float(number < 32) for number in range(640)]
    spread = [float(number % 20 == 0) for number in range(640)]
    (low, high), (lower, upper) = summarize(clumped, prompts)["ci95"], summarize(spread, prompts)["ci95"]
    assert low < lower and high > 2 * upper


def test_skewed_values_reach_further_to_the_long_side():
    values = [1.0] * 15 + [2.0, 3.0, 5.0, 8.0, 20.0]
    found = summarize(values)
    (low, high), mean = found["ci95"], found["mean"]
    assert high - mean > 1.5 * (mean - low) and found == summarize(values)
    mirrored = summarize([-value for value in values])["ci95"]
    assert mirrored == pytest.approx([-high, -low], rel=0.01)


def test_one_value_apart_from_equal_ones_has_a_t_interval():
    """13 values, one 0.6 above: the standard error is 0.6 / 13, t(12) = 2.178813. Resamples without it have no spread."""
    found, half = summarize([0.1] * 12 + [0.7]), 2.178813 * 0.6 / 13
    assert found["ci95"] == pytest.approx([0.1 + 0.6 / 13 - half, 0.1 + 0.6 / 13 + half])


def test_many_skewed_values_have_a_t_interval():
    """0 and 2 in three to one have a skewness of 1.15, of which 40 values bear 0.63 and 400 bear 2."""
    low, high = summarize([0.0] * 30 + [2.0] * 10)["ci95"]
    assert high - 0.5 > 1.1 * (0.5 - low)
    half = t95(399) * math.sqrt(0.75 / 399)
    assert summarize([0.0] * 300 + [2.0] * 100)["ci95"] == pytest.approx([0.5 - half, 0.5 + half])


def test_skewed_differences_of_pairs_have_a_t_interval():
    """Their mean is (15 + 2 + 3 + 5 + 8 + 20) / 20 = 2.65, and t(19) = 2.093024."""
    gaps = [1.0] * 15 + [2.0, 3.0, 5.0, 8.0, 20.0]
    mean, error = 2.65, math.sqrt(sum((gap - 2.65) ** 2 for gap in gaps) / 20 / 19)
    found = summarize(gaps, paired=True)
    assert found["ci95"] == pytest.approx([mean - 2.093024 * error, mean + 2.093024 * error])


def test_equal_policies_of_skewed_scores_seldom_differ():
    rng = np.random.default_rng(0)
    gaps = rng.lognormal(size=(1000, 50)) - rng.lognormal(size=(1000, 50))
    excluded = sum(not low <= 0 <= high for low, high in (summarize(row, paired=True)["ci95"] for row in gaps))
    assert excluded <= 60 and sum(p_value(row) < 0.05 for row in gaps) == excluded


# -------------------------------------------------------------------------------------------------------------- p-values
def test_p_value_by_hand():
    # mean 2, standard error 1 / sqrt(3): t = 3.4641 with two degrees of freedom, p = 1 - t / sqrt(t^2 + 2)
    assert p_value([1.0, 2.0, 3.0]) == pytest.approx(1 - math.sqrt(12 / 14))
    assert p_value([1.0, -1.0]) == 1 and p_value([5.0]) == 1 and p_value([5.0, 5.0]) == 0


@pytest.mark.parametrize("limits", [UNLIMITED, (-4.0, 4.0), (-1e3, 1e3)])
@pytest.mark.parametrize("shape", ["even", "skewed", "clusters", "fixed"])
def test_p_value_agrees_with_the_interval(limits, shape):
    """Shifted until an end of the interval is 0, values have a p-value of 0.05."""
    values = np.array([0.1, 0.5, 0.2, 0.9, 0.4, 0.6, 0.3, 0.8, 0.7, 1.9 if shape == "skewed" else 0.0])
    clusters = [number // 2 for number in range(10)] if shape in ("clusters", "fixed") else None
    fixed = shape == "fixed"

    def low(shift):
        return summarize(values - shift, clusters, limits, fixed, paired=True)["ci95"][0]

    bottom, top = 0.0, 1.0
    for _ in range(40):
        middle = (bottom + top) / 2
        bottom, top = (middle, top) if low(middle) > 0 else (bottom, middle)
    assert p_value(values - bottom, clusters, limits, fixed) == pytest.approx(0.05, abs=1e-6)


def test_p_value_of_equal_differences():
    # 60 pairs that differ by 1 of at most 1: q^2 / (60 + q^2) has to reach 1/2 before 0 is in, so q^2 = 60 with 59 df.
    assert p_value([1.0] * 60, limits=(-1.0, 1.0)) < 1e-9 and p_value([0.0] * 60, limits=(-1.0, 1.0)) == 1
    low = summarize([0.1] * 9, limits=(-1.0, 1.0))["ci95"][0]
    assert low < 0 and p_value([0.1] * 9, limits=(-1.0, 1.0)) > 0.05
    assert p_value([t95(8) ** 2 / 9] * 9, limits=(-1.0, 1.0)) == pytest.approx(0.05)  # 0 is an end of the interval
    assert p_value([-0.1] * 9, limits=(-1.0, 1.0)) == pytest.approx(p_value([0.1] * 9, limits=(-1.0, 1.0)))


@pytest.mark.parametrize("kind", ["normal", "0/1"])
def test_intervals_cover_the_mean(kind):
    """20 prompts with 8 samples each, correlated by 1/2 (benchmarks/coverage.py measures many more settings)."""
    rng = np.random.default_rng(0)
    rows, hits, naive = np.repeat(np.arange(20), 8), 0, 0
    for _ in range(1000):
        if kind == "normal":
            true, values = 0.0, rng.normal(size=(20, 1)) + rng.normal(size=(20, 8))
        else:
            true, values = 0.3, (rng.random((20, 8)) < rng.beta(0.3, 0.7, (20, 1))).astype(float)
        low, high = summarize(values.ravel(), rows.tolist())["ci95"]
        hits += low <= true <= high
        low, high = summarize(values.ravel())["ci95"]
        naive += low <= true <= high
    assert 0.93 < hits / 1000 < 0.975 and naive < 700


def test_bootstrap_of_a_mean_is_near_its_t_interval():
    values = torch.linspace(0, 1, 101, dtype=torch.float64)
    found = bootstrap(lambda rows: float(values[rows].mean()), 101, 2000)
    half = 1.98 * float(values.std()) / math.sqrt(101)
    assert found["mean"] == pytest.approx(0.5) and found["n"] == 101
    assert found["ci95"] == pytest.approx([0.5 - half, 0.5 + half], abs=0.01)
