"""The double-T maze against hand-written observations and rewards."""

import numpy as np
import pytest

from lmrl.environments.maze import Maze
from lmrl.errors import RecipeError
from lmrl.evaluation.suites import load_suite
from lmrl.policy.tokenizers import build_tokenizer
from lmrl.rollouts.sampler import Sampler
from lmrl.rollouts.task import build_task

START = {(1, 1): 0, (1, 3): 2, (1, 11): 9, (2, 3): 10, (5, 3): 16, (5, 6): 19, (6, 6): 23}
"""Numbers of some start positions, counted by hand in row-major order."""


@pytest.mark.parametrize(
    ("position", "walls"),
    [
        ((1, 1), "There are walls to your left, above you, below you."),
        ((1, 3), "There is a wall above you."),
        ((1, 11), "There are walls to your right, above you, below you."),
        ((2, 3), "There are walls to your right, to your left."),
        ((5, 3), "There are walls to your left, below you."),
        ((5, 6), "There is a wall above you."),
        ((6, 6), "There are walls to your right, to your left."),
    ],
)
def test_observations_by_hand(position, walls):
    goal, here = "The goal is at position 8, 6.", f"Your current position is at position {position[0]}, {position[1]}."
    options = {"start": START[position]}
    assert Maze().reset(options=options) == (f"{goal} {here} {walls}\n", {})
    assert Maze("partially").reset(options=options) == (f"{goal} {walls}\n", {})


def test_a_walk_by_hand():
    """Into a wall, with nonsense, back and forth, and to the goal."""
    maze = Maze()
    maze.reset(options={"start": START[5, 6]})
    turns = [
        # action, reward, row and column afterwards
        ("move up", -1.0, "5, 6"),  # a wall
        (" move left\n", -1.0, "5, 5"),
        ("Move right", -4.0, "5, 5"),
        ("", -4.0, "5, 5"),
        ("move right", -1.0, "5, 6"),
        ("move down", -1.0, "6, 6"),
        ("move down", -1.0, "7, 6"),
    ]
    for number, (action, reward, place) in enumerate(turns, start=1):
        observation, *rest = maze.step(action)
        assert f"Your current position is at position {place}. " in observation
        assert rest == [reward, False, False, {"metrics": {"reached": 0.0, "steps": number}}], action
    assert maze.step("move down") == ("", 0.0, True, False, {"metrics": {"reached": 1.0, "steps": 8}})


@pytest.mark.parametrize("observed", ["fully", "partially"])
@pytest.mark.parametrize("level", ["char", "word"])
def test_the_optimum_over_all_starts(observed, level):
    """-171 / 25, through the shipped suite and either kind of vocabulary, in which nothing is unknown."""
    suite = load_suite("maze", [f"task.observed={observed}"])
    tokenizer = build_tokenizer(level, Maze(observed).texts())
    task = build_task(suite.task, tokenizer)
    played = Sampler(task).play_scripted("optimal", task.heldout, ("test",))
    assert len(played) == 25 and all(trajectory.terminated for trajectory in played)
    assert np.mean([trajectory.reward for trajectory in played]) == pytest.approx(-6.84, abs=1e-12)
    for trajectory in played:
        assert trajectory.metrics == {"reached": 1.0, "steps": 1 - trajectory.reward}
        assert all(tokenizer.unk_token_id not in segment.tokens for segment in trajectory.segments)


def test_a_truncated_episode_has_its_metrics():
    suite = load_suite("maze", ["task.max_turns=5"])
    task = build_task(suite.task, build_tokenizer("char", Maze().texts()))
    [trajectory] = Sampler(task).play_scripted("random", [0], ("test",))
    assert trajectory.metrics == {"reached": 0.0, "steps": 5.0} and trajectory.reward == -5
    assert not trajectory.terminated


def test_random_play_and_starts_follow_their_seeds():
    def actions(seed):
        maze, rng = Maze(), np.random.default_rng(seed)
        maze.reset(options={"start": 0})
        return [maze.act("random", rng) for _ in range(50)]

    assert actions(0) == actions(0) != actions(1)
    assert set(actions(0)) == {"move left", "move right", "move up", "move down"}
    assert Maze().reset(seed=3) == Maze().reset(seed=3)
    assert len({Maze().reset(seed=seed)[0] for seed in range(300)}) == Maze.num_starts == 25
    with pytest.raises(RecipeError, match="not 'half'"):
        Maze("half")
