"""The memory of episodes held as objects: by hand, and as Python allocates it."""

import tracemalloc

import pytest

from lmrl.recipe.estimates import memory
from lmrl.recipe.files import load_recipe
from lmrl.recipe.held_episodes import episode_bytes, held_bytes, held_episodes, turns_an_episode
from lmrl.trajectories.trajectory import Segment, Trajectory, Turn


@pytest.mark.parametrize(
    ("history", "expected"),
    [
        (1, 610 + 3 * 500 + 3 * 234 + 30 * 36 + 30 * 8),
        (2, 610 + 3 * 500 + 3 * 234 + 60 * 36 + 30 * 8),
        ("all", 610 + 500 + 3 * 234 + 30 * 36 + 30 * 8),
    ],
)
def test_bytes_of_an_episode(history, expected):
    """Three turns of ten tokens."""
    assert episode_bytes(3, history, 10) == expected


@pytest.mark.parametrize("history", [1, "all"])
def test_bytes_are_what_python_allocates(history):
    turns, observed, acted = 30, 22, 4

    def play(number):
        one, text = Trajectory([], "", ""), 0
        for turn in range(turns):
            if history == 1 or not one.segments:
                one.segments.append(Segment())
            one.segments[-1].observe([5] * observed)
            one.segments[-1].act([6] * acted, None, turn)
            observation, action = f"{number} {turn}".ljust(4 * observed), f"{number}, {turn}".ljust(4 * acted)
            one.turns.append(Turn(observation, action, -1.0 * turn))
            text += len(observation) + len(action)
        one.completion = f"{number}".ljust(text)
        return one

    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    held = [play(number) for number in range(40)]
    allocated = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert allocated / len(held) == pytest.approx(episode_bytes(turns, history, observed + acted), rel=0.15)


def test_which_episodes_are_held():
    maze = load_recipe("maze/ilql")
    assert held_episodes(maze) == 1000 and turns_an_episode(maze.task) == 100
    fresh = load_recipe("random_walks/ppo", ["rollouts.prompts=3", "rollouts.samples=5"])
    assert held_episodes(fresh) == 15 and turns_an_episode(fresh.task) == 1
    stepwise = load_recipe("random_walks/ppo", ["task.stepwise=true", "task.max_length=8"])
    assert turns_an_episode(stepwise.task) == 7
    short = load_recipe("random_walks/ppo", ["task.stepwise=true", "task.max_turns=4"])
    assert turns_an_episode(short.task) == 4


def test_a_replay_buffer_is_no_larger_than_what_is_played():
    changes = ["source={name: mixture, player: random, episodes: 100, replay: 50}", "objective={name: ilql}"]
    played = ["rollouts.prompts=3", "rollouts.samples=2"]
    assert held_episodes(load_recipe("random_walks/bc", [*changes, *played, "training.steps=4"])) == 100 + 24
    assert held_episodes(load_recipe("random_walks/bc", [*changes, *played, "training.steps=40"])) == 100 + 50


def test_episodes_are_in_the_estimate_of_a_process():
    """Not in that of an accelerator; and those of prompts are not counted."""
    maze = load_recipe("maze/ilql")
    # 1,000 episodes of 100 turns of 4 new tokens and, as guessed, 16 observed ones
    expected = 1000 * (610 + 100 * (500 + 234 + 20 * 44))
    assert held_bytes(maze, 20) == expected
    assert memory(maze)["episodes"] == pytest.approx(expected / 2**20)
    assert "episodes" not in memory(maze, accelerator=True)
    assert held_bytes(load_recipe("arithmetic/grpo"), 20) == 0
