"""Ratings and differences at equal length, by hand and on simulated scores."""

import math

import numpy as np
import pytest

from lmrl.errors import RecipeError, ScoreError
from lmrl.evaluation.claims import read_claim
from lmrl.evaluation.controlled import controlled
from lmrl.evaluation.paired import compare_played
from lmrl.evaluation.ratings import fit, ratings
from lmrl.evaluation.scoring import Scoring
from tests.evaluation.test_paired import compared, played


def test_two_policies_are_rated_by_hand():
    # B wins 3 of 4 prompts, and each pair has half a tie beside: odds 3.25 to 1.25.
    a, b = ratings(["A", "B"], np.array([[0, 0, 0, 1], [1, 1, 1, 0]]))
    assert a.points == 0 and a.ci95 == [0, 0]
    assert b.points == pytest.approx(400 * math.log10(3.25 / 1.25))
    assert b.ci95[0] < 0 < b.points < b.ci95[1]


def test_ties_are_half_a_win():
    _, b = ratings(["A", "B"], np.array([[1.0, 0.5], [1.0, 0.5 + 1e-15]]))
    assert b.points == pytest.approx(0) and b.ci95 == pytest.approx([0, 0])


def test_a_policy_that_always_wins_stays_finite():
    _, b = ratings(["A", "B"], np.array([[0.0] * 10, [1.0] * 10]))
    assert b.points == pytest.approx(400 * math.log10(10.25 / 0.25))


def test_a_ladder_of_wins_is_fitted_to_the_end():
    """Each policy always beats those before it. By symmetry ratings are 0, x and 2x, and the last one's expected wins
    are its wins: 2 x 5,000 and half of an imaginary tie twice."""
    a, b, c = fit(np.tril(np.full((3, 3), 5000.0), -1))
    chances = sum(1 / (1 + 10 ** -((c - other) / 400)) for other in (a, b))
    assert c == pytest.approx(2 * b) and 5000.5 * chances == pytest.approx(10000.5, abs=1e-6)


@pytest.mark.slow
def test_simulated_strengths_are_found():
    """Gumbel noise makes wins follow Bradley and Terry's model; in 20 simulations the intervals hold 9 times in 10."""
    rng, true, held = np.random.default_rng(0), np.array([0.0, 0.5, 1.0]), 0
    for _ in range(20):
        found = ratings(["A", "B", "C"], true[:, None] + rng.gumbel(size=(3, 150)))
        held += sum(
            one.ci95[0] <= 400 / math.log(10) * value <= one.ci95[1] for one, value in zip(found, true, strict=True)
        )
    assert held - 20 >= 0.88 * 40


def test_three_policies_have_ratings_and_two_have_none():
    three = compared(played("a", 1, 2, 3), played("b", 2, 3, 4), played("c", 0, 1, 2))
    assert [one.key for one in three.ratings] == ["A", "B", "C"]
    assert three.ratings[1].points > 0 > three.ratings[2].points
    assert '"ratings": [' in three.to_json()
    assert compared(played("a", 1, 2), played("b", 2, 3)).ratings == []


def test_line_is_found_by_hand():
    found = controlled([2 + 3 * x for x in (0, 1, 2, 5)], [0, 1, 2, 5], "length")
    assert found.mean == pytest.approx(2)
    assert found.ci95 == pytest.approx([2, 2])
    # What rounding leaves over an exact line is neither a difference nor a spread.
    found = controlled([0.3 * x for x in (0.7, 0.1, 0.6, 1.1, 0.4)], [0.7, 0.1, 0.6, 1.1, 0.4], "length")
    assert (found.mean, found.ci95, found.p) == (0.0, [0.0, 0.0], 1.0)


def test_without_spread_the_mean_stays():
    # Residuals -1, 0, 1, 0 over 1 - 1/4: variance 2 (4/3)^2 / 16 of the mean; t(3) = 3.182446.
    found = controlled([1, 2, 3, 2], [7, 7, 7, 7], "length")
    half = 3.182446 * math.sqrt(2 * (4 / 3) ** 2 / 16)
    assert found.mean == 2 and found.ci95 == pytest.approx([2 - half, 2 + half], abs=1e-5)


def test_intervals_at_equal_length_hold():
    """Score differences that are 0.3 and 0.02 a token: in 400 simulations, 95 % intervals hold 0.3."""
    rng, held = np.random.default_rng(1), 0
    for _ in range(400):
        lengths = rng.normal(15, 10, 40)
        found = controlled(
            0.3 + 0.02 * lengths + rng.normal(0, 0.5, 40) * (1 + np.abs(lengths) / 20), lengths, "length"
        )
        held += found.ci95[0] <= 0.3 <= found.ci95[1]
    assert 0.92 <= held / 400 <= 0.98


def test_longer_answers_gain_nothing_at_equal_length():
    """Rewards that are the number of words: the whole difference is length."""
    policies = played("a", 1, 2, 3, 5), played("b", 2, 4, 4, 9)
    found = compared(*policies, control="words")
    plain, held = found.differences
    assert plain.metric == "reward" and plain.mean == 2
    assert held.metric == "reward at equal words" and held.mean == pytest.approx(0, abs=1e-9)
    claim = read_claim("reward at equal words: B - A > 1")
    with pytest.raises(ScoreError, match="on reward at equal words, B - A is"):
        compared(*policies, control="words", claims=[claim]).require([claim])
    with pytest.raises(RecipeError, match="there is no metric 'word'"):
        compared(*policies, control="word")


def test_a_sample_without_the_control_is_left_out():
    old, new = played("a", 1, 2, 3, 5, 8), played("b", 2, 4, 4, 9, 8)
    new.trajectories[4].metrics = {}
    plain, held = compared(old, new, control="words").differences
    assert (plain.pairs, held.pairs, held.prompts) == (5, 4, 4) and held.mean == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("metric, control", [("pass@2", "words"), ("words", "pass@2")])
def test_metrics_of_several_samples_at_equal_others(metric, control):
    """By prompt: pass@2 differs by 0, 1, 0, 0, words by 1, 1, 1, 0, so that a line through them meets 0 at 0, 1/3."""
    old, new = played("a", [0, 1], [0, 0], [0, 1], [1, 1]), played("b", [1, 1], [0, 1], [1, 1], [1, 1])
    held = compare_played("suite", [old, new], Scoring(["reward", "pass@2"]), [metric], control=control).differences[1]
    assert held.metric == f"{metric} at equal {control}" and (held.pairs, held.prompts) == (4, 4)
    assert held.mean == pytest.approx(0 if metric == "pass@2" else 2 / 3)


def test_no_ratings_without_a_common_prompt():
    policies = [played(name, 1, 2) for name in "abc"]
    for policy, missing in zip(policies, (None, 0, 1), strict=True):
        for one in policy.trajectories:
            one.metrics = {} if one.group == missing else {"words": 1.0}
    assert compared(*policies, metrics=["words"]).ratings == []


def test_too_few_prompts_are_refused():
    with pytest.raises(RecipeError, match="--control words: 3 prompts"):
        compared(played("a", 1, 2, 3), played("b", 2, 4, 4), control="words")
