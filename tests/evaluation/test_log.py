"""Evaluation logs: what they hold, resuming, rescoring."""

import json
import shutil
import sys
import time

import pytest
import typer
from typer.testing import CliRunner

import lmrl
from lmrl.errors import RecipeError, RunError
from lmrl.evaluation.api import rescored
from lmrl.evaluation.evaluate import Play, played_by
from lmrl.evaluation.identity import policy_hash, suite_version
from lmrl.evaluation.log import EvalLog, logs_in
from lmrl.evaluation.suites import load_suite
from lmrl.named_files import changed, contents
from lmrl.plugins import objects
from tests import forking


def lines_of(folder):
    rows = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in ("began", "seconds")} for row in rows]


def test_log_holds_what_was_played(logged, tiny_folder, prompts_suite):
    folder, report = logged
    log = EvalLog(folder)
    assert len(log.rows()) == log.episodes and log.header["part"] == 2 and log.header["engine"]["name"] == "hf"
    assert log.header["policy"]["hash"] == policy_hash(str(tiny_folder))
    assert log.header["suite"]["version"] == suite_version(load_suite(prompts_suite))
    row = lines_of(folder)[5]
    assert row["episode"] == 5 and row["prompt"] == "say 2" and json.loads(row["columns"])["answer"] == 2
    assert set(json.loads(row["components"])) == {"even", "letters", "letters/half"}
    trajectories = log.trajectories()
    assert trajectories == report.trajectories
    assert all(one.segments[0].logprobs[place] < 0 for one in trajectories for place in one.segments[0].actions)
    assert json.loads((folder / "scores.json").read_text()) == report.metrics


def test_a_log_changes_no_score(logged, tiny_folder, prompts_suite):
    plain = lmrl.evaluate(tiny_folder, prompts_suite)
    assert plain.metrics["reward"] == logged[1].metrics["reward"]


