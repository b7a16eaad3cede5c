"""The simulated comparisons match the table's description."""

import sys
from pathlib import Path

import numpy as np
import pytest

from lmrl.seeding import stream

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import compare  # noqa: E402


@pytest.mark.parametrize("rho", compare.CORRELATIONS)
def test_scores_have_the_correlation_they_claim(rho):
    one, other = compare.scores(stream("test"), 100_000, rho, effect=0.5)
    assert np.corrcoef(one, other)[0, 1] == pytest.approx(rho, abs=0.01)
    assert other.mean() - one.mean() == pytest.approx(0.5, abs=0.02) and one.var() == pytest.approx(1, abs=0.03)


def test_power_grows_with_prompts_and_pairs():
    few, many = (compare.power(compare.paired, count, 0.8, 200) for count in (15, 80))
    assert few < 0.6 < 0.9 < many
    assert compare.power(compare.welch, 80, 0.8, 200) < 0.6


def test_estimate_is_what_pairing_saves():
    # Variance of a difference 2 (1 - 0.8) = 0.4: (1.96 + 0.842)^2 0.4 / 0.25^2 is 50.2
    assert compare.estimated(0.8, 300) == pytest.approx(50.2, rel=0.1)


def test_equal_policies_share_a_mean():
    assert 0.02 < compare.false_positives(0.6, 4, 300) < 0.09
