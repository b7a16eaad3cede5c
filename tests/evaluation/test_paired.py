"""Paired differences by hand, and what their p-values promise on simulated pairs."""

import math

import numpy as np
import pytest

from lmrl.errors import RecipeError, RunError, ScoreError
from lmrl.evaluation.claims import check_claims, read_claim
from lmrl.evaluation.paired import Played, compare_played, correlation, holm, means_by_cluster, prompts_needed
from lmrl.evaluation.scoring import Scoring
from lmrl.trajectories.trajectory import Trajectory, Turn


def played(label, *groups, length=None):
    """Episodes of prompts 0, 1, ... with these rewards; a number stands for one sample. None: not judged."""
    episodes, samples = [], max(len(np.atleast_1d(group)) for group in groups)
    for number, group in enumerate(groups):
        for sample, value in enumerate(np.atleast_1d(group)):
            if value is not None:
                episodes.append(
                    Trajectory(
                        [],
                        f"prompt {number}",
                        f"{label} {value}",
                        reward=float(value),
                        components={"judge": float(value)},
                        metrics={"words": float(value) * 2},
                        group=number,
                        episode=number * samples + sample,
                    )
                )
    return Played(label, episodes)


def compared(*policies, metrics=("reward",), **options):
    return compare_played("suite", policies, Scoring(["reward"]), metrics, **options)


def test_difference_by_hand():
    # Differences 1, 2, 3: mean 2, standard error 1 / sqrt(3), t(2) = 4.302653.
    found = compared(played("old", 5, 5, 5), played("new", 6, 7, 8)).differences[0]
    half = 4.302653 / math.sqrt(3)
    assert (found.first, found.second, found.metric, found.mean) == ("B", "A", "reward", 2.0)
    assert found.ci95 == pytest.approx([2 - half, 2 + half])
    assert found.p == found.adjusted == pytest.approx(1 - math.sqrt(12 / 14))
    assert (found.wins, found.ties, found.losses, found.pairs, found.prompts) == (3, 0, 0, 3, 3)
    assert found.holds_for == "new prompts" and found.correlation is None


def test_a_single_pair_shows_nothing():
    claim = read_claim("B - A > 0")
    found = compared(played("old", 5), played("new", 7), claims=[claim])
    with pytest.raises(ScoreError, match="on reward, B - A is \\+2, and its 95 % interval goes from -inf"):
        found.require([claim])


def test_a_difference_by_rounding_is_none():
    """.1 + .2 is not .3 in floating point: eight such gaps without spread had a p-value of 0."""
    found = compared(played("old", *[0.1 + 0.2] * 8), played("new", *[0.3] * 8))
    one = found.differences[0]
    assert (one.mean, one.ci95, one.p, one.more) == (0.0, [0.0, 0.0], 1.0, None)
    assert (one.wins, one.ties, one.losses) == (0, 8, 0) and not found.changes


def test_equal_scores_have_no_correlation():
    # The mean of three scores of 0.1 is not 0.1: what rounding leaves over had correlated perfectly.
    assert correlation([0.1] * 3, [0.7] * 3) is None and correlation([0.7] * 6, [0.7] * 6) is None


def test_samples_of_a_prompt_are_one_cluster():
    """Two prompts with two samples each: differences 1 and 3 in the mean, t(1) = 12.706205."""
    found = compared(played("old", [0, 4], [1, 1]), played("new", [2, 4], [4, 4])).differences[0]
    assert found.mean == 2 and found.ci95 == pytest.approx([2 - 12.706205, 2 + 12.706205])
    assert (found.pairs, found.prompts, found.wins) == (4, 2, 2)


def test_rows_with_the_same_prompt_are_one_cluster():
    """The same values as two samples of each of two prompts, but each in a row of its own, as they are played."""
    old, new = played("old", 0, 4, 1, 1), played("new", 2, 4, 4, 4)
    for episode in old.trajectories + new.trajectories:
        episode.prompt = f"prompt {episode.group // 2}"
        episode.turns = [Turn(episode.prompt, episode.completion)]
    found = compared(old, new).differences[0]
    samples = compared(played("old", [0, 4], [1, 1]), played("new", [2, 4], [4, 4])).differences[0]
    assert found == samples and (found.pairs, found.prompts, found.wins) == (4, 2, 2)


