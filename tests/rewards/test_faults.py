"""Rewards that misbehave, run for real in worker processes: good rows keep their scores, bad ones get a cause."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from lmrl.errors import PluginError, RewardError
from lmrl.recipe import Reward
from lmrl.rewards.load import load_rewards
from lmrl.rewards.rewards import score
from lmrl.rewards.workers import close_pools

ROWS = ["a", "bb", "BAD", "dddd"]
GOOD = [1.0, 2.0, 3.0, 4.0]
INNOCENT = [1.0, 2.0, None, 4.0]

REWARDS = """
import asyncio, ctypes, os, signal, subprocess, sys, threading, time
from pathlib import Path
from lmrl import TemporaryError

HERE = Path(__file__).parent

def lengths(completions):
    return [float(len(text)) for text in completions]

def on_bad(completions, act):
    if "BAD" in completions:
        act()
    return lengths(completions)

def hangs_always(prompts, completions, **columns):
    time.sleep(1000)

def hangs_on_a_row(prompts, completions, **columns):
    return on_bad(completions, lambda: time.sleep(1000))

def raises_always(prompts, completions, **columns):
    raise KeyError("no")

def raises_on_a_row(prompts, completions, **columns):
    return on_bad(completions, lambda: 1 / 0)

def exits(prompts, completions, **columns):
    return on_bad(completions, lambda: sys.exit(3))

def exits_at_once(prompts, completions, **columns):
    return on_bad(completions, lambda: os._exit(3))

def kills_itself(prompts, completions, **columns):
    return on_bad(completions, lambda: os.kill(os.getpid(), signal.SIGKILL))

def segfaults(prompts, completions, **columns):
    return on_bad(completions, lambda: ctypes.string_at(0))

def too_short(prompts, completions, **columns):
    return lengths(completions)[:-1]

def too_long(prompts, completions, **columns):
    return [*lengths(completions), 0.0]

def one_for_all(prompts, completions, **columns):
    return [0.5]

def nan_on_a_row(prompts, completions, **columns):
    return [float("nan") if text == "BAD" else float(len(text)) for text in completions]

def infinite_on_a_row(prompts, completions, **columns):
    return [float("inf") if text == "BAD" else float(len(text)) for text in completions]

def none_on_a_row(prompts, completions, **columns):
    return [None if text == "BAD" else float(len(text)) for text in completions]

def a_word(prompts, completions, **columns):
    return ["good"] * len(completions)

def a_table(prompts, completions, **columns):
    return {"score": lengths(completions)}

def a_generator(prompts, completions, **columns):
    return (float(len(text)) for text in completions)

def slow(prompts, completions, **columns):
    time.sleep(0.3)
    return lengths(completions)

def hoards_memory(prompts, completions, **columns):
    return on_bad(completions, lambda: bytearray(2 << 30))

def prints_megabytes(prompts, completions, **columns):
    for _ in range(50):
        print("x" * 100_000)
        print("y" * 100_000, file=sys.stderr)
    return lengths(completions)

def leaves_a_child(prompts, completions, **columns):
    child = subprocess.Popen(["sleep", "1000"])
    (HERE / "child").write_text(str(child.pid))
    return on_bad(completions, lambda: time.sleep(1000))

def changes_its_input(prompts, completions, notes, **columns):
    result = lengths(completions)
    completions.clear()
    notes[0]["x"].append(1)
    return result

def passes(prompts, completions, **columns):
    if not (HERE / "tried").exists():
        (HERE / "tried").write_text("")
        raise TemporaryError("busy")
    return lengths(completions)

def closes_its_output(prompts, completions, **columns):
    for file in (1, 2):
        try:
            os.close(file)
        except OSError:
            pass
    return lengths(completions)

def starts_threads(prompts, completions, **columns):
    threading.Thread(target=time.sleep, args=(1000,)).start()
    return lengths(completions)

async def waits(prompts, completions, **columns):
    await asyncio.sleep(1000 if "BAD" in completions else 0)
    return lengths(completions)
