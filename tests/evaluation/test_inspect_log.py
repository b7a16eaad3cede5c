"""Logs for inspect_ai, as plain data and through the package's own reader where it is installed."""

import json
import re

import pytest

import lmrl
from lmrl.errors import RunError
from lmrl.evaluation.inspect_log import dialogue, export_inspect, target
from lmrl.evaluation.log import EvalLog
from lmrl.trajectories.trajectory import Trajectory, Turn


@pytest.fixture(scope="module")
def exported(tiny_folder, tmp_path_factory):
    """A log of prompts and dialogues, one of which no reward could judge, and the file made of it."""
    folder = tmp_path_factory.mktemp("inspect")
    rows = [
        {"prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1 + 1?"}], "answer": 2}
    ]
    rows += [{"prompt": [{"role": "user", "content": f"say {number}"}], "answer": number} for number in range(3)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "judge.py").write_text(
        "def length(completions, answer, **columns):\n"
        "    return [None if a == 1 else float(len(c[0]['content'])) for c, a in zip(completions, answer)]\n"
    )
    (folder / "suite.yaml").write_text(
        "task: {prompts: {path: prompts.jsonl}, rewards: [{function: judge.py:length}], max_failed: 0.5}\n"
        "rollouts: {max_new_tokens: 5}\nsamples: 2\nmetrics: [reward]\n"
    )
    report = lmrl.evaluate(tiny_folder, folder / "suite.yaml", log=folder / "log")
    return report, EvalLog(folder / "log"), export_inspect(folder / "log", folder / "out")[0]


def test_samples_as_plain_data(exported):
    report, log, path = exported
    data, trajectories = json.loads(path.read_text()), log.trajectories()
    assert data["eval"]["task_version"] == log.header["suite"]["version"] and len(data["samples"]) == 8
    first = data["samples"][1]
    assert (first["id"], first["epoch"], first["target"]) == (1, 2, "2")
    assert [one["role"] for one in first["messages"]] == ["system", "user", "assistant"]
    assert first["scores"]["reward"]["value"] == len(trajectories[1].completion)
    assert first["model_usage"].popitem()[1]["output_tokens"] == trajectories[1].num_actions
    failed = [one for one in data["samples"] if "error" in one]
    assert [one["target"] for one in failed] == ["1", "1"] and "returned None" in failed[0]["error"]["message"]
    assert data["results"]["scores"][0]["metrics"]["mean"]["value"] == report.metrics["reward"]["mean"]
    assert data["results"]["completed_samples"] == 6


def test_name_and_header_are_those_it_looks_for(exported):
    _, log, path = exported
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d-\d\d-\d\d[^_]*_suite.yaml_policy_[0-9a-f]+.json", path.name)
    assert path.stem.endswith(log.header["suite"]["version"])
    assert set(json.loads(path.read_text())) >= {"version", "status", "eval", "plan", "results", "stats"}


def test_targets_may_be_several_or_missing():
    assert target({"target": ["Rome", 3]}) == ["Rome", "3"] and target({"answer": 0}) == "0"
    assert target({"target": None, "answer": "x"}) == "x" and target({"answer": None}) == target({}) == ""


def test_package_opens_the_file(exported):
    reader = pytest.importorskip("inspect_ai.log")
    report, log, path = exported
    found = reader.read_eval_log(str(path))
    assert found.status == "success" and found.eval.config.epochs == 2 and len(found.samples) == 8
    assert found.samples[1].output.completion == log.trajectories()[1].completion
    assert found.samples[1].messages[0].text == "Be brief."
    score = found.results.scores[0]
    assert (score.name, score.metrics["mean"].value) == ("reward", report.metrics["reward"]["mean"])
    summaries = reader.read_eval_log_sample_summaries(str(path))
    assert [(one.id, one.epoch) for one in summaries][:3] == [(1, 1), (1, 2), (2, 1)]
    (listed,) = reader.list_eval_logs(str(path.parent))
    assert reader.read_eval_log(listed, header_only=True).eval.task == found.eval.task


def test_turns_with_tools_as_the_package_spells_them():
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    calling = {"role": "assistant", "content": "", "tool_calls": [call]}
    result = [{"role": "tool", "content": "2", "tool_call_id": "c1", "name": "add"}]
    turns = [Turn("1 + 1?", "add", message=calling), Turn(result, "It is 2.")]
    user, called, tool, said = dialogue(Trajectory([], "1 + 1?", "", turns=turns))
    assert user == {"role": "user", "content": "1 + 1?"} and said == {"role": "assistant", "content": "It is 2."}
    assert called["tool_calls"] == [{"id": "c1", "type": "function", "function": "add", "arguments": {"a": 1}}]
    assert tool == {"role": "tool", "content": "2", "tool_call_id": "c1", "function": "add"}


def test_a_file_is_no_folder(exported, tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(RunError, match="is a file, name a folder"):
        export_inspect(exported[1].folder, tmp_path / "taken")