def test_samples_without_a_partner_are_left_out():
    found = compared(played("old", [0, None], [1, 2], [3, 3]), played("new", [1, 9], [2, 3], [None, None])).differences[
        0
    ]
    assert (found.pairs, found.prompts, found.mean) == (3, 2, 1.0)


def test_wins_ties_and_losses_are_of_prompts():
    found = compared(played("old", [0, 1], [1, 1], [1, 0]), played("new", [1, 0], [1, 1.5], [0, 0])).differences[0]
    assert (found.wins, found.ties, found.losses) == (1, 1, 1)


def test_equal_successes_leave_room():
    """40 prompts that both policies solve: the next ones may tell them apart."""
    found = compared(played("old", *[1] * 40), played("new", *[1] * 40)).differences[0]
    assert found.mean == 0 and found.p == 1 and found.needed is None and found.more is None
    low, high = found.ci95
    assert -0.15 < low < -0.03 and high == pytest.approx(-low)


def test_limits_are_those_of_both_policies():
    """Majorities of scores between 0 and 1 have no limits, whichever of the two policies has them."""
    binary, graded = ([1, 1], [0, 0], [1, 1]), ([0.5, 0.5], [0.5, 0.5], [1, 1])
    scoring = Scoring(["reward", "maj@2"])
    one, other = (
        compare_played("suite", [played("a", *a), played("b", *b)], scoring, ["maj@2"]).differences[0]
        for a, b in ((binary, graded), (graded, binary))
    )
    assert one.mean == -other.mean and one.ci95 == pytest.approx([-end for end in reversed(other.ci95)])
    assert one.p == pytest.approx(other.p)


def test_all_are_compared_with_the_first_and_as_claims_say():
    policies = [played(name, *values) for name, values in {"a": (1, 2, 4), "b": (2, 3, 3), "c": (9, 9, 9)}.items()]
    found = compared(*policies, claims=[read_claim("C - B > 0")])
    assert [(one.first, one.second) for one in found.differences] == [("B", "A"), ("C", "A"), ("C", "B")]
    assert found.names == {"A": "a", "B": "b", "C": "c"}


# ------------------------------------------------------------------------------------------------------------------- Holm
def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.6, 0.5]) == [1.0, 1.0] and holm([]) == []


def test_holm_counts_every_metric():
    found = compared(played("old", 5, 5, 5), played("new", 6, 7, 8), metrics=("reward", "words"))
    assert [one.metric for one in found.differences] == ["reward", "words"]
    assert [one.adjusted for one in found.differences] == pytest.approx([2 * one.p for one in found.differences])


# ----------------------------------------------------------------------------------------------------------------- claims
@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("B - A > -0.01", (None, "B", "A", ">", -0.01)),
        ("C-A<2e-3", (None, "C", "A", "<", 0.002)),
        ("length: B - A < 20", ("length", "B", "A", "<", 20.0)),
    ],
)
def test_claims_are_read(text, read):
    claim = read_claim(text)
    assert (claim.metric, claim.first, claim.second, claim.sign, claim.margin) == read


@pytest.mark.parametrize("text", ["B > A", "B - B > 0", "B - A > much", "B - A >= 0", "B - A > 1.2.3", ""])
def test_other_claims_are_refused(text):
    with pytest.raises(RecipeError, match="compares no two policies: write 'B - A > -0.01'"):
        read_claim(text)


def test_claims_hold_by_the_interval():
    found = compared(played("old", 5, 5, 5), played("new", 6, 7, 8))  # 2 [-0.484, 4.484]
    found.require([read_claim("B - A > -0.49"), read_claim("B - A < 4.49")])
    with pytest.raises(
        ScoreError, match=r"B - A > 0: on reward, B - A is \+2, and its 95 % interval goes from -0.4841"
    ):
        found.require([read_claim("B - A > 0")])
    with pytest.raises(ScoreError, match=r"goes to \+4.484"):
        found.require([read_claim("B - A < 4")])