@pytest.mark.parametrize(
    ("left", "torn"),
    [(0, b""), (1, b""), (4, b""), (5, b""), (17, b""), (18, b""), (3, b'{"group": 2, "epis'), (18, b"\xff\n")],
)
def test_stopped_log_resumes(logged, tiny_folder, prompts_suite, tmp_path, left, torn, monkeypatch):
    """Stopped after some lines, and within one: the same command ends with the same bytes, and plays no more than it
    has to."""
    folder, _ = logged
    shutil.copytree(folder, tmp_path / "log")
    (tmp_path / "log" / "scores.json").unlink()
    lines = (folder / "samples.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "log" / "samples.jsonl").write_bytes(b"".join(lines[:left]) + torn)
    from lmrl.evaluation.evaluate import Evaluator

    played, play = [], Evaluator.play
    monkeypatch.setattr(
        Evaluator, "play", lambda self, starts, *args: played.extend(starts) or play(self, starts, *args)
    )
    lmrl.evaluate(tiny_folder, prompts_suite, log=tmp_path / "log")
    assert (tmp_path / "log" / "scores.json").read_bytes() == (folder / "scores.json").read_bytes()
    assert lines_of(tmp_path / "log") == lines_of(folder)
    whole = left if left == 18 else left // 4 * 4  # parts of two prompts, two samples each
    assert played == list(range(whole // 2, 9))


def test_a_resumed_log_is_scored_as_asked(logged, tiny_folder, prompts_suite, tmp_path):
    shutil.copytree(logged[0], tmp_path / "log")
    report = lmrl.evaluate(
        tiny_folder, prompts_suite, ["metrics=[length]", "task.max_failed=0.5"], log=tmp_path / "log"
    )
    assert next(iter(report.metrics)) == "length"
    log = EvalLog(tmp_path / "log")
    assert log.header["max_failed"] == 0.5 and log.suite.metrics == ["length"]
    assert log.header["begun"] == EvalLog(logged[0]).header["begun"]


def test_prompts_that_nothing_scores_have_no_reward(tiny_folder, tmp_path):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n')
    (tmp_path / "suite.yaml").write_text("task: {prompts: {path: prompts.jsonl}}\nrollouts: {max_new_tokens: 2}\n")
    report = lmrl.evaluate(tiny_folder, tmp_path / "suite.yaml", log=tmp_path / "log")
    assert list(report.metrics) == ["length"]
    assert lines_of(tmp_path / "log")[0]["reward"] is None
    assert "return" not in lmrl.load_eval(tmp_path / "log")


def test_what_was_played_is_said_of_each_policy():
    """Policies whose tokenizers leave out other prompts, or logs of other suites, do not play the same."""
    assert played_by({"policy": Play("9 prompts", 10, 10)}) == "9 prompts"
    assert played_by({"policy": Play("9 prompts", 10, 8)}) == "9 prompts; failed and left out: 2 of 10 episodes"
    plays = {"a": Play("9 prompts", 9, 9), "b": Play("9 prompts", 9, 7), "c": Play("8 prompts", 8, 7)}
    assert played_by(plays) == (
        "a, b: 9 prompts; c: 8 prompts; failed and left out: 2 of 9 episodes of b, 1 of 8 episodes of c"
    )


def test_prompts_that_are_too_long_are_said(tiny_folder, tmp_path):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n{"prompt": "bbbbbbbbbbbbbbbb"}\n')
    (tmp_path / "suite.yaml").write_text(
        "task:\n  prompts: {path: prompts.jsonl, max_tokens: 4}\n"
        "  rewards: [{function: lmrl.reward_models.shaping.length}]\nrollouts: {max_new_tokens: 1}\n"
    )
    assert lmrl.evaluate(tiny_folder, tmp_path / "suite.yaml").played == (
        "1 prompt, 1 fresh episode from each; 1 of 2 prompts are longer than task.prompts.max_tokens=4"
    )


def test_policies_of_similar_names_have_own_logs(tiny_folder, prompts_suite, tmp_path, monkeypatch):
    for name in ("m1", "at/m1"):
        shutil.copytree(tiny_folder, tmp_path / name)
    (tmp_path / "m1" / "extra.txt").write_text("another policy")
    monkeypatch.chdir(tmp_path / "at")
    report = lmrl.evaluate(["m1", "../m1"], prompts_suite, ["episodes=2"], log=tmp_path / "logs")
    assert sorted(report.rows) == ["../m1", "m1"]
    assert {one.policy: one.folder.name for one in logs_in(tmp_path / "logs")} == {"m1": "m1", "../m1": "m1-2"}


def test_another_evaluation_is_refused(logged, tiny_folder, prompts_suite, tmp_path):
    folder, _ = logged
    for overrides, key in ((["rollouts.temperature=0.5"], "suite.version"), (["seed=1"], "suite.version")):
        with pytest.raises(RunError, match=f"holds another evaluation, its {key} differs"):
            lmrl.evaluate(tiny_folder, prompts_suite, overrides, log=folder)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(RunError, match="is not an evaluation log: choose another folder"):
        lmrl.evaluate(tiny_folder, prompts_suite, log=tmp_path)
    shutil.copytree(tiny_folder, tmp_path / "other")
    (tmp_path / "other" / "extra.txt").write_text("changed")
    with pytest.raises(RunError, match="its policy.hash differs"):
        lmrl.evaluate(tmp_path / "other", prompts_suite, log=folder)


def test_version_depends_on_content_not_path(prompts_suite, tmp_path):
    shutil.copytree(prompts_suite.parent, tmp_path / "moved")
    moved, version = tmp_path / "moved" / "suite.yaml", suite_version(load_suite(prompts_suite))
    assert suite_version(load_suite(moved)) == version
    assert suite_version(load_suite(moved, ["rollouts.slots=3", "metrics=[reward]", "task.call_timeout=5"])) == version
    assert suite_version(load_suite(moved, ["rollouts.top_k=3"])) != version
    judge = tmp_path / "moved" / "judge.py"
    judge.write_text(judge.read_text().replace("== 0", "== 1"))
    assert suite_version(load_suite(moved)) != version


def test_time_limits_of_environments_are_no_part_of_versions():
    environment = {"name": "maze", "options": {}, "max_turns": 5, "call_timeout": None, "version": "1", "source": "a"}
    suite = load_suite("maze")
    version = suite_version(suite, environment)
    assert suite_version(load_suite("maze", ["task.call_timeout=5"]), environment | {"call_timeout": 5.0}) == version
    assert suite_version(suite, environment | {"max_turns": 6}) != version


def test_a_log_of_an_edited_suite_is_not_compared(tiny_folder, prompts_suite, tmp_path):
    """The same policy had differed from its own log, because another reward judged it."""
    shutil.copytree(prompts_suite.parent, tmp_path / "suite")
    lmrl.evaluate(tiny_folder, tmp_path / "suite" / "suite.yaml", log=tmp_path / "log")
    assert lmrl.compare([tmp_path / "log", tiny_folder]).differences[0].mean == 0
    judge = tmp_path / "suite" / "judge.py"
    judge.write_text(judge.read_text().replace("== 0", "== 1"))
    with pytest.raises(RunError, match="log: its suite was edited since"):
        lmrl.compare([tmp_path / "log", tiny_folder])
    rescored(tmp_path / "log", target=tmp_path / "today")
    assert lmrl.compare([tmp_path / "today", tiny_folder]).differences[0].mean == 0


def test_version_depends_on_the_code_of_objects(prompts_suite, monkeypatch):
    """A log whose reward was defined anew in a notebook is not resumed, nor compared with an older one."""
    monkeypatch.setattr(objects, "_provided", {})
    rewards = [lambda completions, **_: [1.0] * len(completions), lambda completions, **_: [2.0] * len(completions)]
    versions = []
    for function in (*rewards, rewards[0]):
        lmrl.provide(own=function)
        versions.append(suite_version(load_suite(prompts_suite, ["task.rewards=[{function: python:own}]"])))
    assert versions[0] == versions[2] != versions[1]
    files = contents({"function": "python:own"})
    assert changed(files) == []
    lmrl.provide(own=rewards[1])
    assert changed(files) == ["python:own"]


def test_an_edited_reward_counts_in_the_next_call(tiny_folder, tmp_path):
    """As in a notebook, whose calls share a process: the log says the new code's version, so it has to be what judged."""
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n')
    (tmp_path / "suite.yaml").write_text(
        "task:\n  prompts: {path: prompts.jsonl}\n  rewards: [judge.py:own, {function: judge.py:own, name: other, workers: 1}]\n"
        "rollouts: {max_new_tokens: 1}\n"
    )
    for value in (1.0, 20.5, 20.5):
        (tmp_path / "judge.py").write_text(f"def own(completions, **_):\n    return [{value}] * len(completions)\n")
        before = sys.modules.copy()
        scores = lmrl.evaluate(tiny_folder, tmp_path / "suite.yaml").metrics
        assert scores["own"]["mean"] == scores["other"]["mean"] == value
    assert {name: sys.modules[name] for name in before} == before  # what stayed the same is not imported again


# -------------------------------------------------------------------------------------------------------------- rescoring
def test_rescoring_by_the_same_rewards_changes_nothing(logged, tmp_path):
    folder, report = logged
    again = rescored(folder, target=tmp_path / "again")
    assert again.metrics == report.metrics and lines_of(tmp_path / "again") == lines_of(folder)
    assert EvalLog(tmp_path / "again").scores()[0] == report.metrics


def test_rescoring_by_another_suite(logged, prompts_suite, tmp_path):
    folder, report = logged
    again = rescored(folder, prompts_suite.parent / "longer.yaml", target=tmp_path / "again")
    assert again.metrics["reward"]["mean"] == report.metrics["letters"]["mean"]
    pairs = zip(report.trajectories[::2], report.trajectories[1::2], strict=True)
    best = [max(len(one.completion), len(other.completion)) for one, other in pairs]
    assert again.metrics["best@2"]["mean"] == pytest.approx(sum(best) / 9)
    log = EvalLog(tmp_path / "again")
    assert (
        log.header["rescored"]["from"] == EvalLog(folder).header["suite"]["version"] != log.header["suite"]["version"]
    )
    assert [one.segments[0].tokens for one in log.trajectories()] == [
        one.segments[0].tokens for one in EvalLog(folder).trajectories()
    ]
    assert all(sum(one.segments[0].rewards) == one.reward == len(one.completion) for one in log.trajectories())


def test_an_incomplete_log_is_not_rescored(logged, tmp_path):
    shutil.copytree(logged[0], tmp_path / "log")
    lines = (logged[0] / "samples.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "log" / "samples.jsonl").write_bytes(b"".join(lines[:6]))
    with pytest.raises(RunError, match="holds 6 of 18 episodes: resume it"):
        rescored(tmp_path / "log")


def test_episodes_without_an_answer_stay_failed(logged, tmp_path):
    """As those whose request an endpoint refused: there is no answer to score."""
    shutil.copytree(logged[0], tmp_path / "log")
    rows = [json.loads(line) for line in (logged[0] / "samples.jsonl").read_text().splitlines()]
    rows[3] |= {"turns": [], "segments": [], "completion": "", "reward": None, "components": None, "failure": "refused"}
    (tmp_path / "log" / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = rescored(tmp_path / "log")
    kept = [one for place, one in enumerate(logged[1].trajectories) if place != 3]
    assert [one.reward for one in report.trajectories] == [one.reward for one in kept]
    assert report.played.endswith("; failed and left out: 1 of 18 episodes")


def test_rescoring_needs_rewards(logged, ilql_run, tmp_path):
    with pytest.raises(RecipeError, match="has no rewards to score completions by"):
        rescored(logged[0], "maze")
    lmrl.evaluate(ilql_run, overrides=["samples=1"], log=tmp_path / "log")
    with pytest.raises(RecipeError, match="were judged by their environment"):
        rescored(tmp_path / "log")
    assert EvalLog(tmp_path / "log").scores()[0] == lmrl.evaluate(ilql_run, overrides=["samples=1"]).metrics


# --------------------------------------------------------------------------------------------------------- the command line
@pytest.fixture(scope="module")
def slow_suite(prompts_suite):
    """The suite with rewards that take their time, so that an evaluation can be killed in its course."""
    folder = prompts_suite.parent
    judge = (folder / "judge.py").read_text().replace("    return [float", "    time.sleep(0.1)\n    return [float")
    (folder / "slow.py").write_text("import time\n\n\n" + judge)
    (folder / "slow.yaml").write_text(prompts_suite.read_text().replace("judge.py", "slow.py"))
    return folder / "slow.yaml"


def test_killed_evaluation_resumes(tiny_folder, slow_suite, tmp_path):
    """SIGKILL as soon as some parts are on disk, twice; then the same command comes to its end."""

    def command(name):
        return ["eval", tiny_folder, "--suite", slow_suite, "--log", tmp_path / name, "--log-every", "2"]

    def lines():
        path = tmp_path / "killed" / "samples.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    assert forking.run(command("whole")).returncode == 0
    for least in (2, 8):
        process, end = forking.Process(command("killed")), time.monotonic() + 60
        while lines() < least and time.monotonic() < end:
            time.sleep(0.01)
        process.kill()
        process.wait(60)
        assert least <= lines() < 18 and not (tmp_path / "killed" / "scores.json").exists()
    done = forking.run([*command("killed"), "--export", tmp_path / "table.csv", "--json", tmp_path / "scores.json"])
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "killed" / "scores.json").read_bytes() == (tmp_path / "whole" / "scores.json").read_bytes()
    assert lines_of(tmp_path / "killed") == lines_of(tmp_path / "whole")
    assert (tmp_path / "table.csv").read_text().count("say ") == 18
    scores = json.loads((tmp_path / "scores.json").read_text())["metrics"]
    assert scores == json.loads((tmp_path / "whole" / "scores.json").read_text())


def test_rescoring_by_command(logged, prompts_suite, tmp_path):
    suite = prompts_suite.parent / "longer.yaml"
    done = forking.run(["eval", "--rescore", logged[0], "--suite", suite, "--json", tmp_path / "scores.json"])
    assert done.returncode == 0, done.stderr
    scores = json.loads((tmp_path / "scores.json").read_text())["metrics"]
    assert scores["reward"]["mean"] == logged[1].metrics["letters"]["mean"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name a policy to score, or a log to score again"),
        (["some/model", "--rescore", "log"], "name a policy to score, or a log to score again"),
        (["--rescore", "log", "--beta", "2"], "--beta: --rescore loads no policy and plays nothing: leave it out"),
        (["some/model", "--log-every", "4"], "--log-every needs a log: add --log FOLDER"),
        (["some/model", "--inspect", "out"], "--inspect converts a log: add --log FOLDER"),
        (["some/model", "--export", "table.xls"], "--export: 'table.xls' does not name a table"),
    ],
)
def test_mistakes_of_the_command(arguments, message):
    from lmrl.cli.eval import command

    app = typer.Typer()
    app.command()(command)
    found = CliRunner().invoke(app, arguments)
    assert isinstance(found.exception, RecipeError | RunError) and message in str(found.exception)
