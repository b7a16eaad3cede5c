"""Evaluation logs as tables: data frames, files, and what other libraries read."""

import json

import pytest
from typer.testing import CliRunner

import lmrl
from lmrl import cli
from lmrl.errors import RecipeError, RunError
from lmrl.evaluation.frames import record
from lmrl.trajectories.trajectory import Trajectory
from tests import forking


def test_log_as_a_data_frame(logged):
    folder, report = logged
    frame = lmrl.load_eval(folder)
    assert len(frame) == 18 and frame["reward"].mean() == report.metrics["reward"]["mean"]
    one = report.trajectories[3]
    row = frame.iloc[3]
    assert (row["policy"], row["group"], row["completion"], row["length"]) == (
        "policy",
        1,
        one.completion,
        one.num_actions,
    )
    assert row["tokens"] == [one.segments[0].tokens[place] for place in one.segments[0].actions]
    with pytest.raises(RunError, match="is not an evaluation log"):
        lmrl.load_eval(folder.parent / "nowhere")


def test_scores_named_like_columns_keep_their_place():
    row = record("a", Trajectory([], "say", "no", metrics={"turns": 7.0, "seconds": 0.5, "words": 1.0}))
    assert (row["turns"], row["component/turns"], row["component/seconds"], row["words"]) == (0, 7.0, 0.5, 1.0)


def test_a_metric_that_nothing_has_is_named(tiny_folder, prompts_suite):
    arguments = ["eval", str(tiny_folder), "--suite", str(prompts_suite), "metrics=[reward, leters]", "episodes=1"]
    said = CliRunner().invoke(cli.app, arguments).output
    assert "metrics: no episode has a 'leters'; did you mean 'letters'?" in said


def test_log_is_read_by_datasets(logged, tmp_path):
    datasets = pytest.importorskip("datasets")
    found = datasets.load_dataset(
        "json", data_files=str(logged[0] / "samples.jsonl"), split="train", cache_dir=str(tmp_path)
    )
    assert found["prompt"][:3] == ["say 0", "say 0", "say 1"] and len(found) == 18
    assert found[4]["segments"][0]["tokens"] == logged[1].trajectories[4].segments[0].tokens


def test_home_is_expanded(logged, tiny_folder, prompts_suite, monkeypatch):
    monkeypatch.setenv("HOME", str(logged[0].parent))
    assert len(lmrl.load_eval("~/log")) == 18
    with pytest.raises(RecipeError, match="two policies or more are needed"):  # a log, and no model of that name
        lmrl.compare(["~/log"])
    again = lmrl.evaluate(tiny_folder, prompts_suite, log="~/log", part=4)  # plays nothing again
    assert again.metrics == logged[1].metrics


def test_exported_table_is_that_of_the_log(tiny_folder, prompts_suite, tmp_path):
    (prompts_suite.parent / "some.py").write_text(
        "def some(completions, answer):\n    return [None if one == 3 else 1.0 for one in answer]\n"
    )
    suite = prompts_suite.parent / "some.yaml"
    suite.write_text(
        "task: {prompts: {path: prompts.jsonl}, rewards: [{function: some.py:some}], max_failed: 0.5}\n"
        "rollouts: {max_new_tokens: 2}\n"
    )
    done = forking.run(["eval", tiny_folder, "--suite", suite, "--export", tmp_path / "table.jsonl"])
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "table.jsonl").read_text().splitlines()]
    lmrl.evaluate(tiny_folder, suite, log=tmp_path / "log")
    assert len(rows) == 9 and list(rows[0]) == list(lmrl.load_eval(tmp_path / "log"))
    assert rows[3]["reward"] is None and "returned None" in rows[3]["failure"] and rows[3]["began"]


@pytest.mark.parametrize("kind", ["csv", "json", "jsonl", "parquet"])
def test_tables_hold_every_episode(logged, tmp_path, kind):
    import pandas

    from lmrl.evaluation.frames import frame_of, records_of, write_table

    report, path = logged[1], tmp_path / f"table.{kind}"
    write_table(frame_of(list(records_of(report.episodes))), path)
    read = {"csv": pandas.read_csv, "parquet": pandas.read_parquet, "json": pandas.read_json}.get(
        kind, lambda file: pandas.read_json(file, lines=True)
    )
    found = read(path)
    assert found["letters"].tolist() == [one.components["letters"] for one in report.trajectories]
    assert ("tokens" in found) == (kind != "csv")


def test_a_table_needs_a_known_ending(tmp_path):
    from lmrl.evaluation.frames import check_table_name

    with pytest.raises(RunError, match="end it in .csv, .json"):
        check_table_name(tmp_path / "table.xls")
