"""Environments that say which actions are allowed: the policy samples no others, and learns their probabilities."""

import json

import pytest
import torch

import lmrl
from lmrl.engines.base import Sampling
from lmrl.engines.hf import HFEngine
from lmrl.environments import TextEnvironment
from lmrl.environments.calls import allowed_actions
from lmrl.environments.gymnasium_text import GymnasiumText
from lmrl.environments.maze import MOVES, Maze
from lmrl.environments.random_walks import RandomWalks
from lmrl.errors import DataError, PluginError, RecipeError
from lmrl.objectives.correction import sampled_logprobs
from lmrl.recipe.files import load_recipe
from lmrl.rollouts.allowed_actions import ActionTries
from lmrl.rollouts.sampler import Sampler
from lmrl.rollouts.task import Task, build_task
from lmrl.trajectories.batch import to_batch
from lmrl.trajectories.render import Renderer


class Ladder(TextEnvironment):
    """Three turns, in which `up` or `down` is allowed, then also `leap`, then anything; refuses what it did not list."""

    num_starts = 2
    listed = (["up", "down"], ["up", "down", "leap"], None)

    def __init__(self, listed=listed):
        self.listed = listed

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.turn = 0
        return "go", {}

    def allowed_actions(self):
        return self.listed[self.turn]

    def step(self, action):
        assert self.listed[self.turn] is None or action in self.listed[self.turn], action
        self.turn += 1
        return "on", float(len(action)), self.turn == 3, False, {}


def play(policy, make, samples=8, history="all"):
    task = Task(
        make, Renderer(policy.tokenizer), [0, 1], [0], max_turns=3, history=history, max_failed=1, allowed_actions=True
    )
    sampler = Sampler(task, HFEngine(policy), policy.decode)
    return sampler.play([0, 1], samples, Sampling(max_new_tokens=6), ("test",))


@pytest.mark.parametrize("history", ["all", 1])
def test_listed_actions_are_played_and_recorded(tiny_policy, history):
    played = play(tiny_policy, Ladder, history=history)
    assert not any(one.failure for one in played)
    assert {one.turns[0].action for one in played} == {"up", "down"}
    assert {one.turns[1].action for one in played} == {"up", "down", "leap"}
    assert len({one.turns[2].action for one in played}) > 3
    restricted = [len(segment.allowed) for one in played for segment in one.segments]
    assert all(restricted) if history == "all" else restricted.count(0) == len(played)


def test_learner_agrees_with_the_sampler(tiny_policy):
    played = play(tiny_policy, Ladder)
    learned = torch.cat(tiny_policy.score(to_batch(played))["logprobs"])
    sampled = torch.cat([sampled_logprobs(one) for one in played])
    torch.testing.assert_close(learned, sampled, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("listed", "failure"),
    [
        ([], "expected a list of texts"),
        ("up", "expected a list of texts"),
        ([1], "expected a list of texts"),
    ],
)
def test_a_wrong_list_fails_the_episode(tiny_policy, listed, failure):
    played = play(tiny_policy, lambda: Ladder((["up"], listed, None)), samples=1)
    assert all(failure in one.failure and one.reward is None for one in played)


def test_actions_without_an_end_may_not_be_prefixes(tiny_policy):
    class NoEnd(Renderer):
        def action(self, text):
            return self.plain(text)

    with pytest.raises(DataError, match="'up' and 'upper' cannot be told apart"):
        ActionTries(NoEnd(tiny_policy.tokenizer)).of(("up", "upper"))
    assert ActionTries(Renderer(tiny_policy.tokenizer)).of(("up", "upper")).longest == 6


def test_shipped_environments_list_what_they_take():
    maze = Maze()
    maze.reset(options={"start": 0})
    assert allowed_actions(maze) == tuple(MOVES)
    walks = RandomWalks(stepwise=True)
    node, _ = walks.reset(options={"start": 0})
    listed = allowed_actions(walks)
    assert [ord(one) - ord("a") for one in listed] == walks.edges[ord(node) - ord("a")].nonzero()[0].tolist()
    _, _, over, _, _ = walks.step(listed[0])
    assert over == (listed[0] == "a") and allowed_actions(RandomWalks(nodes=5, graph=1)) is None


def test_taxi_allows_what_changes_something():
    taxi = GymnasiumText("Taxi-v4")
    observation, _ = taxi.reset(seed=3)
    for _ in range(20):
        for word in taxi.allowed_actions():
            assert taxi.env.unwrapped.P[taxi.env.unwrapped.s][taxi.words.index(word)][0][1] != taxi.env.unwrapped.s
        observation, *_ = taxi.step(taxi.allowed_actions()[0])
    assert 0 < len(taxi.allowed_actions()) < 6


def test_a_run_earns_no_reward_of_illegal_moves(tmp_path):
    """PPO in the maze from a random start: no text but a move, and the sampler's probabilities are the learner's."""
    config = "{model_type: llama, hidden_size: 16, intermediate_size: 32, num_hidden_layers: 1, num_attention_heads: 2, num_key_value_heads: 2}"
    (tmp_path / "maze.yaml").write_text(
        f"model: {{config: {config}}}\n"
        "task: {environment: maze, max_turns: 4, allowed_actions: true}\n"
        "rollouts: {prompts: 4, samples: 2, max_new_tokens: 12}\n"
        "objective: {name: ppo}\ntraining: {steps: 2, checkpoint_every: 0, threads: 1}\n"
    )
    result = lmrl.train(load_recipe(tmp_path / "maze.yaml"), output=tmp_path / "run")
    lines = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "train"]
    assert len(steps) == 2 and all(-4 <= line["reward"] <= 0 for line in steps)  # 4 turns of -4 each would be -16
    assert all(abs(line["sampler_kl"]) < 1e-4 and line["sampler_gap"] < 1e-3 for line in steps)


MAZE = "model: {config: {model_type: llama}}\nobjective: {name: ppo}\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "task: {environment: maze, allowed_actions: true}\nrollouts: {engine: vllm}",
            "engine 'vllm' cannot: set rollouts.engine=hf",
        ),
        ("task: {environment: random_walks, allowed_actions: true}", "lists the next nodes: set `stepwise: true`"),
    ],
)
def test_what_cannot_be_restricted_is_refused(tmp_path, text, message):
    (tmp_path / "recipe.yaml").write_text(MAZE + text)
    with pytest.raises(RecipeError, match=message):
        load_recipe(tmp_path / "recipe.yaml")


def test_an_environment_without_a_list_is_refused(tmp_path, tiny_policy):
    (tmp_path / "mine.py").write_text(
        "from lmrl import TextEnvironment\nclass Mine(TextEnvironment):\n"
        "    def reset(self, *, seed=None, options=None): return 'go', {}\n"
        "    def step(self, action): return '', 0.0, True, False, {}\n"
    )
    (tmp_path / "recipe.yaml").write_text(MAZE + "task: {environment: 'mine.py:Mine', allowed_actions: true}")
    recipe = load_recipe(tmp_path / "recipe.yaml")
    with pytest.raises(PluginError, match=r"has no method allowed_actions\(\): add it, or leave the key out"):
        build_task(recipe.task, tiny_policy.tokenizer)
