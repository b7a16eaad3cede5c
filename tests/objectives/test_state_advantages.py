"""Advantages by state, and the running scale of advantages."""

import json
import math

import pytest

from lmrl.objectives.turns import (
    less_state_mean,
    repeated,
    visits_of,
)
from lmrl.trajectories.chain import rewards_and_turns
from lmrl.trajectories.trajectory import Turn
from tests.objectives.test_group import advantages_of, game, objective


# ------------------------------------------------------------------------------------------------------- states (GiGPO)
def walk(*steps, group=0):
    """An episode of a token a turn: (observation, reward)."""
    trajectory = game(*[reward for _, reward in steps], group=group)
    trajectory.turns = [Turn(state, "act", reward) for state, reward in steps]
    return trajectory


WALKS = [walk(("a", 0.0), ("b", 0.0), ("a", 0.0), ("c", 1.0)), walk(("a", 0.0), ("d", 0.0)), walk(("a", 9.0), group=1)]


def test_visits_by_hand():
    # gamma .5, first walk: returns .125 .25 .5 1 of a b a c; second: 0 0 of a d. Of group 0, a is visited three times
    # with mean .625 / 3; group 1 has a once, and nothing to compare it with.
    earned = [rewards_and_turns(one) for one in WALKS]
    states = [[turn.observation for turn in one.turns] for one in WALKS]
    visits, turn_N = visits_of(earned, [0, 0, 1], states, 0.5)
    assert visits.to_go_K.tolist() == [0.125, 0.25, 0.5, 1.0, 0.0, 0.0, 9.0]
    assert visits.index_K.tolist() == [0, 1, 0, 2, 0, 3, 0] and turn_N.tolist() == [*range(7)]
    mean = 0.625 / 3
    expected = [0.125 - mean, 0.0, 0.5 - mean, 0.0, -mean, 0.0, 0.0]
    assert less_state_mean(visits).tolist() == pytest.approx(expected)
    assert repeated(visits).tolist() == [True, False, True, False, True, False, False]


def test_state_advantages_are_added(tiny_policy):
    # Rewards 1 and 0 at the end: what the turns of an episode share is +.5 and -.5 with Dr. GRPO (no scale).
    walks = [walk(("a", 0.0), ("b", 0.0), ("a", 1.0)), walk(("a", 0.0), ("b", 0.0))]
    plain = advantages_of(objective("dr_grpo"), tiny_policy, walks)
    assert plain == pytest.approx([0.5] * 3 + [-0.5] * 2)
    # a: returns .25 and 1 and 0, mean 1.25 / 3; b: .5 and 0, mean .25. Twice that is added.
    method = objective("dr_grpo", state_weight=2.0, state_gamma=0.5)
    batch = method.prepare(tiny_policy, walks)
    mean = 1.25 / 3
    expected = [0.5 + 2 * (0.25 - mean), 0.5 + 0.5, 0.5 + 2 * (1 - mean), -0.5 - 2 * mean, -0.5 - 0.5]
    assert batch.get("advantages").tolist() == pytest.approx(expected)
    assert batch.stats["states_repeated"] == 1.0 and batch.stats["groups"] == 2 - 1


def test_state_scale_is_the_groups(tiny_policy):
    # One state, returns 1 and 0 and 0 in three episodes of a turn: both advantages are (R - 1/3) / (1 / sqrt 3).
    walks = [walk(("a", reward)) for reward in (1.0, 0.0, 0.0)]
    once = advantages_of(objective("grpo"), tiny_policy, walks)
    twice = advantages_of(objective("grpo", state_weight=1.0), tiny_policy, walks)
    assert once == pytest.approx([2 / 3 * 3**0.5, -(3**0.5) / 3, -(3**0.5) / 3])
    assert twice == pytest.approx([2 * one for one in once])


def test_running_scale_remembers_larger_batches(tiny_policy):
    method = objective("grpo", scale_rewards="running")

    def earned(best):
        return advantages_of(method, tiny_policy, [game(best, 0.0), game(0.0, 0.0)])

    assert earned(10.0) == pytest.approx([1, 0, -1, 0], abs=1e-6)  # 5 is the root mean square of +5 and -5
    small = 0.1 / math.sqrt(25 + 0.1 * (0.01 - 25))
    assert earned(0.2) == pytest.approx([small, 0, -small, 0], rel=1e-5)
    resumed = objective("grpo", scale_rewards="running")
    resumed.load_state(json.loads(json.dumps(method.state())))
    assert earned(40.0) == pytest.approx([1, 0, -1, 0], abs=1e-6)  # larger than what is remembered
    assert advantages_of(resumed, tiny_policy, [game(40.0, 0.0), game(0.0, 0.0)])[0] == pytest.approx(1, abs=1e-6)
    assert resumed.state() == method.state()
    resumed.load_state({})  # of a run of before
    assert resumed.state() == {"squares": {}}
