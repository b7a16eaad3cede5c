"""Student's t against tables and closed forms."""

import math

import numpy as np
import pytest

from lmrl.evaluation.t_distribution import t95, upper_tail


def test_tail_in_closed_form():
    for t in (-3.0, -0.1, 0.0, 0.4, 12.0, 300.0):
        assert upper_tail(t, 1) == pytest.approx(0.5 - math.atan(t) / math.pi, rel=1e-9)
        assert upper_tail(t, 2) == pytest.approx(0.5 - t / math.sqrt(8 + 4 * t * t), rel=1e-9)
        sine, cosine = t / math.sqrt(3 + t * t), math.sqrt(3 / (3 + t * t))
        assert upper_tail(t, 3) == pytest.approx(
            0.5 - (math.atan(t / math.sqrt(3)) + sine * cosine) / math.pi, rel=1e-6
        )
    assert upper_tail(math.inf, 5) == 0 and upper_tail(-math.inf, 5) == 1


def test_tail_nears_the_normal():
    assert upper_tail(1.5, 1e8) == pytest.approx(math.erfc(1.5 / math.sqrt(2)) / 2, rel=1e-6)


@pytest.mark.parametrize(
    ("df", "quantile"),
    [(1, 12.7062), (2, 4.30265), (4, 2.77645), (10, 2.22814), (30, 2.04227), (120, 1.97993), (1e9, 1.95996)],
)
def test_quantile_as_in_tables(df, quantile):
    assert t95(df) == pytest.approx(quantile, abs=6e-5 if df == 1 else 6e-6)


def test_quantile_falls_between_whole_degrees_of_freedom():
    found = [t95(df) for df in np.linspace(1, 60, 60)]
    assert found == sorted(found, reverse=True) and t95(4) < t95(3.5) < t95(3)
    assert all(upper_tail(t95(df), df) == pytest.approx(0.025, rel=1e-9) for df in (1.0, 2.7, 9.3, 41.5))


def test_quantile_is_a_plain_number():
    """Whatever it is asked with: a scalar of numpy is no number to JSON."""
    assert type(t95(np.float64(17))) is float and type(t95(17)) is float