"""


@pytest.fixture
def load(tmp_path):
    path = tmp_path / "bad.py"
    path.write_text(REWARDS)

    def load(name, **settings):
        return load_rewards([Reward(function=f"{path}:{name}", **({"workers": 1, "timeout": 1} | settings))])[0]

    yield load
    close_pools()


def run(function, rows=ROWS, **columns):
    lists = {"prompts": ["p"] * len(rows), "completions": list(rows), **columns}
    return score(function, lists)


@pytest.mark.parametrize(
    ("name", "cause"),
    [
        ("hangs_on_a_row", r"bad.py:hangs_on_a_row timed out after 1 s"),
        ("raises_on_a_row", r"bad.py:raises_on_a_row raised ZeroDivisionError: division by zero"),
        ("exits", r"bad.py:exits raised SystemExit: 3"),
        ("exits_at_once", r"bad.py:exits_at_once lost its worker: exit code 3"),
        ("kills_itself", r"bad.py:kills_itself lost its worker: killed by SIGKILL"),
        pytest.param("segfaults", r"bad.py:segfaults lost its worker: killed by SIGSEGV", marks=pytest.mark.slow),
        ("nan_on_a_row", r"bad.py:nan_on_a_row returned nan"),
        ("infinite_on_a_row", r"bad.py:infinite_on_a_row returned inf"),
        ("none_on_a_row", r"bad.py:none_on_a_row returned None"),
    ],
)
def test_one_bad_row_costs_one_row(load, name, cause):
    function = load(name)
    found = run(function)
    assert found.values == INNOCENT
    assert found.causes[2].startswith(cause)
    assert found.causes[:2] + found.causes[3:] == [None] * 3
    assert run(function, ["x", "yy"]).values == [1.0, 2.0]  # and the next batch finds a worker


@pytest.mark.parametrize("name", ["slow", "prints_megabytes", "closes_its_output", "starts_threads"])
def test_odd_but_valid_values_count(load, name):
    function = load(name, timeout=10)
    assert run(function).values == GOOD
    assert run(function).values == GOOD


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("too_short", "returned 3 values for 4 rows"),
        ("too_long", "returned 5 values for 4 rows"),
        ("one_for_all", "returned 1 value for 4 rows"),
        ("a_word", "value 1: returned 'good'"),
        ("a_table", "expected a list"),
        ("a_generator", "expected a list"),
    ],
)
def test_a_mistake_in_the_function_is_reported(load, name, words):
    with pytest.raises(RewardError, match=words):
        run(load(name))


def test_a_reward_that_always_hangs_costs_a_few_timeouts(load):
    started = time.monotonic()
    found = run(load("hangs_always", timeout=0.5), ["a"] * 64)
    assert found.values == [None] * 64
    assert "too many failures to try every row" in found.causes[-1]
    assert time.monotonic() - started < 20  # trying every row would take 32


def test_a_reward_that_always_raises(load):
    found = run(load("raises_always"))
    assert found.values == [None] * 4 and found.causes[0].endswith("raised KeyError: 'no'")


def test_memory_is_limited(load):
    found = run(load("hoards_memory", memory_mb=512, timeout=20))
    assert found.values == INNOCENT and "MemoryError" in found.causes[2]


def test_children_of_a_killed_worker_are_killed(load, tmp_path):
    assert run(load("leaves_a_child")).values == INNOCENT
    child = int((tmp_path / "child").read_text())  # of the call that hung, which was tried alone last but one
    close_pools()
    until(lambda: not alive(child))


def test_a_temporary_failure_is_retried(load):
    for workers in (1, 0):
        function = load("passes", workers=workers, timeout=5 if workers else None)
        assert run(function).values == GOOD


def test_a_function_cannot_change_the_batch(load):
    for settings in ({}, {"workers": 0, "timeout": None}):
        columns = {"prompts": ["p"], "completions": ["abc"], "notes": [{"x": []}]}
        assert score(load("changes_its_input", **settings), columns).values == [3.0]
        assert columns == {"prompts": ["p"], "completions": ["abc"], "notes": [{"x": []}]}


def test_an_async_function_is_limited_without_a_worker(load):
    import asyncio

    function = load("waits", workers=0, timeout=0.3)
    assert function.parallel == 1
    assert run(function).values == INNOCENT

    async def inside():  # as in a notebook, where a loop is running already
        return run(function)

    assert asyncio.run(inside()).values == INNOCENT


def test_a_plain_function_with_a_timeout_gets_a_worker(load):
    found = run(load("hangs_on_a_row", workers=0))
    assert found.values == INNOCENT and "timed out after 1 s" in found.causes[2]


def test_workers_share_a_batch(load):
    function = load("slow", workers=2, timeout=10)
    assert function.parallel == 2
    assert run(function, ["a" * n for n in range(1, 8)]).values == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]


def test_a_function_that_cannot_be_loaded_is_reported_at_once(load, tmp_path):
    with pytest.raises(PluginError, match=r"task.rewards.0.function: '.*bad.py' defines no 'missing'"):
        load("missing")
    (tmp_path / "dies.py").write_text("import os; os._exit(7)")
    with pytest.raises(PluginError, match="could not load the function: exit code 7"):
        load_rewards([Reward(function=f"{tmp_path / 'dies.py'}:f", workers=1)])


def test_columns_that_are_not_json_are_reported(load):
    with pytest.raises(RewardError, match="cannot be sent to a worker process"):
        run(load("slow"), ["a"], things=[object()])


def test_workers_end_with_a_run_that_is_killed(tmp_path):
    (tmp_path / "hang.py").write_text(
        textwrap.dedent("""
        import os, time
        from pathlib import Path
        def f(prompts, completions, **columns):
            Path(__file__).with_name("pid").write_text(str(os.getpid()))
            time.sleep(1000)
        """)
    )
    code = f"""
