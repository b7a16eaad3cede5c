"""What rewards and environments do to the process is put back."""

import subprocess
import sys

import pytest
import torch

from lmrl.environments import TextEnvironment
from lmrl.foreign import FORKED, foreign
from lmrl.plugins import load_plugin
from lmrl.policy.tokenizers import build_tokenizer
from lmrl.recipe import Reward
from lmrl.rewards.load import load_rewards
from lmrl.rewards.rewards import score
from lmrl.rollouts.sampler import Sampler
from lmrl.rollouts.task import Task
from lmrl.trajectories.render import Renderer

MEDDLE = """
import torch
torch.set_grad_enabled(False)
torch.set_default_dtype(torch.float64)

def reward(prompts, completions):
    torch.set_grad_enabled(False)
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(3)
    return [1.0] * len(prompts)
"""


@pytest.fixture(autouse=True)
def settings():
    yield
    torch.set_grad_enabled(True)
    torch.set_default_dtype(torch.float32)
    torch.set_num_threads(1)


def untouched():
    return torch.is_grad_enabled() and torch.get_default_dtype() == torch.float32 and torch.get_num_threads() == 1


def test_a_reward_that_turns_gradients_off(tmp_path):
    (tmp_path / "meddle.py").write_text(MEDDLE)
    load_plugin(f"{tmp_path / 'meddle.py'}:reward", "x")
    assert untouched()
    (function,) = load_rewards([Reward(function=f"{tmp_path / 'meddle.py'}:reward")])
    assert score(function, {"prompts": ["a"], "completions": ["b"]}).values == [1.0] and untouched()


class Meddling(TextEnvironment):
    players, num_starts = ("random",), 1

    def reset(self, *, seed=None, options=None):
        torch.set_grad_enabled(False)
        return "a", {}

    def act(self, player, rng):
        torch.set_grad_enabled(False)
        return "b"

    def step(self, action):
        assert torch.is_grad_enabled()
        torch.set_grad_enabled(False)
        raise SystemExit(3)


def test_an_environment_that_turns_gradients_off_and_exits():
    task = Task(Meddling, Renderer(build_tokenizer("char", ["ab"])), [0], [0])
    (episode,) = Sampler(task).play_scripted("random", [0], ("x",))
    assert episode.failure == "environment raised SystemExit: 3" and untouched()


def test_only_one_process_comes_back_from_a_fork():
    code = f"""
import os
from lmrl.foreign import foreign
with foreign("reward f"):
    child = os.fork()
print("back", flush=True)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == {FORKED}
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "back\n"
    assert done.stderr == (
        "lmrl: reward f forked, and its second process ends here: start processes by subprocess instead\n"
    )


def test_an_error_passes_through():
    with pytest.raises(ValueError, match="x"), foreign("f"):
        torch.set_grad_enabled(False)
        raise ValueError("x")
    assert untouched()
