"""Environments of other libraries: gymnasium's with few actions, reasoning-gym's by name."""

import importlib.util
import pickle
import random
from types import SimpleNamespace

import gymnasium
import numpy as np
import pytest

from lmrl.environments import environment_factory
from lmrl.environments.check import _within_limits, check_environment
from lmrl.environments.gymnasium_text import as_text
from lmrl.errors import PluginError
from lmrl.recipe import CustomTask

GAMES = ["FrozenLake-v1", "Taxi-v4", "Blackjack-v1", "CliffWalking-v1", "CartPole-v1", "MountainCar-v0", "Acrobot-v1"]
needs_reasoning_gym = pytest.mark.skipif(
    importlib.util.find_spec("reasoning_gym") is None, reason="reasoning_gym is not installed"
)
TASKS = ["leg_counting", "basic_arithmetic", "chain_sum", "spell_backward", "letter_counting", "number_sorting", "gcd", "lcm",
         "calendar_arithmetic", "word_sorting"]  # fmt: skip


def make(name, **options):
    return environment_factory(CustomTask(environment=name, **options))()


@pytest.mark.parametrize("actions", [[0, 1], [True, False], ["go  left", "right"], ["left", " right"], ["", "right"]])
def test_words_that_no_answer_is(actions):
    with pytest.raises(PluginError, match=r"task.actions: .* is no text that an answer can be"):
        make("gymnasium:CartPole-v1", actions=actions)
    words = make("gymnasium:CartPole-v1", actions=["1", "go right"])
    words.reset(seed=0)
    assert words.step(" go\n right")[4] == words.step("1")[4] == {"metrics": {"illegal": 0}}


def test_rounding_leaves_no_limits():
    world, played = (
        SimpleNamespace(metric_limits={"return": (0.0, 0.3)}),
        SimpleNamespace(rewards=[0.1, 0.2], metrics={}),
    )
    assert sum(played.rewards) > 0.3 and next(_within_limits(world, [played])).passed


def test_a_larger_lake_has_the_same_words():
    large = make("gymnasium:FrozenLake8x8-v1")
    assert large.reset(seed=0)[0] == "row 0 column 0" and large.words == ["left", "down", "right", "up"]


@pytest.mark.parametrize("game", GAMES)
def test_gymnasium_passes_every_check(game):
    findings = list(check_environment(CustomTask(environment=f"gymnasium:{game}"), episodes=3))
    assert not [finding for finding in findings if finding.passed is False], findings
    environment = make(f"gymnasium:{game}")
    assert pickle.loads(pickle.dumps(environment)).words == environment.words
    words = {word for text in environment.texts() for word in text.split()}
    rng, observation = np.random.default_rng(1), environment.reset(seed=7)[0]
    for _ in range(20):
        observation, _, terminated, truncated, _ = environment.step(environment.act("random", rng))
        if terminated or truncated:
            break
        assert game in ("CartPole-v1", "MountainCar-v0", "Acrobot-v1") or set(observation.split()) <= words


class Measured(gymnasium.Env):
    action_space, observation_space = gymnasium.spaces.Discrete(2), gymnasium.spaces.Discrete(3)

    def reset(self, *, seed=None, options=None):
        self.count = 0
        return 0, {}

    def step(self, action):
        self.count += int(action)
        return self.count, 0.0, False, False, {"metrics": {"ones": self.count, "illegal": 9}}


def test_gymnasium_metrics_are_kept():
    gymnasium.register("Measured-v0", Measured)
    game = make("gymnasium:Measured-v0")
    game.reset(seed=0)
    said = [game.step(action)[4]["metrics"] for action in ("1", "5", "1")]
    assert said == [{"ones": 1, "illegal": 0}, {"ones": 1, "illegal": 1}, {"ones": 2, "illegal": 1}]
    game.reset(seed=1)
    assert game.step("5")[4] == {"metrics": {"illegal": 1}}


def test_what_the_games_say():
    lake = make("gymnasium:FrozenLake-v1", is_slippery=False)
    assert lake.reset(seed=0)[0] == "row 0 column 0"
    assert lake.step(" right ")[0] == "row 0 column 1" and lake.step("down")[:3] == ("row 1 column 1", 0.0, True)
    assert lake.reset(seed=0) and lake.step("fly") == (
        "row 0 column 0",
        -1.0,
        False,
        False,
        {"metrics": {"illegal": 1}},
    )
    taxi = make("gymnasium:Taxi-v4")
    text = taxi.reset(seed=0)[0]
    row, column, passenger, destination = taxi.env.unwrapped.decode(taxi.env.unwrapped.s)
    stands = ["at red", "at green", "at yellow", "at blue", "in the taxi"]
    assert (
        text == f"taxi at row {row} column {column} passenger {stands[passenger]} destination {stands[destination][3:]}"
    )
    own = make("gymnasium:CartPole-v1", actions=["l", "r"], template="state {observation} move?")
    assert own.words == ["l", "r"] and own.reset(seed=0)[0].startswith("state ") and own.texts()


def test_observations_as_text():
    assert as_text((np.int64(3), [1, True])) == "3 1 1"
    assert as_text({"speed": np.array([0.5, -1.234]), "name": "left"}) == "speed 0.50 -1.23 name left"


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("gymnasium:FrozenLak-v1", {}, "gymnasium has no 'FrozenLak-v1'"),
        ("gymnasium:Pendulum-v1", {}, "expected a Discrete space"),
        ("gymnasium:CartPole-v1", {"actions": ["left"]}, "has 2 actions"),
        ("gymnasium:CartPole-v1", {"template": "state"}, "{observation} in it"),
        ("reasoning_gym:leg_countin", {}, "did you mean 'leg_counting'"),
    ],
)
def test_refusals(name, options, message):
    if name.startswith("reasoning") and importlib.util.find_spec("reasoning_gym") is None:
        pytest.skip("reasoning_gym is not installed")
    with pytest.raises(PluginError, match=message):
        make(name, **options)


@needs_reasoning_gym
@pytest.mark.parametrize("task", TASKS)
def test_reasoning_gym_scores_its_own_answers(task):
    environment = make(f"reasoning_gym:{task}", size=5)
    question, _ = environment.reset(options={"start": 3})
    assert question == environment.data[3]["question"] and environment.num_starts == 5
    assert environment.step(str(environment.entry["answer"]))[1:3] == (1.0, True)
    assert environment.step("no idea")[1] < 1.0


@needs_reasoning_gym
def test_ten_drawn_tasks_play_an_episode():
    """Drawn by a fixed seed from all that the library has."""
    from reasoning_gym.factory import DATASETS

    for name in random.Random(19).sample(sorted(DATASETS), 10):
        environment = make(f"reasoning_gym:{name}", size=3)
        question, _ = environment.reset(seed=1)
        observation, score, terminated, truncated, info = environment.step("no idea")
        assert question and observation == "" and terminated and not truncated, name
        assert 0.0 <= score < 1.0 and info["metrics"] == {"correct": 0.0}, (name, score)
        again, _ = environment.reset(seed=1)
        assert again == question, name


@needs_reasoning_gym
def test_answers_between_tags():
    environment = make("reasoning_gym:chain_sum", size=2, answer_tag="answer")
    environment.reset(options={"start": 0})
    answer = environment.entry["answer"]
    assert environment.step(f"It is <answer> {answer} </answer>.")[1] == 1.0 and environment.step(str(answer))[1] < 1.0
