"""Changes that rewards and environments make to the process are undone."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch

from lmrl.environments import TextEnvironment
from lmrl.errors import EpisodeError
from lmrl.plugins.foreign import FORKED, CallTimedOut, drop_note, foreign, give_up_on, keep_note
from lmrl.plugins.loading import load_plugin
from lmrl.policy.tokenizers import build_tokenizer
from lmrl.recipe import Reward
from lmrl.rewards.load import load_rewards
from lmrl.rewards.rewards import score
from lmrl.rewards.workers import close_pools
from lmrl.rollouts.sampler import Sampler
from lmrl.rollouts.task import Task
from lmrl.trajectories.render import Renderer
from tests.conftest import TINY_LLAMA
from tests.launcher import launch

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


def test_a_call_that_changes_the_working_directory(tmp_path, monkeypatch):
    for name in ("here", "there", "beyond"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with foreign("an environment"):
        os.chdir(tmp_path / "there")
        with foreign("a reward"):  # an inner call leaves the outer one's directory alone
            os.chdir(tmp_path / "beyond")
        (tmp_path / "beyond").rmdir()
    assert os.getcwd() == str(tmp_path / "here")


def test_an_abandoned_call_leaves_the_working_directory_alone(tmp_path, monkeypatch):
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    abandoned = foreign("a reward")
    abandoned.__enter__()
    give_up_on(threading.get_ident())
    with foreign("another"):
        pass
    os.chdir(tmp_path / "there")
    abandoned.__exit__(None, None, None)
    assert os.getcwd() == str(tmp_path / "there")


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


def test_only_one_process_returns_from_a_fork():
    code = f"""
import os
from lmrl.plugins.foreign import foreign
with foreign("reward f"):
    child = os.fork()
print("back", flush=True)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == {FORKED}
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "back\n"
    assert done.stderr == (
        "lmrl: reward f forked, and its second process ends here: start processes with subprocess instead\n"
    )


def test_an_error_passes_through():
    with pytest.raises(ValueError, match="x"), foreign("f"):
        torch.set_grad_enabled(False)
        raise ValueError("x")
    assert untouched()


# ------------------------------------------------------------------------------------------------------------------ limits
HANG = """
import os, time
def hangs(prompts, completions):
    if "BAD" in completions:
        time.sleep(100)
    return [1.0] * len(prompts)
def leaves(prompts, completions):
    os._exit(0)
"""


def test_a_call_over_its_limit_is_interrupted():
    began = time.monotonic()
    with pytest.raises(CallTimedOut, match=r"timed out after 0.2 s \(task.call_timeout\)"), foreign("reward f", 0.2):
        time.sleep(100)
    assert time.monotonic() - began < 5
    with foreign("reward f", 0.2):
        pass
    time.sleep(0.3)  # the alarm went with the call


def test_a_call_that_catches_the_first_interrupt_gets_a_second(monkeypatch):
    monkeypatch.setattr("lmrl.plugins.foreign.REPEAT", 0.1)
    caught = []
    with pytest.raises(CallTimedOut), foreign("reward f", 0.1):
        try:
            time.sleep(100)
        except Exception as error:
            caught.append(error)
        time.sleep(100)
    assert len(caught) == 1


def test_an_alarm_of_someone_else_still_rings():
    rung = []
    previous = signal.signal(signal.SIGALRM, lambda *_: rung.append(True))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with foreign("reward f", 50):
            assert signal.getitimer(signal.ITIMER_REAL)[0] > 40
        assert not rung
        time.sleep(0.4)
        assert rung
    finally:
        signal.signal(signal.SIGALRM, previous)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_reward_without_a_timeout_has_that_of_the_task(tmp_path, workers):
    (tmp_path / "hang.py").write_text(HANG)
    (function,) = load_rewards([Reward(function=f"{tmp_path / 'hang.py'}:hangs", workers=workers)], limit=0.5)
    found = score(function, {"prompts": ["a"] * 3, "completions": ["x", "BAD", "y"]})
    assert found.values == [1.0, None, 1.0] and found.causes[1].startswith("hang.py:hangs timed out after 0.5 s")
    close_pools()


class Hanging(Meddling):
    def reset(self, *, seed=None, options=None):
        return "a", {}

    def step(self, action):
        time.sleep(100)


def test_an_environment_over_its_limit_has_failed():
    task = Task(Hanging, Renderer(build_tokenizer("char", ["ab"])), [0], [0], call_timeout=0.2)
    (episode,) = Sampler(task).play_scripted("random", [0], ("x",))
    assert episode.failure == "environment timed out after 0.2 s (task.call_timeout)"
    with pytest.raises(EpisodeError, match=r"timed out after 0.2 s"):
        task.keep_judged([episode])


def test_a_call_that_nothing_can_interrupt_ends_the_process():
    code = """
import threading, time, lmrl.plugins.foreign as module
module.PATIENCE = module.GRACE = 0.4
module.watch()
def hang():
    with module.foreign("reward f", 0.2):
        time.sleep(100)
threading.Thread(target=hang).start()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.splitlines()[-1].startswith("lmrl: reward f has not returned for 1 s and cannot be interrupted")
    assert "continue from its last checkpoint with --resume" in done.stderr


# -------------------------------------------------------------------------------------------------------------- last words
def test_the_call_in_which_a_process_ended_is_known_afterwards(tmp_path):
    code = f"""
import os, pathlib
from lmrl.plugins.foreign import foreign, keep_note
assert keep_note(pathlib.Path({str(tmp_path / "note")!r})) is None
with foreign("reward first"):
    pass
with foreign("reward mine.py:f"):
    os._exit(0)
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
    assert keep_note(tmp_path / "note") == "reward mine.py:f"
    with foreign("reward g"):
        assert (tmp_path / "note").read_bytes().startswith(b"reward g\0")
    assert keep_note(tmp_path / "note") is None  # the call came back
    drop_note()
    assert not (tmp_path / "note").exists()


def test_a_note_that_cannot_be_deleted_hides_no_error(tmp_path):
    assert keep_note(tmp_path / "note") is None
    (tmp_path / "note").unlink()
    (tmp_path / "note").mkdir()
    drop_note()


def test_a_resumed_run_names_the_call_that_ended_it(tmp_path):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "ab"}\n' * 4)
    (tmp_path / "hang.py").write_text(HANG)
    recipe = {
        "model": {"config": dict(TINY_LLAMA)},
        "task": {"prompts": {"path": "prompts.jsonl", "holdout": 0}, "rewards": [{"function": "hang.py:leaves"}]},
        "rollouts": {"prompts": 2, "samples": 2, "max_new_tokens": 2},
        "objective": {"name": "grpo"},
        "training": {"steps": 1},
    }
    (tmp_path / "mine.yaml").write_text(json.dumps(recipe))
    done = launch("train", str(tmp_path / "mine.yaml"), "--output", str(tmp_path / "run"))
    assert done.returncode == 0 and "checkpoint:" not in done.stdout  # as if it had done its work
    done = launch("train", str(tmp_path / "run"), "--resume")
    assert (
        "note: the process before this one ended without a word in the middle of reward hang.py:leaves" in done.stdout
    )
