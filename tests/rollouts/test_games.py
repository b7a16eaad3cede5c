"""Self-play: a trajectory a side, groups of one side, and failures of whole games."""

import pytest

from lmrl.engines.base import Sampling
from lmrl.errors import EngineError
from lmrl.objectives.groups import groups_of
from lmrl.recipe import NimTask, Rollouts
from lmrl.rollouts.collect import collect
from lmrl.rollouts.sampler import Sampler
from lmrl.rollouts.task import build_task
from tests.rollouts.echo import Echo, letters, sampler_of


@pytest.fixture
def tokenizer():
    return letters()


def test_each_side_is_a_trajectory(tokenizer):
    """Player 0 says a, 1 says b, 0 says a, 1 says x. Player 1 earns .25 before its first turn, which goes to that turn."""
    calls = []

    def choose(context):
        if "p0" in context:
            return "a"
        calls.append(context)
        return "b" if len(calls) == 1 else "x"

    sampler = sampler_of(tokenizer, choose, max_turns=9, history=1)
    first, second = sampler.play([None], 1, Sampling(), ("s",))
    assert [(one.observation, one.action, one.reward) for one in first.turns] == [
        ("p0:", "a", 1.25),
        ("p0:b", "a", 1.25),
    ]
    assert [(one.observation, one.action, one.reward) for one in second.turns] == [
        ("p1:a", "b", 1.5),
        ("p1:a", "x", 1.0),
    ]
    assert (first.reward, second.reward) == (2.5, 2.5) and first.terminated and second.terminated
    assert first.metrics == {"moves": 1.0, "won": 0.0} and first.columns == second.columns == {"seed": first.seed}
    moves = [[0, "a"], [1, "b"], [0, "a"], [1, "x"]]
    assert first.game == {"player": 0, "start": None, "moves": moves}
    assert second.game == {"player": 1, "start": None, "moves": moves}


def test_only_own_turns_are_actions(tokenizer):
    """With the whole history in sight, what the other said is context, tokens of one's own are as sampled."""
    sampler = sampler_of(tokenizer, lambda context: "b" if context.endswith("p1:a") else "a", max_turns=2)
    for side, trajectory in enumerate(sampler.play([None], 1, Sampling(), ("s",))):
        (segment,) = trajectory.segments
        acted = tokenizer.decode([segment.tokens[place] for place in segment.actions], skip_special_tokens=True)
        assert acted.replace(" ", "") == ("aa", "bb")[side]
        assert all(segment.logprobs[place] == -0.5 for place in segment.actions)
        assert sum(segment.rewards) == pytest.approx(trajectory.reward)


def test_a_limit_truncates_all_sides(tokenizer):
    """After two moves a player; each side ends with what it would have seen next."""
    sampler = sampler_of(tokenizer, lambda context: "a", max_turns=2)
    first, second = sampler.play([None], 1, Sampling(), ("s",))
    assert (len(first.turns), len(second.turns)) == (2, 2) and not first.terminated and not second.terminated
    assert (first.final_observation, second.final_observation) == ("p0:a", "p1:a")
    assert first.segments[-1].turns[-1] == -1


def test_a_context_that_is_full_ends_the_game(tokenizer):
    sampler = sampler_of(tokenizer, lambda context: "a", max_turns=50, positions=24)
    first, second = sampler.play([None], 1, Sampling(max_new_tokens=4), ("s",))
    assert not first.terminated and not second.terminated and 1 < len(first.turns) < 50
    assert max(len(one.segments[0].tokens) for one in (first, second)) <= 24


def test_a_first_observation_beyond_the_model_fails(tokenizer):
    sampler = sampler_of(tokenizer, lambda context: "a", positions=6)
    played = sampler.play([None], 1, Sampling(max_new_tokens=4), ("s",))  # p0: has three tokens
    message = "model has 6 positions, but a first observation of 3 tokens and max_new_tokens=4 need 7"
    assert [one.failure for one in played] == [message] * 2


def test_groups_are_of_one_side_and_one_start(tokenizer):
    """Two starts with three samples: four groups of three, numbered by start and side."""
    sampler = sampler_of(tokenizer, lambda context: "x")
    played = sampler.play([None, None], 3, Sampling(), ("s",), first=5)
    assert [one.group for one in played] == [10, 11] * 3 + [12, 13] * 3
    assert [one.episode for one in played] == list(range(30, 42))
    assert [len(group) for group in groups_of(played)] == [3] * 4
    assert len({one.seed for one in played if one.group in (10, 11)}) == 1
    # `x` ends a game at once: the second side has no turn, counts with what it earned, and is not learned from.
    assert [one.reward for one in played] == [1.0, 0.25] * 6
    assert [one.group for one in sampler.task.keep_groups(played)] == [10] * 3 + [12] * 3


def test_games_form_one_batch_a_move(tokenizer):
    sampler = sampler_of(tokenizer, lambda context: "a", max_turns=2)
    sampler.play([None] * 4, 2, Sampling(), ("s",))
    assert [len(batch) for batch in sampler.engine.batches] == [8, 8, 8, 8]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_failure_is_of_the_whole_game(tokenizer, workers):
    sampler = sampler_of(tokenizer, lambda context: "!" if context.endswith("p1:a") else "a", workers=workers)
    before = sampler.task.make
    made = []
    sampler.task.make = lambda: made.append(before()) or made[-1]
    played = sampler.play([None, None], 1, Sampling(), ("s",))
    assert {one.failure for one in played} == {"environment raised RuntimeError: exclaimed"}
    assert [one.reward for one in played] == [None] * 4 and [len(one.turns) for one in played] == [1] * 4
    assert len(made) == 4  # those of the two games that failed are made anew


def test_an_error_of_the_engine_is_not_of_the_game(tokenizer):
    def choose(context):
        raise EngineError("the engine stopped")

    with pytest.raises(EngineError, match="the engine stopped"):
        sampler_of(tokenizer, choose).play([None], 1, Sampling(), ("s",))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": lambda self, action: ([1.0], True, False, {})}, "expected one for each of 2 players"),
        ({"step": lambda self, action: ([1.0, float("nan")], True, False, {})}, "returned the reward nan"),
        ({"step": lambda self, action: (1.0, True, False)}, "expected rewards, terminated, truncated, info"),
        ({"reset": lambda self, **_: None}, "expected the info"),
        ({"observe": lambda self, player: 3}, "the observation is 3 (int)"),
        ({"to_move": 2}, "to_move is 2; expected a player from 0 to 1"),
    ],
)
def test_wrong_games_are_failures(tokenizer, change, message):
    wrong = type("Wrong", (Echo,), change | ({"reset": lambda self, **_: {}} if "to_move" in change else {}))
    played = sampler_of(tokenizer, lambda context: "a", make=wrong).play([None], 1, Sampling(), ("s",))
    assert all(message in one.failure for one in played)


def test_collected_games_are_numbered_throughout(tokenizer):
    task = build_task(NimTask(environment="nim", sticks=7), tokenizer)
    parts = list(collect(Sampler(task), {"random": 0.5, "optimal": 0.5}, Rollouts(prompts=4), 10, 0))
    played = [one for part in parts for one in part]
    assert len({one.episode for one in played}) == len(played) and all(one.turns for one in played)
    assert {one.group // 2 for one in played} == set(range(10)) and {one.player for one in played} == {
        "random",
        "optimal",
    }
    assert all(one.group == one.episode and one.game["player"] == one.episode % 2 for one in played)
