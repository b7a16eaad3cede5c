"""The reward-hacking detector on drifting rewards."""

import math

import pytest

from lmrl.training.monitoring.measures import repetition
from lmrl.training.monitoring.reward_hacking import RewardHackingDetector, difference


def test_repetition_by_hand():
    # "a b c a b c": trigrams abc bca cab abc, one of four again
    assert repetition("a b c a b c") == pytest.approx(0.25) and repetition("a b") == 0


def test_difference_by_hand():
    # means 1 and 3, variances 1 and 1 of 4 values each: 2 / sqrt(1/4 + 1/4)
    values = [1 - math.sqrt(0.75), 1 + math.sqrt(0.75)] * 2
    assert difference(values, [value + 2 for value in values]) == pytest.approx(2 / math.sqrt(0.5))
    assert difference([1.0, 1.0], [1.0, 1.0]) == 0 and difference([1.0, 1.0], [2.0, 2.0]) == math.inf


def play(trained, watched):
    detector, warnings = RewardHackingDetector(["kind"]), []
    for step in range(1, 61):
        noise = 0.1 * (-1) ** step
        warnings += detector.add(
            step, {"reward": trained(step) + noise, "reward/kind": watched(step) - noise, "length": 3}
        )
    return detector, warnings


def test_a_watched_reward_that_turns_is_reported_once():
    _, warnings = play(lambda step: step / 10, lambda step: -abs(step - 20) / 10)
    [text] = warnings
    assert text.startswith("reward/kind is watched and falls (") and "possible reward hacking" in text


@pytest.mark.parametrize(
    ("trained", "watched"),
    [
        (lambda step: step / 10, lambda step: step / 20),  # both rise
        (lambda step: -step / 10, lambda step: -step / 20),  # both fall
        (lambda step: step / 10, lambda step: 0.0),  # nothing to see
    ],
)
def test_nothing_is_said_without_need(trained, watched):
    assert play(trained, watched)[1] == []


def test_the_table_has_means_of_parts():
    detector = RewardHackingDetector([])
    for step in range(1, 13):
        detector.add(step, {"reward": float(step)} | ({"kl": 1.0} if step > 6 else {}))
    heads, rows = detector.table()
    assert heads == ["1-2", "3-4", "5-6", "7-8", "9-10", "11-12"]
    assert rows["reward"] == [1.5, 3.5, 5.5, 7.5, 9.5, 11.5]
    assert math.isnan(rows["kl"][0]) and rows["kl"][3:] == [1.0] * 3
