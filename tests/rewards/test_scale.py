"""Normalising and clipping scores; running statistics are part of a run's state."""

import statistics

import pytest
from pydantic import ValidationError

from lmrl.recipe import Reward
from lmrl.rewards.rewards import RewardFunction, judge
from lmrl.rewards.scale import Scale
from lmrl.training.monitoring.measures import measure
from lmrl.trajectories.trajectory import Segment, Trajectory


def test_fixed_numbers_and_clipping():
    scale = Scale((2.0, 0.5), (-1, 1))
    assert scale([2.0, 2.25, 9.0, None, -9.0]) == [0.0, 0.5, 1.0, None, -1.0]
    assert Scale()([3.0, None]) == [3.0, None]


def test_running_statistics_are_those_of_all_samples_so_far():
    scale, seen = Scale("running"), []
    for batch in ([1.0, 5.0, None], [2.0], [7.0, 7.0, 0.5]):
        seen += [value for value in batch if value is not None]
        scaled = scale(batch, learning=True)
        mean, std = statistics.fmean(seen), statistics.pstdev(seen)
        assert scaled == [None if value is None else pytest.approx((value - mean) / std) for value in batch]


def test_evaluation_leaves_running_statistics_alone():
    scale = Scale("running", (-1, 1))
    scale([0.0, 4.0], learning=True)
    before = scale.state()
    assert scale([100.0]) == [100.0] and scale.state() == before
    other = Scale("running", (-1, 1))
    other.load_state(before)
    assert other([3.0], learning=True) == scale([3.0], learning=True)


def test_equal_scores_are_only_centred():
    assert Scale("running")([3.0, 3.0], learning=True) == [0.0, 0.0]
    assert Scale("running")([None], learning=True) == [None]


def test_components_stay_as_they_were_scored():
    segment = Segment()
    segment.observe([1])
    segment.act([2], [-1.0], 0)
    episode = Trajectory([segment], "p", "c")
    judge([RewardFunction("r", "r", 2.0, lambda **_: [5.0], scale=Scale((1.0, 2.0), None))], [episode], learning=True)
    assert episode.components == {"r": 5.0} and episode.reward == 4.0


def test_steps_are_compared_by_the_first_ones_statistics():
    """Equal scores earn less and less as the running mean comes near: recorded, that would be a collapse."""
    scores = iter([[0.0, 4.0], [4.0, 4.0], [4.0, 4.0]])
    moving = RewardFunction("r", "r", 3.0, lambda **_: next(scores), scale=Scale("running"))
    other = RewardFunction("s", "s", 1.0, lambda **_: [0.5, 0.5])
    trained, recorded = [], []
    for _ in range(3):
        episodes = []
        for _ in range(2):
            segment = Segment()
            segment.observe([1])
            segment.act([2], [-1.0], 0)
            episodes.append(Trajectory([segment], "p", "c"))
        judge([moving, other], episodes, learning=True)
        trained.append(episodes[1].reward)
        recorded.append(measure(episodes)["reward"])
    # Means 2, 3 and 10 / 3 of all samples so far, deviations 2, 3 ** .5 and (20 / 9) ** .5.
    assert trained == pytest.approx([3.5, 3 / 3**0.5 + 0.5, 2 / (20 / 9) ** 0.5 + 0.5])
    assert recorded == pytest.approx([0.5, 3.5, 3.5])  # 3 (score - 2) / 2 + .5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "a reward is one of"),
        ({"function": "a.b", "model": "c"}, "a reward is one of"),
        ({"model": []}, "a reward is one of"),
        ({"function": "a.b", "normalize": (0, 0)}, "STD above 0"),
        ({"function": "a.b", "clip": (1, 1)}, "LOW < HIGH"),
    ],
)
def test_invalid_settings(settings, message):
    with pytest.raises(ValidationError, match=message):
        Reward(**settings)
