"""Two processes: the same gradient as one, resume under every strategy, and one error where one of them fails."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from lmrl.launch import accelerate_environment
from lmrl.recipe.files import find_launch
from lmrl.training.replay import replay
from lmrl.training.train import resume_run
from tests import forking

HERE = Path(__file__).parent
needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")


@pytest.fixture
def extensions(tmp_path_factory) -> Path:
    """Where DeepSpeed builds its extension for CPUs, once for all tests of this session. (A build that was killed would leave a lock
    in the user's own cache, for ever.)"""
    base = tmp_path_factory.getbasetemp()
    return (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "extensions"


def run_two(script: list[str], strategy: str | None, extensions: Path) -> None:
    environment, _ = accelerate_environment(2, find_launch(strategy) if strategy else None)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    common |= {"OMP_NUM_THREADS": "1", "TORCH_EXTENSIONS_DIR": str(extensions)}
    file, *arguments = script
    running = [
        forking.Process(
            arguments,
            code=f"import runpy; runpy.run_path({file!r}, run_name='__main__')",
            env=environment | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]
    outputs = ["".join(process.communicate(timeout=400)) for process in running]
    assert [process.returncode for process in running] == [0, 0], "\n".join(text[-3000:] for text in outputs)


@pytest.mark.parametrize(
    "strategy",
    [
        None,
        "fsdp2",
        pytest.param("zero2", marks=[needs_deepspeed, pytest.mark.slow]),
        pytest.param("zero3", marks=[needs_deepspeed, pytest.mark.slow]),  # builds an extension first
    ],
)
def test_two_processes_do_what_one_does(tmp_path, extensions, strategy):
    run_two([str(HERE / "worker.py"), str(tmp_path)], strategy, extensions)
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["processes"] == 2
    for name in ("many", "few"):
        one = found[name]
        assert one["moved"] > 1e-3  # the step is to be seen ...
        assert one["gap"] < 1e-6  # ... and is the same
        for key in ("loss", "norm"):
            assert one[key][1] == pytest.approx(one[key][0], rel=1e-5)
    adapted = found["adapted"]  # after values alone, a skipped update, and a whole one; the model came from a folder
    assert adapted["moved"] > 1e-3 and adapted["gap"] < 1e-6 and adapted["reference"] < 1e-5, adapted
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    files = [file.relative_to(whole) for file in whole.glob("stages/main/final/**/*.safetensors")]
    assert len(files) == 3  # weights, heads, optimizer
    for file in files:
        one, other = load_file(whole / file), load_file(torn / file)
        assert one.keys() == other.keys()
        for name, tensor in one.items():
            assert tensor.equal(other[name]), (file, name)

    if strategy not in (None, "fsdp2"):  # DeepSpeed cannot go back
        return
    gated = json.loads((tmp_path / "gated/stages/main/final/state/trainer.json").read_text())
    assert gated["ended"].startswith("gate:") and "ends with the policy of step" in gated["ended"]
    replayed = replay(tmp_path / "back/bundles/main-step-000002-collapse")  # of all processes' sequences, by this one
    assert replayed.same and any("computed by 2 processes" in line for line in replayed.lines), replayed.lines
    assert not any(line.startswith("grad_norm 0,") for line in replayed.lines)
    saved = [tmp_path / "back/stages/main/checkpoints" / f"step-{step:06d}" for step in range(5)]
    for file in (file.relative_to(saved[1]) for file in saved[1].glob("**/*.safetensors")):
        begun, first, second, third, fourth = (load_file(folder / file) for folder in saved)
        assert equal(first, second), file  # taken back after the second step
        if "optimizer" in file.name:
            assert not begun and not any(
                tensor.any() for tensor in third.values()
            )  # and to the beginning after the third
        else:
            assert equal(begun, third), file
            learned = not equal(begun, first) and not equal(third, fourth)
            assert learned or "heads" in file.name  # nothing is earned, so that values have nothing to learn


def equal(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(tensor.equal(other[name]) for name, tensor in one.items())


def command(folder: Path, *more: str) -> list[str]:
    sys.path.insert(0, str(HERE))
    from worker import STEPS

    return [sys.executable, "-m", "lmrl", "train", "random_walks/ppo", *STEPS, "--output", str(folder), *more]


@pytest.mark.slow
def test_the_number_of_processes_may_change(tmp_path):
    """A checkpoint of two processes goes on with one: what it plays is the same, and so is what it learns up to rounding."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    launch = command(tmp_path / "two", "--processes", "2")
    done = subprocess.run(launch, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    shutil.copytree(tmp_path / "two", tmp_path / "mixed")
    for gone in ("final", "checkpoints/step-000002"):
        shutil.rmtree(tmp_path / "mixed" / "stages" / "main" / gone)
    resume_run(tmp_path / "mixed")
    one, other = (
        load_file(tmp_path / folder / "stages" / "main" / "final" / "model.safetensors") for folder in ("two", "mixed")
    )
    assert max(float((tensor - other[name]).abs().max()) for name, tensor in one.items()) < 1e-5


def test_a_killed_process_ends_the_run_with_one_error(tmp_path):
    started = subprocess.Popen(
        command(tmp_path / "run", "--processes", "2", "training.steps=100000"),
        env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    metrics = tmp_path / "run" / "metrics.jsonl"
    until = time.monotonic() + 200
    while not (metrics.exists() and '"stage": "main", "step": 2' in metrics.read_text()):
        assert started.poll() is None and time.monotonic() < until, started.communicate()
        time.sleep(0.2)
    children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(started.pid)], capture_output=True, text=True)
    pids = [int(pid) for pid in children.stdout.split()]
    ranks = {
        int(dict(entry.partition("=")[::2] for entry in environ.split("\0"))["RANK"]): pid
        for pid in pids
        if "RANK=" in (environ := Path(f"/proc/{pid}/environ").read_text())
    }
    os.kill(ranks[1], signal.SIGKILL)
    _, errors = started.communicate(timeout=100)
    assert started.returncode == 1
    assert errors.strip() == (
        "lmrl: process 1 of 2 was ended by SIGKILL, so the run has stopped; continue from its last checkpoint with --resume"
    )
    assert not Path(f"/proc/{ranks[0]}").exists()


def test_an_error_after_sigterm_is_shown(tmp_path):
    """A process that was told to end, and failed as it saved its checkpoint."""
    (tmp_path / "process.py").write_text(
        "import json, pathlib, signal, sys, time\n"
        "def end(*_):\n"
        "    if sys.argv[1] == '1': sys.exit(143)\n"
        "    left = {'order': 1, 'time': 0.0, 'code': 1, 'text': 'lmrl: no room for the checkpoint'}\n"
        "    pathlib.Path('errors/0.json').write_text(json.dumps(left))\n"
        "    sys.exit(1)\n"
        "signal.signal(signal.SIGTERM, end)\n"
        "pathlib.Path('ready' + sys.argv[1]).touch()\n"
        "time.sleep(100)\n"
    )
    (tmp_path / "launcher.py").write_text(
        "import pathlib, subprocess, sys\n"
        "from lmrl.launch import _watch\n"
        "from lmrl.training.interrupt import Interrupt\n"
        "with Interrupt() as interrupt:\n"
        "    running = [subprocess.Popen([sys.executable, 'process.py', rank]) for rank in '01']\n"
        "    sys.exit(_watch(running, pathlib.Path('errors'), interrupt))\n"
    )
    (tmp_path / "errors").mkdir()
    launcher = subprocess.Popen([sys.executable, "launcher.py"], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 100
    while not all((tmp_path / f"ready{rank}").exists() for rank in (0, 1)):
        assert launcher.poll() is None and time.monotonic() < until
        time.sleep(0.1)
    launcher.terminate()
    _, errors = launcher.communicate(timeout=60)
    assert (launcher.returncode, errors) == (1, "lmrl: no room for the checkpoint\n")


@pytest.mark.slow
def test_an_error_of_one_process_while_all_hold_the_weights_ends_the_run(tmp_path, tiny_folder):
    """In the rollouts of a sharded model: the others wait for this process, which must not wait for them."""
    (tmp_path / "mine.py").write_text(
        "import os\ndef odd(completions, **columns):\n    return [0.0] * (len(completions) - (os.environ['RANK'] == '1'))\n"
    )
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "ab"}\n' * 8)
    changes = [
        f"model.path={tiny_folder}",
        "model.dtype=float32",
        f"task.prompts.path={prompts}",
        "task.prompts.holdout=0",
        f"task.rewards=[{{function: '{tmp_path}/mine.py:odd'}}]",
        "rollouts.prompts=4",
        "rollouts.max_new_tokens=4",
        "evaluation.suite=null",
    ]
    run = [sys.executable, "-m", "lmrl", "train", "sentiment/ppo", *changes, "--output", str(tmp_path / "run")]
    done = subprocess.run(
        [*run, "--processes", "2", "--accelerate", "fsdp2"],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode != 0
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("lmrl:")]
    assert "odd" in line and "Traceback" not in done.stderr


def test_a_mistake_is_one_line(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "lmrl", "train", "random_walks/ppo", "objective.clipp=1", "--processes", "2"],
        capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "did you mean 'objective.clip'?" in done.stderr
