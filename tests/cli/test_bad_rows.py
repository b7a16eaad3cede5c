"""`lmrl train` on logged data with a malformed row."""

import json

import pytest

from lmrl.cli.train import _skip_bad_rows
from lmrl.errors import RecipeError
from lmrl.recipe.files import load_recipe, stages_of
from tests.cli.test_cli import lmrl
from tests.conftest import TINY_WALKS

ROWS = [
    '{"turns": [{"observation": "b", "action": "a", "reward": 1.0}]}',
    '{"turns": [{"observation": "c"}]}',
    '{"turns": [{"observation": "d", "action": "ba", "reward": 0.5}]}',
]


def test_malformed_rows_stop_a_run_or_are_kept_aside(tmp_path):
    (tmp_path / "data.jsonl").write_text("".join(row + "\n" for row in ROWS))
    tiny = [change for change in TINY_WALKS if not change.startswith("source.")]
    arguments = [
        "random_walks/bc",
        *tiny,
        "source={name: dataset, path: data.jsonl, batch_size: 2}",
        "training.steps=2",
    ]
    command = ["train", *arguments, "evaluation.suite=null", "--output", "run"]
    done = lmrl(*command, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "Traceback" not in done.stderr
    path = tmp_path / "data.jsonl"
    assert done.stderr.startswith(f"lmrl: {path}, line 2: ") and "'action'" in done.stderr
    done = lmrl(*command[:-1], "skipping", "--skip-bad-rows", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    report = tmp_path / "skipping/bad_rows.jsonl"
    assert f"note: {path}: left out 1 malformed line (see {report})" in done.stdout
    (row,) = map(json.loads, report.read_text().splitlines())
    assert (row["file"], row["line"], row["row"]) == (str(path), 2, ROWS[1]) and "'action'" in row["reason"]
    assert "skip_bad_rows: true" in (tmp_path / "skipping/recipe.yaml").read_text()  # so that it resumes alike


def test_it_holds_for_every_stage_that_reads_a_log():
    fresh = ["source={name: rollouts, best: 0.5}"]
    stages = [
        "stages.one={training: {steps: 2}}",
        "stages.two={source: {name: dataset, player: random}}",
        "stages.three={source: {best: 0.2}}",
    ]
    recipe = load_recipe("random_walks/bc", [*fresh, *stages])
    _skip_bad_rows(recipe)
    skips = {name: getattr(stage.source, "skip_bad_rows", None) for name, stage in stages_of(recipe).items()}
    assert skips == {"one": None, "two": True, "three": None, "main": None}
    recipe = load_recipe(
        "random_walks/bc", ["stages.one={training: {steps: 2}}", "stages.two={source: {name: rollouts, best: 0.2}}"]
    )
    _skip_bad_rows(recipe)
    skips = {name: getattr(stage.source, "skip_bad_rows", None) for name, stage in stages_of(recipe).items()}
    assert skips == {"one": True, "two": None, "main": True}
    with pytest.raises(RecipeError, match="the recipe reads no logged data"):
        _skip_bad_rows(load_recipe("random_walks/bc", fresh))
    with pytest.raises(RecipeError, match="a resumed run keeps its recipe"):
        _skip_bad_rows(None)
