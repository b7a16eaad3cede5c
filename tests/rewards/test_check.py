"""The checker: what it lets pass and what it finds."""

import json

import pytest

from lmrl.errors import DataError
from lmrl.recipe import Reward
from lmrl.rewards.check import EDGES, check_reward
from lmrl.rewards.rescore import columns_of, correlations, read_samples
from lmrl.rewards.workers import close_pools
from lmrl.training.monitoring.measures import sample_line
from lmrl.trajectories.store import EpisodeWriter
from lmrl.trajectories.trajectory import Trajectory, Turn
from tests import forking

REWARDS = """
import itertools, os, time
counter = itertools.count()

def good(prompts, completions, **columns):
    return [min(len(text), 1000) / 1000 for text in completions]

def forgetful(prompts, completions, **columns):
    return [next(counter) for _ in completions]

def ranked(prompts, completions, **columns):
    return [row / len(completions) for row in range(len(completions))]

def relative(prompts, completions, **columns):
    longest = max(map(len, completions)) or 1
    return [len(text) / longest for text in completions]

def divides(prompts, completions, **columns):
    return [1 / len(text) for text in completions]

def declines(prompts, completions, **columns):
    return [None] * len(completions)


def constant(prompts, completions, **columns):
    return [1.0 for _ in completions]

def wants_answer(prompts, completions, answer, **columns):
    return [float(text == wanted) for text, wanted in zip(completions, answer)]

def hangs_on_long(prompts, completions, **columns):
    if any(len(text) > 10_000 for text in completions):
        time.sleep(1000)
    return [float(len(text)) for text in completions]

def dies_on_empty(prompts, completions, **columns):
    if "" in completions:
        os._exit(1)
    return [float(len(text)) for text in completions]

def short(prompts, completions, **columns):
    return [0.0]
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("check") / "mine.py"
    path.write_text(REWARDS)
    yield path
    close_pools()


def failed(file, name, data=None, timeout=5.0):
    findings = list(check_reward(Reward(function=f"{file}:{name}"), data, timeout))
    return {finding.name: finding.detail for finding in findings if finding.passed is False}, findings


def test_a_good_reward_passes(file):
    bad, findings = failed(file, "good")
    assert bad == {}
    assert len(findings) == 9 + len(EDGES)
    assert "with two workers" in findings[-2].detail and "distinct in 8" in findings[-1].detail


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("forgetful", ["same samples, same scores"]),
        ("ranked", ["order in the batch does not matter", "size of the batch does not matter"]),
        ("relative", ["size of the batch does not matter"]),
        ("divides", ["completion: empty"]),
        ("dies_on_empty", ["completion: empty"]),
        ("hangs_on_long", ["completion: 50,000 characters"]),
        ("short", ["protocol"]),
        ("missing", ["loads in a worker process"]),
    ],
)
def test_what_is_wrong_is_found(file, name, found):
    bad, _ = failed(file, name, timeout=1.0)
    assert set(found) <= set(bad)
    assert len(bad) == len(found) or name == "forgetful"


def test_samples_are_numbered_from_one(file):
    bad, _ = failed(file, "ranked")
    assert bad["order in the batch does not matter"] == "8 of 8 differ; sample 1 scores 0.0 and then 0.875"


def test_a_constant_reward_fails_on_real_data_only(file):
    bad, findings = failed(file, "constant")
    assert bad == {} and "try --data" in findings[-1].detail
    bad, _ = failed(file, "constant", {"prompts": ["a"] * 3, "completions": ["x", "y", "z"]})
    assert list(bad) == ["distribution"]


def test_a_reward_that_scores_nothing_fails(file):
    bad, findings = failed(file, "declines")
    assert bad["scores every sample"].endswith("declines returned None: nothing can be checked; try --data")
    assert findings[-1].passed is False


def test_columns_are_asked_for(file):
    bad, _ = failed(file, "wants_answer")
    assert "add --data" in bad["protocol"] and "answer" in bad["protocol"]
    data = {"prompts": ["a"] * 3, "completions": ["1", "2", "3"], "answer": ["1", "5", "3"]}
    assert failed(file, "wants_answer", data)[0] == {}


# ---------------------------------------------------------------------------------------------------------- the commands
def lmrl(*arguments):
    return forking.run(["reward", *arguments])


def test_check_on_the_command_line(file, tmp_path):
    done = lmrl("check", f"{file}:good", "--json", str(tmp_path / "found.json"))
    assert done.returncode == 0 and "fit for training" in done.stdout
    assert {one["passed"] for one in json.loads((tmp_path / "found.json").read_text())} == {True, None}
    done = lmrl("check", f"{file}:relative")
    assert done.returncode == 1 and "FAILED size of the batch does not matter" in done.stdout


def test_score_on_the_command_line(file, tmp_path):
    samples = [{"prompt": "p", "completion": "x" * n, "reward": n * n, "stage": "main"} for n in range(1, 6)]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(one) + "\n" for one in samples))
    output = tmp_path / "new" / "out.jsonl"
    done = lmrl("score", f"{file}:good", "--run", str(tmp_path), "--output", str(output))
    assert done.returncode == 0, done.stderr
    assert "mean 0.0030 [0.0010, 0.0050] over 5 samples" in done.stdout
    assert "Spearman 1.000" in done.stdout
    assert [json.loads(line)["score"] for line in output.read_text().splitlines()][-1] == 0.005
    done = lmrl("score", f"{file}:good", "--run", str(tmp_path), "--output", str(tmp_path))
    assert done.returncode == 2 and f"--output: {tmp_path} is a folder, name a file" in done.stderr
    done = lmrl("score", f"{file}:good")
    assert done.returncode == 2 and "name either --data FILE or --run FOLDER" in done.stderr


# ----------------------------------------------------------------------------------------------------------- the samples
def test_samples_of_any_format(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"prompt": "p ", "chosen": "a", "rejected": "b"}) + "\n")
    assert [(one["completion"], one["reward"]) for one in read_samples(str(path))] == [("a", 1.0), ("b", -1.0)]
    turns = [{"observation": "p", "action": "a"}, {"observation": "p", "action": "b", "cut": True}]
    path.write_text("".join(json.dumps({"turns": [turn]}) + "\n" for turn in turns))
    assert columns_of(read_samples(str(path)))["completion_cut"] == [False, True]
    path.write_text(json.dumps({"turns": [{"observation": "a", "action": "b"}] * 2}) + "\n")
    with pytest.raises(DataError, match="line 1: has 2 turns"):
        read_samples(str(path))


def test_columns_are_kept_for_scoring_again(tmp_path):
    """Those of a run's samples, of collected episodes in both kinds of file, and of other formats."""
    trajectory = Trajectory([], "p", "a", reward=1.0, columns={"answer": 3, "kind": "x"}, turns=[Turn("p", "a", 1.0)])
    line = sample_line("main", 1, "train", trajectory)
    path = tmp_path / "samples.jsonl"
    path.write_text(json.dumps(line) + "\n")
    assert columns_of(read_samples(str(path)))["answer"] == [3]
    for target in ("a.jsonl", "folder"):
        with EpisodeWriter(tmp_path / target) as writer:
            writer.write([trajectory])
        columns = columns_of(read_samples(str(tmp_path / target)))
        assert (columns["answer"], columns["kind"], columns["completions"]) == ([3], ["x"], ["a"])
    messages = [{"role": "user", "content": "p"}, {"role": "assistant", "content": "a"}]
    path.write_text(json.dumps({"messages": messages, "answer": 3}) + "\n")
    assert columns_of(read_samples(str(path)))["answer"] == [3]


def test_dialogues_have_messages_for_completions():
    prompt = [{"role": "user", "content": "hi"}]
    columns = columns_of([{"prompt": prompt, "completion": "yes", "reward": 1.0, "answer": 3}])
    assert columns["completions"] == [[{"role": "assistant", "content": "yes"}]]
    assert columns["answer"] == [3] and "reward" not in columns


def test_correlations_by_hand():
    found = correlations([1.0, 2.0, 3.0, None], [1.0, 4.0, 9.0, 5.0])
    assert found["spearman"] == pytest.approx(1) and found["n"] == 3
    assert found["pearson"] == pytest.approx(0.98974, abs=1e-5)
    assert correlations([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]) is None
