"""Environments on an OpenEnv server, with the real package if it can be imported."""

import json
import pickle
import socket
import threading
import time

import pytest

from lmrl.engines.base import Sampling
from lmrl.environments import environment_factory
from lmrl.environments.openenv import only_text
from lmrl.errors import PluginError
from lmrl.policy.tokenizers import build_tokenizer
from lmrl.recipe import CustomTask
from lmrl.rollouts.replay import replay_episode
from lmrl.rollouts.sampler import Sampler
from lmrl.rollouts.task import build_task
from lmrl.training.monitoring.measures import sample_line
from tests.rollouts.test_episodes import Batches


def test_the_field_of_the_text_is_found():
    text, number = {"type": "string"}, {"type": "integer"}
    assert only_text({"properties": {"message": text, "reward": text, "n": number}}) == "message"
    assert only_text({"properties": {"a": text, "b": {"anyOf": [text, {"type": "null"}]}}, "required": ["a"]}) == "a"
    assert only_text({"properties": {"a": text, "b": text}}) is None and only_text({}) is None


@pytest.fixture(scope="module")
def server():
    """A guessing game on a server of this machine: 1 to 9, drawn by the seed; -1 for each wrong guess."""
    pytest.importorskip("openenv")
    import random

    import uvicorn
    from openenv.core.env_server.http_server import create_fastapi_app
    from openenv.core.env_server.interfaces import Environment
    from openenv.core.env_server.types import Action, Observation, State

    class Guess(Action):
        guess: str

    class Hint(Observation):
        hint: str = ""

    class Game(Environment):
        SUPPORTS_CONCURRENT_SESSIONS = True

        def reset(self, seed=None, episode_id=None, largest=9, **_):
            self.number = random.Random(seed).randint(1, largest)
            return Hint(hint=f"1 to {largest}")

        def step(self, action, timeout_s=None, **_):
            if action.guess == "boom":
                raise RuntimeError("boom")
            right = action.guess == str(self.number)
            hint = "" if right else "more" if action.guess < str(self.number) else "less"
            return Hint(hint=hint, reward=float(right) * 2 - 1, done=right)

        @property
        def state(self):
            return State()

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    app = create_fastapi_app(Game, Guess, Hint, max_concurrent_envs=16)
    running = uvicorn.Server(uvicorn.Config(app, port=port, log_level="error"))
    thread = threading.Thread(target=running.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 60
    while not running.started and time.monotonic() < deadline:
        time.sleep(0.05)
    yield f"http://127.0.0.1:{port}"
    running.should_exit = True
    thread.join(10)


def test_an_episode_over_the_wire(server):
    environment = environment_factory(CustomTask(environment=f"openenv:{server}", reset={"largest": 5}))()
    assert environment.reset(seed=3)[0] == "1 to 5"
    rewards, over, number = [], False, 0
    while not over:
        number += 1
        hint, reward, over, truncated, _ = environment.step(str(number))
        rewards.append(reward)
        assert hint == ("" if over else "more") and not truncated
    assert rewards == [-1.0] * (number - 1) + [1.0] and 1 <= number <= 5
    again = pickle.loads(pickle.dumps(environment))
    again.reset(seed=3)
    assert again.step(str(number))[1:3] == (1.0, True)
    environment.close()
    again.close()


def test_sessions_are_separate_and_can_be_replayed(server):
    """Four episodes side by side in threads; each is replayed over its own session."""
    tokenizer = build_tokenizer("char", ["ab 0123456789 tomreless"])
    task = build_task(CustomTask(environment=f"openenv:{server}", max_turns=3, workers=4, max_failed=1), tokenizer)
    decode = lambda tokens: "5"  # noqa: E731
    played = Sampler(task, Batches(tokenizer), decode).play([None] * 4, 1, Sampling(), ("wire",))
    assert [one.failure for one in played] == [None] * 4
    assert {one.turns[0].observation for one in played} == {"1 to 9"}
    for one in played:
        line = json.loads(json.dumps(sample_line("main", 1, "train", one, task.environment)))
        told, same = replay_episode(line)
        assert same, told
    decode_boom = lambda tokens: "boom"  # noqa: E731
    (failed,) = Sampler(task, Batches(tokenizer), decode_boom).play([None], 1, Sampling(), ("wire",))
    assert failed.failure.startswith("environment raised ") and failed.reward is None


def test_what_is_refused(server):
    for name, message in (
        ("openenv:ftp://host", "expected openenv:http://HOST:PORT"),
        ("openenv:http://user:secret@host", "without user and password"),
        ("openenv:http://127.0.0.1:9", "no OpenEnv server answers there"),
    ):
        with pytest.raises(PluginError, match=message):
            environment_factory(CustomTask(environment=name))
