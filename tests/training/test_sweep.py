"""Sweeps: what is run, failures and interrupts, and the numbers over runs."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lmrl.errors import LmrlError, RecipeError, RunError
from lmrl.training.sweep import (
    SweepError,
    combinations,
    failure,
    finished_line,
    over_runs,
    read_over,
    sweep,
    sweep_lines,
    swept_values,
)

TINY = [
    "training.steps=2",
    "model.config.hidden_size=16",
    "model.config.intermediate_size=16",
    "model.config.num_hidden_layers=1",
    "model.config.num_key_value_heads=1",
    "source.episodes=20",
    "source.batch_size=8",
    "evaluation.episodes=2",
]
ENV = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "lmrl", "train", *map(str, arguments)]


def lmrl(*arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run(command(*arguments), capture_output=True, text=True, env=ENV, timeout=300)


# ------------------------------------------------------------------------------------------------------ what is to be run
def test_values_split_at_commas_outside_brackets():
    assert read_over(["training.seed=0, 1,2", "source.player=random,{random: 0.9, optimal: 0.1},'a,b'", "x=[1,2]"]) == {
        "training.seed": ["0", "1", "2"],
        "source.player": ["random", "{random: 0.9, optimal: 0.1}", "'a,b'"],
        "x": ["[1,2]"],
    }


@pytest.mark.parametrize(
    ("over", "message"),
    [
        (["training.seed"], "not of the form key=value,value"),
        (["training.seed="], "has no values"),
        (["training.seed=0,,1"], "not a YAML list"),
        (["training.seed={0,1"], "not a YAML list"),
        (["training.seed=0,1,0"], "training.seed=0 and training.seed=0 make the same run: leave one out"),
        (["optimizer.lr=1e-3,2e-3,0.001"], "optimizer.lr=1e-3 and optimizer.lr=0.001 make the same run"),
        (["training.seed=0", "training.seed=1"], "names 'training.seed' twice"),
        (["training.steps=3,4"], "both set and swept"),
        (["training.sed=0,1"], "unknown key 'training.sed'"),
        (["training.seed=0,x"], "wrong value for 'training.seed'"),
    ],
)
def test_mistakes_are_found_before_anything_runs(over, message):
    with pytest.raises(RecipeError, match=message):
        combinations("random_walks/bc", TINY, over)


def test_names_and_recipes_of_combinations():
    points = combinations("random_walks/ppo", [], ["training.seed=0,1", "task.graph=1000,1001"])
    assert [point.name for point in points] == [
        "seed-0_graph-1000",
        "seed-0_graph-1001",
        "seed-1_graph-1000",
        "seed-1_graph-1001",
    ]
    assert [(point.recipe.training.seed, point.recipe.task.graph) for point in points][2] == (1, 1000)
    assert points[0].columns == ["optimality", "arrived", "length"]
    points = combinations("random_walks/ppo", [], ["training.steps=5", "stages.warmup.training.steps=6"])
    assert [point.name for point in points] == ["training-steps-5_warmup-training-steps-6"]
    points = combinations("random_walks/bc", [], ["source.player={random: 1},{random: 2.5},optimal"])
    assert [point.name for point in points] == ["player-random-1", "player-random-2.5", "player-optimal"]
    points = combinations("random_walks/bc", [], ["description=a b,a/b,a-b-1"])
    assert [point.name for point in points] == ["description-a-b-1", "description-a-b-2", "description-a-b-1-3"]
    points = combinations("random_walks/bc", ["objective.epochs=3"], ["objective.name=ppo", "source.name=rollouts"])
    assert points[0].recipe.objective.epochs == 3  # though choosing the objective clears the section


# --------------------------------------------------------------------------------------------------------------- results
def score(mean: float) -> dict:
    return {"mean": mean, "ci95": [mean - 1, mean + 1], "n": 640}


def test_scores_over_runs_by_hand():
    rows = over_runs(
        {
            "a": {"BC": {"optimality": score(0.2), "length": score(3)}, "optimum": {"optimality": score(1)}},
            "b": {"BC": {"optimality": score(0.4)}, "PPO": {"optimality": score(0.9)}},
        }
    )
    assert list(rows) == ["BC", "PPO", "optimum"]
    found = rows["BC"]["optimality"]
    assert found["mean"] == pytest.approx(0.3) and found["n"] == 2 and found["lowest"] == 0.2
    assert found["values"] == {"a": 0.2, "b": 0.4}
    # sample standard deviation 0.1414, over sqrt(2) runs, times t(0.975, 1) = 12.70620
    assert found["ci95"] == pytest.approx([0.3 - 1.270620, 0.3 + 1.270620])
    assert rows["PPO"]["optimality"]["n"] == 1 and "values" in rows["BC"]["length"]
    head, first, *_ = sweep_lines(rows, ["optimality", "nothing"])
    assert head == ["", "optimality", "lowest", "n"] and first == ["BC", "0.300 ± 1.271", "0.200", "2"]


def test_a_run_without_a_best_row_counts_with_its_result():
    """a and b kept their last policy, which in b is the best one too; c kept its best."""
    rows = over_runs(
        {
            "a": {"GRPO, best": {"reward": score(0.6)}, "GRPO": {"reward": score(0.5)}},
            "b": {"GRPO": {"reward": score(1.0)}},
            "c": {"GRPO": {"reward": score(0.8)}, "GRPO, last": {"reward": score(0.2)}},
        }
    )
    values = {label: row["reward"]["values"] for label, row in rows.items()}
    assert values["GRPO"] == {"a": 0.5, "b": 1.0, "c": 0.8}
    assert values["GRPO, best"] == {"a": 0.6, "b": 1.0, "c": 0.8}
    assert values["GRPO, last"] == {"a": 0.5, "b": 1.0, "c": 0.2}


def test_values_are_read_as_overrides_are():
    over = ["optimizer.lr=1e-4,0.001", "source.player={random: 1e-1},optimal"]
    assert swept_values(over) == {"optimizer.lr": [1e-4, 1e-3], "source.player": [{"random": 0.1}, "optimal"]}


def test_a_failure_in_one_line():
    assert failure("run folder: x\nlmrl: model.config: cannot build\n\nwarning\n", 2) == "model.config: cannot build"
    traceback = "Traceback (most recent call last):\nValueError: no\n"
    assert failure(f"lmrl: still waiting for reward f (60 s)\n{traceback}", 1) == "ValueError: no"
    assert failure(f"{traceback}lmrl: model.config: cannot build\n", 2) == "model.config: cannot build"
    assert failure("", 7) == "exit code 7"
    assert failure("lmrl: earlier\n", -9) == "ended by SIGKILL"
    assert failure("main 1/4\n", 0, "reward f") == "exit code 0, but no result: ended in the middle of reward f"


# --------------------------------------------------------------------------------------------------------------- running
@pytest.mark.slow
def test_a_sweep_keeps_what_finished_and_goes_on_past_failures(tmp_path):
    folder = tmp_path / "sweep"
    over = ["--over", "model.config.num_attention_heads=2,5", "--over", "training.seed=0,1"]
    done = lmrl("random_walks/bc", *TINY, *over, "--jobs", 2, "--output", folder)
    assert done.returncode == 1, done.stderr
    assert done.stderr.startswith("lmrl: 2 of 4 runs failed: num_attention_heads-5_seed-")
    assert done.stderr.count("\n") == 1
    for seed in (0, 1):
        assert f"num_attention_heads-2_seed-{seed}  data 0." in done.stdout
        assert f"num_attention_heads-5_seed-{seed} failed: model.config: cannot build 'llama'" in done.stdout
    assert "Result over runs" in done.stdout
    results = json.loads((folder / "results.json").read_text())
    assert results["over"] == {"model.config.num_attention_heads": [2, 5], "training.seed": [0, 1]}
    assert list(results["rows"]) == ["data", "BC", "optimum"] and len(results["failed"]) == 2
    values = results["rows"]["BC"]["optimality"]["values"]
    for name, value in values.items():
        own = json.loads((folder / name / "results.json").read_text())
        assert own["BC"]["optimality"]["mean"] == value
    assert list(values) == ["num_attention_heads-2_seed-0", "num_attention_heads-2_seed-1"]

    # Once more, without what fails: nothing is trained, and only --resume and the same recipe may go on there.
    over = ["model.config.num_attention_heads=2", "training.seed=0,1"]
    with pytest.raises(RunError, match="is not empty: resume it with --resume"):
        sweep("random_walks/bc", TINY, over, folder)
    with pytest.raises(RunError, match="'optimizer.eps' differs"):
        sweep("random_walks/bc", [*TINY, "optimizer.eps=1e-7"], over, folder, resume=True)
    before = {path: path.stat().st_mtime_ns for path in folder.glob("num_attention_heads-2*/**/*") if path.is_file()}
    again = sweep("random_walks/bc", TINY, over, folder, resume=True)
    assert again["rows"] == results["rows"] and again["failed"] == {}
    assert all(path.stat().st_mtime_ns == time_ for path, time_ in before.items() if path.name != ".lock")


def test_a_run_that_ends_with_0_but_no_result_failed(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.executable", "true")
    with pytest.raises(SweepError, match="2 of 2 runs failed: seed-0, seed-1"):
        sweep("random_walks/bc", TINY, ["training.seed=0,1"], tmp_path)
    assert json.loads((tmp_path / "results.json").read_text())["failed"] == dict.fromkeys(
        ("seed-0", "seed-1"), "exit code 0, but no result"
    )


def test_a_resumed_sweep_keeps_logs(tmp_path, monkeypatch):
    """The first attempt says why it failed, the second does not."""
    program = tmp_path / "python"
    program.write_text(
        f"#!/bin/sh\n[ -e {tmp_path}/tried ] && exit 7\ntouch {tmp_path}/tried\necho lmrl: no data; exit 2\n"
    )
    program.chmod(0o700)
    monkeypatch.setattr("sys.executable", str(program))
    for failed in ("no data", "exit code 7"):
        with pytest.raises(SweepError):
            sweep("random_walks/bc", TINY, ["training.seed=0"], tmp_path / "sweep", resume=True)
        assert json.loads((tmp_path / "sweep" / "results.json").read_text())["failed"] == {"seed-0": failed}
        assert (tmp_path / "sweep" / "seed-0.log").read_text() == "lmrl: no data\n"


def test_a_sweep_without_evaluations_says_why_it_has_no_table(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("lmrl.training.sweep._finished", lambda folder, point: True)
    monkeypatch.setattr("lmrl.training.sweep._read", lambda folder, point: {})
    sweep("random_walks/bc", TINY, ["training.seed=0,1"], tmp_path / "sweep")
    said = " ".join(capsys.readouterr().out.split())
    assert "no run was evaluated, so there are no scores to compare: set evaluation.every, or lmrl eval" in said


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_ends_the_runs_and_lets_them_save(tmp_path, number):
    folder = tmp_path / "my sweep"
    settings = [*TINY[1:], "training.steps=100000", "training.checkpoint_every=0", "evaluation.suite=null"]
    arguments = ["random_walks/bc", *settings, "--over", "training.seed=0,1", "--output", folder]
    process = subprocess.Popen(command(*arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENV)
    metrics = folder / "seed-0" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.is_file() and metrics.stat().st_size) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(number)
    said, _ = process.communicate(timeout=120)
    if number == signal.SIGTERM:
        assert process.returncode == 128 + signal.SIGTERM
        assert f"interrupted; continue with the same command, --output '{folder}' and --resume" in said
    while "saved a checkpoint at step" not in (folder / "seed-0.log").read_text() and time.monotonic() < deadline:
        time.sleep(0.1)  # the run of a killed sweep ends after it
    assert list((folder / "seed-0/stages/main/checkpoints").iterdir())  # it is asked once, so it saved
    assert "saved a checkpoint at step" in (folder / "seed-0.log").read_text()
    assert not (folder / "seed-1").exists() and not (folder / "results.json").exists()


def test_a_sweep_on_the_command_line_says_what_it_lacks(tmp_path, monkeypatch, capsys):
    from lmrl.cli.train import command as train

    monkeypatch.chdir(tmp_path)
    for options, message in [
        ({"name": None, "over": ["training.seed=0"]}, "--over needs a recipe"),
        ({"name": "random_walks/bc", "jobs": 2}, "--jobs goes with --over"),
        ({"name": "random_walks/bc", "over": ["training.seed=0"], "resume": True}, "needs the sweep's folder"),
        ({"name": "random_walks/bc", "over": ["training.seed=0"], "jobs": 0}, "at least one run at a time"),
        ({"name": "random_walks/bc", "over": ["training.seed=0"], "dry_run": True, "resume": True}, "leave --resume"),
    ]:
        with pytest.raises(LmrlError, match=message):
            train(**options)
    train("random_walks/bc", TINY, over=["training.seed=0,1"], dry_run=True)
    assert "dry run of seed-0 passed, and so did the checks of 1 more recipe:" in capsys.readouterr().out
    assert list(Path().iterdir()) == []


def test_the_line_of_a_finished_run():
    [point] = combinations("random_walks/bc", TINY, ["training.seed=3"])
    assert finished_line(point, {"data": {"return": score(0)}, "BC": {"optimality": score(0.5)}}) == "seed-3  BC 0.500"
