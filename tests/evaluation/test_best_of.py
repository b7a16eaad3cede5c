"""pass@k, maj@k and best@k against all subsets."""

from itertools import combinations
from statistics import mean

import pytest

from lmrl.errors import RecipeError
from lmrl.evaluation.best_of import answer_of, best_at, majority_at, pass_at, several_samples
from lmrl.evaluation.scoring import Scoring, check_metrics
from lmrl.trajectories.trajectory import Trajectory


def test_names():
    assert several_samples("reward") is None and several_samples("pass@0") is None
    found = several_samples("best@8/exact")
    assert (found.kind, found.count, found.metric) == ("best", 8, "exact")


@pytest.mark.parametrize("k", [1, 2, 5, 6])
def test_expected_over_all_subsets(k):
    rewards, values = [0.5, 2.0, 2.0, -1.0, 0.5, 3.0], [1.0, 0.0, 1.0, 1.0, 0.0, 0.0]
    subsets = list(combinations(range(6), k))
    assert pass_at(k, 6, 3) == pytest.approx(mean(any(values[row] for row in rows) for rows in subsets))

    def best(rows):
        highest = max(rewards[row] for row in rows)
        return mean(values[row] for row in rows if rewards[row] == highest)

    def best_over_ties(rows):
        # Equally high samples stand for each other, in the subset or not.
        highest = max(rewards[row] for row in rows)
        return mean(values[row] for row in range(6) if rewards[row] == highest)

    assert best_at(k, rewards, values) == pytest.approx(mean(map(best_over_ties, subsets)))
    assert best_at(k, rewards, values) == pytest.approx(mean(map(best, subsets)))


def test_rewards_equal_but_for_rounding_tie():
    assert best_at(2, [0.1 + 0.2, 0.3], [1.0, 0.0]) == 0.5
    solved = several_samples("pass@1")([0.7 + 0.2 + 0.1, 0.0], [0.7 + 0.2 + 0.1, 0.0], ["", ""])
    assert solved == 0.5


def test_pass_at_as_published():
    # Chen et al. 2021: 1 - (1 - c/n)... the product form of their listing.
    n, c, k = 200, 13, 10
    product = 1.0
    for number in range(n - c + 1, n + 1):
        product *= 1 - k / number
    assert pass_at(k, n, c) == pytest.approx(1 - product)


def test_majority_by_hand():
    # Of three samples a, a, b with scores 1, 1, 0: all three vote a; of two, {a, a} votes a and two subsets tie.
    assert majority_at(3, ["a", "a", "b"], [1, 1, 0]) == 1
    assert majority_at(2, ["a", "a", "b"], [1, 1, 0]) == pytest.approx((1 + 0.5 + 0.5) / 3)
    assert majority_at(1, ["a", "a", "b"], [1, 1, 0]) == pytest.approx(2 / 3)


def test_majority_of_many_is_reproducible():
    answers = [str(number % 3) for number in range(40)]
    values = [float(answer == "0") for answer in answers]
    assert majority_at(20, answers, values) == majority_at(20, answers, values)
    assert 0.3 < majority_at(20, answers, values) < 0.7


def test_answers_that_completions_vote_for():
    assert answer_of("First 3, then\n#### 42 ") == "42" and answer_of(r"so \boxed{ x + 1 }.") == "x + 1"
    assert answer_of(r"\boxed{7}, no: \boxed{\sqrt{\frac{1}{2}}}.") == r"\sqrt{\frac{1}{2}}"
    assert answer_of("  The Sun. ") == "the sun"


def episode(group, number, reward, completion="a", **components):
    return Trajectory(
        [],
        f"prompt {group}",
        completion,
        reward=reward,
        components=components or {"judge": reward},
        group=group,
        episode=number,
    )


def test_metrics_of_a_suite():
    episodes = [
        episode(0, 0, 1.0, right=1.0),
        episode(0, 1, 0.0, right=0.0),
        episode(1, 2, 0.0, right=0.0),
        episode(1, 3, 0.0, right=0.0),
    ]
    scores = Scoring(["reward", "pass@2", "best@2/right", "maj@1"]).report(episodes)
    assert list(scores)[:4] == ["reward", "pass@2", "best@2/right", "maj@1"]
    assert scores["pass@2"]["mean"] == 0.5 and scores["maj@1"]["mean"] == 0.25 and scores["pass@2"]["clusters"] == 2
    assert 0 <= scores["pass@2"]["ci95"][0] < scores["pass@2"]["ci95"][1] <= 1


def test_prompts_with_too_few_judged_samples_are_left_out():
    episodes = [episode(0, 0, 1.0), episode(0, 1, 0.0), episode(1, 2, 1.0)]
    assert Scoring(["reward", "pass@2"]).report(episodes)["pass@2"]["n"] == 1
    with pytest.raises(RecipeError, match="'pass@3' needs 3 judged samples of a prompt: set samples=3"):
        Scoring(["reward", "pass@3"]).report(episodes)


def test_mistakes_in_metrics():
    check_metrics(["reward", "pass@4"], 4)
    with pytest.raises(RecipeError, match="'pass@4' takes 4 samples of a prompt: set samples=4"):
        check_metrics(["reward", "pass@4"], 3)
    with pytest.raises(RecipeError, match="'best@1/length' needs 1 judged samples of a prompt"):  # nothing chooses
        Scoring(["length", "best@1/length"]).report([episode(0, 0, None), episode(0, 1, None)])
    with pytest.raises(RecipeError, match="put reward or return first"):
        check_metrics(["pass@4"], 4)
    with pytest.raises(RecipeError, match=r"counts scores of 0 and 1, but there is 0.3: name such a one, pass@1/NAME"):
        Scoring(["reward", "pass@1"]).report([episode(0, 0, 0.3)])