from lmrl.recipe import Reward
from lmrl.rewards.load import load_rewards
from lmrl.rewards.rewards import score
score(load_rewards([Reward(function={str(tmp_path / "hang.py") + ":f"!r}, workers=1)])[0], dict(prompts=["a"], completions=["b"]))
"""
    parent = subprocess.Popen([sys.executable, "-c", code])
    until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
    worker = int((tmp_path / "pid").read_text())
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    until(lambda: not alive(worker))


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0] != "Z"


def until(happened, seconds=20):
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_run_goes_on_with_a_reward_that_hangs_and_dies(tmp_path):
    """PPO from the first step to the last, with failures counted and kept."""
    import lmrl

    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"say {n}"}) + "\n" for n in range(8)))
    (tmp_path / "reward.py").write_text(
        textwrap.dedent("""
        import os, time
        def f(prompts, completions, **columns):
            if "say 1" in prompts:
                time.sleep(1000)
            if "say 2" in prompts:
                os._exit(1)
            return [float(text.count("a")) for text in completions]
        """)
    )
    recipe = {
        "model": {"config": {"model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
                             "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64}},
        "task": {"prompts": {"path": str(tmp_path / "prompts.jsonl"), "holdout": 0},
                 "rewards": [{"function": f"{tmp_path / 'reward.py'}:f", "timeout": 0.5}], "max_failed": 0.5},
        "rollouts": {"prompts": 8, "max_new_tokens": 4},
        "objective": {"name": "ppo"},
        "training": {"steps": 2, "threads": 1},
    }  # fmt: skip
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(recipe))
    lmrl.train(path, output=tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["failed"] for line in lines if line["kind"] == "train"] == [2, 2]
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    failures = {sample["prompt"]: sample["failure"] for sample in samples if sample.get("failure")}
    assert failures["say 1"] == "reward.py:f timed out after 0.5 s"
    assert failures["say 2"] == "reward.py:f lost its worker: exit code 1"
    close_pools()


def test_a_worker_hands_over_failures_in_place_of_values(tmp_path):
    """As `lmrl.reward_models.judge.Judge` returns them."""
    (tmp_path / "fails.py").write_text(
        "from lmrl.rewards.workers import Failure\n"
        "def f(prompts, completions):\n"
        "    return [Failure('got no answer') if text == 'b' else {'score': 1.0, 'more': 2.0} for text in completions]\n"
    )
    (function,) = load_rewards([Reward(function=f"{tmp_path / 'fails.py'}:f", workers=1)])
    found = score(function, {"prompts": ["p", "p"], "completions": ["a", "b"]})
    assert found.values == [1.0, None] and found.extras[0] == {"more": 2.0}
    assert found.causes == [None, "fails.py:f got no answer"]
