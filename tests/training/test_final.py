"""When an earlier policy is significantly better than the last, by hand and by simulation."""

import numpy as np
import pytest

from lmrl.training.final import certainly_better, chance, paired_values
from lmrl.trajectories.trajectory import Trajectory


def gains_with(t, count):
    """Values whose t statistic is t: spread evenly around their mean."""
    base = np.linspace(-1, 1, count)
    return list(base + t * base.std(ddof=1) / np.sqrt(count))


@pytest.mark.parametrize(("count", "t"), [(2, 12.706), (3, 4.303), (4, 3.182), (6, 2.571), (11, 2.228), (31, 2.042)])
def test_chance_agrees_with_tables_of_t(count, t):
    assert chance(gains_with(t, count)) == pytest.approx(0.025, abs=2e-5)
    assert chance(gains_with(-t, count)) == pytest.approx(0.975, abs=2e-5)


def test_chance_of_equal_gains():
    assert chance([1.0, 1.0]) == 0 and chance([0.0, 0.0]) == 1 and chance([-1.0, -1.0]) == 1


def test_certainly_better_by_hand():
    last = {str(start): 0.0 for start in range(11)}
    better = dict(zip(last, gains_with(2.4, 11), strict=True))  # p about 0.019
    assert certainly_better(better, last, 1) and not certainly_better(better, last, 2)
    assert not certainly_better(last, better, 1)
    few = {name: 5.0 for name in list(last)[:4]}
    assert not certainly_better(few, last, 1)  # four pairs
    assert certainly_better(few | {"4": 5.0, "unknown": -9.0}, last, 1)  # five, and one without a partner


def test_equal_policies_are_rarely_told_apart():
    """The best of eight equal policies against the last: at most 2.5 %."""
    rng, wrong = np.random.default_rng(0), 0
    for _ in range(1000):
        scores = rng.binomial(1, 0.3, size=(9, 48)).astype(float)
        best = scores[:8][scores[:8].mean(1).argmax()]
        wrong += certainly_better(dict(enumerate(best)), dict(enumerate(scores[8])), 9)
    assert wrong <= 35  # 25 expected at most, standard error 5


def episode(group, number, value):
    return Trajectory([], "", "", reward=value, group=group, episode=number)


def test_pairs_are_start_states_or_episodes_of_few():
    many = [episode(group, 2 * group + sample, float(group + sample)) for group in range(5) for sample in range(2)]
    assert paired_values(many, "return") == {str(group): group + 0.5 for group in range(5)}
    assert paired_values(many[:4], "return") == {"0/0": 0.0, "0/1": 1.0, "1/2": 1.0, "1/3": 2.0}
    assert paired_values(many, "return", by_episode=True)["4/9"] == 5.0
    assert paired_values(many, "reward") == {}
