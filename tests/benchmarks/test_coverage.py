"""The simulated evaluations match their settings."""

import sys
from pathlib import Path

import numpy as np
import pytest

from lmrl.seeding import stream

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import coverage  # noqa: E402


@pytest.mark.parametrize(
    "setting",
    [
        coverage.Setting("normal", 20, 8, 0.5),
        coverage.Setting("exponential", 20, 8, 0.2),
        coverage.Setting("0/1", 20, 8, 0.5, 0.2),
        coverage.two_kinds(20, 8),
    ],
    ids=lambda setting: setting.kind,
)
def test_drawn_values_have_the_mean_and_the_error_they_claim(setting):
    rng = stream("test")
    trials = [coverage.draw(setting, rng) for _ in range(4000)]
    means = np.array([values.mean() for values, _, _ in trials])
    _, mean, error = trials[0]
    assert means.mean() == pytest.approx(mean, abs=4 * error / 4000**0.5)
    assert means.std() == pytest.approx(error, rel=0.06)


def test_fixed_prompts_are_measured_against_their_own_rates():
    setting = coverage.Setting("0/1, same prompts", 20, 8, 0.5, 0.2)
    trials = [coverage.draw(setting, rng) for rng in [stream("test")] for _ in range(4000)]
    scaled = [(values.mean() - mean) / error for values, mean, error in trials]
    assert np.std(scaled) == pytest.approx(1, rel=0.06) and len({mean for _, mean, _ in trials}) > 3900


def test_misses_name_the_target():
    few, many = coverage.Setting("0/1", 20, 32, 0.8, 0.01), coverage.Setting("0/1", 20, 32, 0.0, 0.5)
    assert coverage.misses(many, coverage.Measured(0.95, 0.02, 0.03, 1.0)) == []
    assert coverage.misses(many, coverage.Measured(0.92, 0.04, 0.04, 1.2)) == [
        "coverage below 0.93",
        "width above 1.15",
    ]
    assert coverage.misses(few, coverage.Measured(0.98, 0.0, 0.02, 1.0)) == ["coverage above 0.97", "few events"]


def test_measured_row():
    setting = coverage.Setting("0/1", 20, 8, 0.0, 0.5)
    found = coverage.measure(setting, 200)
    assert found.coverage + found.below + found.above == pytest.approx(1) and 0.9 < found.coverage <= 1
    assert coverage.table([(setting, found)]).splitlines()[2].startswith("| 0/1 | 20 x 8 | 0 | 0.5 | 40.0 | 0.9")