def test_a_claim_turned_round_is_the_same_test():
    claim = read_claim("A - B < 0")
    found = compared(played("old", 5, 5, 5), played("new", 6, 7, 8), claims=[claim])  # 2 [-0.484, 4.484]
    (one,) = found.differences
    assert (one.first, one.second, one.adjusted) == ("B", "A", one.p)
    found.require([read_claim("A - B < 0.49"), read_claim("A - B > -4.49")])
    with pytest.raises(
        ScoreError, match=r"A - B < 0: on reward, B - A is \+2, and its 95 % interval goes from -0.4841"
    ):
        found.require([claim])


def test_claims_on_unknown_names():
    with pytest.raises(RecipeError, match="'D - A > 0' names D, but the policies are A, B"):
        check_claims([read_claim("D - A > 0")], ["A", "B"])
    with pytest.raises(RecipeError, match="no metric 'wrods' that all policies have; did you mean 'words'"):
        compared(played("old", 5, 5), played("new", 6, 7), claims=[read_claim("wrods: B - A > 0")])


# ---------------------------------------------------------------------------------------------------------------- changes
def test_samples_that_changed_most():
    found = compared(played("old", [1, 2], [3, 3], [0, 0]), played("new", [1, 9], [3, 3], [2, 1]), shown=5)
    assert [one.prompt for one in found.changes] == ["prompt 0", "prompt 2"]
    assert found.changes[0].scores == {"A": 2.0, "B": 9.0}
    assert found.changes[0].completions == {"A": "old 2", "B": "new 9"}
    assert compared(played("old", 1), played("new", 3), metrics=("words",)).changes[0].scores == {"A": 2.0, "B": 6.0}


def test_other_prompts_cannot_be_paired():
    one, other = played("old", 1, 2), played("new", 1, 2)
    other.trajectories[1].prompt = "another"
    with pytest.raises(RunError, match="old and new have not played the same prompts: number 1 is 'prompt 1' for one"):
        compared(one, other)
    with pytest.raises(RunError, match="no prompt in common"):
        compared(played("old", 1, [None]), played("new", [None], 1))


# -------------------------------------------------------------------------------------------------------------- simulated
def pairs(rng, count, rho, effect=0.0):
    """Scores of two policies on as many prompts, of variance 1 and correlation rho."""
    shared = rng.normal(size=count) * math.sqrt(rho)
    one, other = (shared + rng.normal(size=count) * math.sqrt(1 - rho) for _ in range(2))
    return one, other + effect


def test_correlation_saves_prompts():
    one, other = pairs(np.random.default_rng(0), 20_000, 0.6, 0.2)
    paired = prompts_needed(other - one, range(20_000))
    variance = one.var(ddof=1) + other.var(ddof=1)
    unpaired = variance * ((1.959964 + 0.841621) / (other.mean() - one.mean())) ** 2
    assert paired / unpaired == pytest.approx(0.4, rel=0.03) and correlation(one, other) == pytest.approx(0.6, abs=0.02)


def test_equal_policies_are_told_apart_in_5_percent():
    from lmrl.evaluation.statistics import p_value

    rng = np.random.default_rng(0)
    wrong = sum(p_value(other - one, range(40)) < 0.05 for one, other in (pairs(rng, 40, 0.6) for _ in range(1000)))
    assert 30 <= wrong <= 70  # 50 expected, standard error 7


def test_means_are_of_prompts_not_of_rows():
    played_twice = played("a", 1, 2, 3, 5)
    for place, one in enumerate(played_twice.trajectories):
        one.prompt = f"question {place % 2}"
    assert list(means_by_cluster(played_twice, "reward", Scoring(["reward"])).values()) == [2.0, 3.5]
