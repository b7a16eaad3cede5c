"""How well rewards tell right from wrong, and agree with preferences: by hand, by simulation, and on the command line."""

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from lmrl.cli import app
from lmrl.errors import DataError
from lmrl.recipe import Reward
from lmrl.rewards.calibrate import Pairs, auc, by_comparison, by_scores, check_gold, check_pairs
from lmrl.rewards.load import load_reward
from lmrl.rewards.workers import Failure
from tests.stub_openai import chat_answer, stub_openai

REWARDS = """
def equal(completions, answer, **_):
    return [float(text == wanted) for text, wanted in zip(completions, answer)]

def length(completions, **_):
    return [float(len(text if isinstance(text, str) else text[0]["content"])) for text in completions]

def coin(completions, **_):
    return [float(sum(map(ord, text)) % 2) for text in completions]

def refuses(completions, **_):
    return [None if "x" in text else 1.0 for text in completions]
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("r.py").write_text(REWARDS)
    sums = [{"prompt": f"{n}+1", "answer": str(n + 1), "bad": [str(n), str(n + 2)]} for n in range(40)]
    write("sums.jsonl", sums)
    return tmp_path


def write(name, rows):
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def reward(name):
    return load_reward(Reward(function=f"r.py:{name}"), "reward")


# -------------------------------------------------------------------------------------------------------------------- AUC
def test_auc_by_hand():
    # 3 > 1 and 2; 2 > 1, = 2: (2 + 1.5) / 4
    assert auc([[3.0], [2.0]], [[1.0], [2.0]])["mean"] == pytest.approx(3.5 / 4)
    assert auc([[1.0, 1.0]] * 9, [[1.0]] * 9)["mean"] == 0.5


def test_auc_without_errors_has_an_interval_that_is_not_a_point():
    found = auc([[1.0]] * 10, [[0.0]] * 10)
    assert found["mean"] == 1 and found["ci95"] == [pytest.approx(0.025**0.1), 1.0]


def test_the_interval_of_an_auc_holds():
    """Rows with an effect of their own, which a count of answers would take for independent ones."""
    rng, truth, hits, widths = np.random.default_rng(0), [], 0, []
    draws = 300

    def sample(rows):
        own = rng.normal(size=(rows, 1))
        return own + rng.normal(0.8, 1, (rows, 3)), own + rng.normal(size=(rows, 3))

    right, wrong = sample(3000)
    truth = auc(right.tolist(), wrong.tolist())["mean"]
    for _ in range(draws):
        right, wrong = sample(30)
        low, high = auc(right.tolist(), wrong.tolist())["ci95"]
        hits += low <= truth <= high
        widths.append(high - low)
    assert 0.91 <= hits / draws <= 0.99 and np.mean(widths) < 0.3


def test_an_exact_reward_tells_gold_from_wrong():
    (finding,) = check_gold(reward("equal"), "sums.jsonl", "answer", "bad")
    assert finding.passed and finding.detail.startswith("AUC 1.000 [0.9") and "over 40 rows" in finding.detail
    assert "mean score 1 of gold, 0 of wrong" in finding.detail


def test_without_wrong_answers_those_of_other_rows_are_taken():
    (finding,) = check_gold(reward("equal"), "sums.jsonl", "answer", None)
    assert finding.passed and "gold answers of other rows" in finding.detail


def test_a_reward_by_chance_fails():
    first, second = check_gold(reward("length"), "sums.jsonl", "answer", "bad")
    assert first.passed is False and second.detail == "40 of 40; first: sums.jsonl, line 1"


def test_samples_without_a_score_are_a_finding():
    write("some.jsonl", [{"prompt": "a", "good": "yes", "bad": "x"}] * 4)
    assert [one.passed for one in check_gold(reward("refuses"), "some.jsonl", "good", "bad")] == [False]


def test_columns_that_are_not_there():
    with pytest.raises(DataError, match=r"line 1: has no column 'gold' \(columns: prompt, answer, bad\)"):
        list(check_gold(reward("equal"), "sums.jsonl", "gold", None))
    write("same.jsonl", [{"prompt": str(n), "answer": "1"} for n in range(3)])
    with pytest.raises(DataError, match="all rows have the same answer"):
        list(check_gold(reward("equal"), "same.jsonl", "answer", None))


# ------------------------------------------------------------------------------------------------------------ preferences
def pairs_file(longer=0.5, count=60):
    """Pairs in which people prefer the answer with `good`; a share of these is the longer one."""
    rows = [
        {"prompt": f"q{n}", "chosen": "good" + "!" * (9 if n < longer * count else 0), "rejected": "so so"}
        for n in range(count)
    ]
    write("pairs.jsonl", rows)
    return Pairs("pairs.jsonl")


def findings(verdicts, pairs):
    return {one.name: one for one in check_pairs(verdicts, pairs)}


def test_a_bias_for_length_is_found_by_hand():
    pairs = pairs_file(longer=0.25)
    found = findings(by_scores(reward("length"), pairs), pairs)
    # It always prefers the longer, people in a quarter of the pairs: agreement 0.25, bias 0.75.
    assert found["agrees with the labels"].passed is False and "0.250 [" in found["agrees with the labels"].detail
    bias = found["no bias for length"]
    assert bias.passed is False and "in 1.000 of the pairs, people in 0.250: bias 0.750 [" in bias.detail
    assert "no bias for position" not in found


def test_a_fair_reward_agrees_without_bias():
    pairs = pairs_file()
    found = findings([[1.0]] * 60, pairs)
    assert all(one.passed for one in found.values()) and "1.000 [0.9" in found["agrees with the labels"].detail


class First:
    """Prefers what stands first in two of three pairs, and what is good in the others."""

    def prefers(self, prompts, first, second):
        return [1.0 if int(prompt[1:]) % 3 else float("good" in a) for prompt, a in zip(prompts, first, strict=True)]


def test_a_bias_for_position_is_found_by_hand():
    pairs = pairs_file()
    found = findings(by_comparison(First().prefers, pairs), pairs)
    # Of 60 pairs 40 go by position: the first wins 40 + 20 / 2 = 50 of 60, and 20 of 60 verdicts hold in both orders.
    position = found["no bias for position"]
    assert position.passed is False and "first answer wins in 0.833; 0.333 of the verdicts" in position.detail
    assert "bias 0.333 [" in position.detail
    assert "0.667 [" in found["agrees with the labels"].detail  # 1 / 3 + 2 / 3 x 1 / 2


def test_pairs_without_a_verdict_are_counted():
    pairs = pairs_file()
    lost = Failure("answered 401: bad key")
    found = findings([[lost]] * 30 + [[1.0]] * 30, pairs)
    assert found["judges every pair"].passed is False
    assert found["judges every pair"].detail == "30 of 60 have no verdict; the first: answered 401: bad key"
    assert findings([[lost]] * 59 + [[1.0]], pairs)["agrees with the labels"].passed is False


def test_each_prompt_is_looked_at_once(monkeypatch):
    pairs, seen = pairs_file(), []
    monkeypatch.setattr("lmrl.rewards.calibrate.prompt_key", lambda prompt: seen.append(prompt) or prompt)
    list(check_pairs([[1.0]] * 60, pairs))
    assert seen == pairs.prompts


# ------------------------------------------------------------------------------------------------------------ command line
def run(*arguments):
    return CliRunner().invoke(app, list(arguments), catch_exceptions=False)


def test_check_with_gold_answers():
    done = run(
        "reward",
        "check",
        "r.py:equal",
        "--data",
        "sums.jsonl",
        "--gold",
        "answer",
        "--wrong",
        "bad",
        "--json",
        "new/f.json",
    )
    found = {one["name"]: one for one in json.loads(Path("new/f.json").read_text())}
    assert found["tells gold from wrong answers"]["passed"], done.output
    assert done.exit_code == 0 and found["distribution"]["passed"]  # of right and wrong answers together


def test_calibrating_a_judge_on_the_command_line():
    def reply(path, body, number):
        text = body["messages"][0]["content"]
        return chat_answer("Better: A" if text.index("good") < text.index("so so") else "Better: B")

    pairs_file()
    with stub_openai(reply) as stub:
        options = ["--option", "model=m", "--option", f"url={stub.url}", "--limit", "20"]
        done = run("reward", "calibrate", "lmrl.reward_models.judge.Judge", "--data", "pairs.jsonl", *options)
    assert done.exit_code == 0, done.output
    assert len(stub.seen) == 40 and "1.000 of the verdicts hold in both orders" in " ".join(done.output.split())
    assert run("reward", "calibrate", "r.py:length", "--data", "pairs.jsonl").exit_code == 1


@pytest.mark.parametrize("arguments", [["--wrong", "bad", "--data", "sums.jsonl"], ["--gold", "answer"]])
def test_gold_and_wrong_go_together(arguments):
    with pytest.raises(DataError, match="--gold COLUMN names right answers"):
        CliRunner().invoke(
            app, ["reward", "check", "r.py:equal", *arguments], catch_exceptions=False, standalone_mode=False
        )
