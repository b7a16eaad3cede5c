"""The shipped reward functions, by hand."""

import json

import pytest

from lmrl.recipe import Reward
from lmrl.rewards.load import load_rewards
from lmrl.rewards.rewards import score


def run(name, completions, options=None, prompts=None, **columns):
    function = load_rewards([Reward(function=f"lmrl.reward_models.{name}", options=options or {})])[0]
    prompts = prompts or ["p"] * len(completions)
    return score(function, {"prompts": prompts, "completions": completions, **columns})


def test_exact():
    found = run("answers.exact", [" Paris. ", "paris", "Rome", "x"], answer=["Paris", "PARIS", "Paris", None])
    assert found.values == [1.0, 1.0, 0.0, None]
    assert run("answers.exact", ["paris"], {"ignore_case": False}, answer=["Paris"]).values == [0.0]
    message = [[{"role": "assistant", "content": "Paris"}]]
    assert run("answers.exact", message, answer=["Paris"]).values == [1.0]


@pytest.mark.parametrize("name", ["exact", "extracted"])
def test_whole_floats_of_a_table_are_integers(name):
    """A column of 7, 2.5 and a gap is read as 7.0, 2.5 and nan or None."""
    found = run(f"answers.{name}", ["7", "2.5", "7.0"], answer=[7.0, 2.5, "7.0"])
    assert found.values == [1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("completion", "answer", "value"),
    [
        ("so it is 1,234.50 dollars", 1234.5, 1.0),
        ("first 3, then 4", "4", 1.0),
        ("#### 18\nor was it 19?", "9 + 9 = 18\n#### 18", 1.0),
        (r"\boxed{-7} after 3 tries", -7, 1.0),
        ("1e3", 1000, 1.0),
        ("none at all", 5, 0.0),
        ("5.1", 5, 0.0),
        ("5", "no number", None),
    ],
)
def test_numeric(completion, answer, value):
    assert run("answers.numeric", [completion], answer=[answer]).values == [value]


def test_math_and_off_the_main_thread():
    from concurrent.futures import ThreadPoolExecutor

    pytest.importorskip("math_verify")
    completions = [r"the answer is $\frac{2}{4}$", r"$x + 1$", "$3$", "$3$"]
    answers = [r"$\frac{1}{2}$", r"$1 + x$", "$4$", None]
    with ThreadPoolExecutor(1) as thread:
        found = thread.submit(run, "answers.math", completions, answer=answers).result()
    assert found.values == [1.0, 1.0, 0.0, None]


def test_format():
    pattern = r"<think>.*</think>\s*\w+"
    texts = ["<think>a\nb</think> yes", "yes", "<think>a</think>"]
    assert run("shaping.format", texts, {"pattern": pattern}).values == [1.0, 0.0, 0.0]


def test_length():
    texts = ["", "a b", "a b c d", "a b c d e f g h"]
    options = {"low": 2, "high": 4, "margin": 4}
    assert run("shaping.length", texts, options).values == [0.5, 1.0, 1.0, 0.0]


def test_repetition():
    # "a a a a": three bigrams, one distinct
    found = run("shaping.repetition", ["a a a a", "a b c d", "", "a"], {"n": 2}).values
    assert found == pytest.approx([-2 / 3, 0, 0, 0])


def test_keywords():
    options = {"required": ["sea", "ship"], "forbidden": ["bad"]}
    texts = ["The SEA and a ship", "seaside shipment", "a ship, bad", ""]
    assert run("shaping.keywords", texts, options).values == [1.0, 0.0, -0.5, 0.0]


# ------------------------------------------------------------------------------------------------------------------ code
ADD = "def add(a, b):\n    return a + b"
TESTS = ["assert add(1, 2) == 3", "assert add(0, 0) == 1"]


def test_code_passes_a_share_of_its_tests():
    texts = [ADD, f"Here:\n```python\n{ADD}\n```\ndone", "def add(a, b): return 3", "not python at all("]
    found = run("code.passes", texts, tests=[TESTS] * 4)
    assert found.values == [0.5, 0.5, 0.5, 0.0]
    assert run("code.passes", ["x", ADD], tests=[[], "\n".join(TESTS)]).values == [None, 0.5]


@pytest.mark.parametrize(
    "code",
    [
        "while True: pass",
        "import time; time.sleep(100)",
        "x = bytearray(1 << 31)",
        "import os; os._exit(0)",
        "raise SystemExit(0)",
        "import sys; sys.exit()",
        "open('big', 'wb').write(b'x' * (8 << 20))",
        "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
    ],
)
def test_code_that_misbehaves_earns_nothing(code):
    assert run("code.passes", [code], {"seconds": 0.5, "memory_mb": 256}, tests=[["pass"]]).values == [0.0]


def test_code_sees_no_secrets(monkeypatch):
    monkeypatch.setenv("SECRET", "x")
    assert run("code.passes", ["import os"], tests=[["assert 'SECRET' not in os.environ"]]).values == [1.0]


def test_code_has_no_network_where_the_system_can_take_it():
    from lmrl.reward_models.code import _isolated

    if not _isolated():
        pytest.skip("no user namespaces here")
    code = "import socket; socket.create_connection(('127.0.0.1', 1), 1)"
    refused = "import errno\ntry:\n    import socket; socket.create_connection(('10.0.0.1', 1), 1)\nexcept OSError as e:\n    assert e.errno in (errno.ENETUNREACH, errno.EHOSTUNREACH), e"  # fmt: skip
    assert run("code.passes", [code, refused], {"seconds": 3}, tests=[["pass"]] * 2).values == [0.0, 1.0]


# --------------------------------------------------------------------------------------------------------- reasoning-gym
def test_reasoning_gym(tmp_path):
    pytest.importorskip("reasoning_gym")
    from lmrl.reward_models.reasoning_gym import write_prompts

    path = tmp_path / "sums.jsonl"
    write_prompts("chain_sum", 3, 0, path, ask=" =", max_terms=2, max_digits=1)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    answers = [json.loads(row["reasoning_gym"])["answer"] for row in rows]
    assert all(row["prompt"].endswith(" =") for row in rows)
    texts = [f"<answer>{answers[0]}</answer>", f" {answers[1]}\n", "no"]
    found = run("reasoning_gym.verified", texts, reasoning_gym=[row["reasoning_gym"] for row in rows])
    assert found.values[:2] == [1.0, 1.0] and found.values[2] < 0.5
    assert run("reasoning_gym.verified", ["x"], reasoning_gym=[None]).values == [None]


# ------------------------------------------------------------------------------------------------------------ trl's own
def test_functions_of_trl_work_unchanged():
    think = load_rewards([Reward(function="trl.rewards.think_format_reward")])[0]
    message = [{"role": "assistant", "content": "<think>\nsums\n</think>\n4"}]
    assert score(think, {"prompts": ["p"], "completions": [message]}).values == [1.0]
    accuracy = load_rewards([Reward(function="trl.rewards.accuracy_reward")])[0]
    columns = {
        "prompts": ["p"],
        "completions": [[{"role": "assistant", "content": r"so \boxed{\frac{1}{2}}"}]],
        "solution": [r"\frac{1}{2}"],
    }
    pytest.importorskip("math_verify")
    assert score(accuracy, columns).values == [1.0]
