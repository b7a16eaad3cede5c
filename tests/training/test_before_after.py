"""Suites that the base model and the final policy both play: paired differences, kept logs, mistakes before the training."""

import json
import sys

import pytest

import lmrl
from lmrl.errors import RecipeError
from lmrl.training import before_after

REWARD = "def letters(completions, **_):\n    return [min(text.count('a'), 4) / 4 for text in completions]\n"


@pytest.fixture
def recipe(tiny_folder, tmp_path):
    """Imitates the letter a, and asks beside that how often prompts of a suite are answered by it."""
    (tmp_path / "letters.py").write_text(REWARD)
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps({"prompt": one}) + "\n" for one in "bcde"))
    suite = {
        "task": {"prompts": {"path": "asked.jsonl"}, "rewards": [{"function": "letters.py:letters"}]},
        "rollouts": {"max_new_tokens": 4},
        "samples": 2,
        "metrics": ["reward"],
    }
    (tmp_path / "saying_a.yaml").write_text(json.dumps(suite))
    rows = [
        {"messages": [{"role": "user", "content": one}, {"role": "assistant", "content": "aaaa"}]} for one in "fghi"
    ]
    (tmp_path / "said.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    written = {
        "model": {"path": str(tiny_folder)},
        "task": {"prompts": {"path": "asked.jsonl"}},
        "source": {"name": "dataset", "path": "said.jsonl", "batch_size": 4},
        "objective": {"name": "likelihood"},
        "optimizer": {"lr": 3e-2},
        "training": {"steps": 12, "threads": 1, "checkpoint_every": 0},
        "evaluation": {"suite": None, "before_after": ["saying_a.yaml"]},
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(written))
    return tmp_path / "recipe.yaml"


def test_the_difference_is_that_of_compare(recipe, tiny_folder, tmp_path, capsys):
    result = lmrl.train(recipe, output=tmp_path / "run")
    rows = result.before_after["saying_a"]
    assert list(rows) == ["before", "after", "difference"]
    compared = lmrl.compare([tiny_folder, tmp_path / "run"], suite=tmp_path / "saying_a.yaml")
    (expected,) = compared.differences
    found = rows["difference"]["reward"]
    assert (found["mean"], found["ci95"], found["n"], found["clusters"]) == (expected.mean, expected.ci95, 8, 4)
    assert rows["before"]["reward"] == compared.rows["A"]["reward"]
    assert rows["after"]["reward"] == compared.rows["B"]["reward"]
    assert found["mean"] > 0.2 and found["mean"] == pytest.approx(
        rows["after"]["reward"]["mean"] - rows["before"]["reward"]["mean"]
    )
    assert "saying_a, before and after" in (said := capsys.readouterr().out) and "difference" in said
    assert json.loads((tmp_path / "run" / "before_after.json").read_text()) == result.before_after


def test_a_finished_run_asks_its_logs(recipe, tmp_path, monkeypatch):
    first = lmrl.train(recipe, ["training.steps=1"], output=tmp_path / "run")

    def play(*_):
        raise AssertionError("played again")

    monkeypatch.setattr(sys.modules["lmrl.evaluation.evaluate"].Evaluator, "play", play)
    again = lmrl.train(tmp_path / "run", resume=True)
    assert again.before_after == first.before_after != {}


def test_only_some_episodes(recipe, tmp_path):
    suites = f"evaluation.before_after=[{{suite: '{tmp_path}/saying_a.yaml', episodes: 2, changes: [samples=3]}}]"
    result = lmrl.train(recipe, [suites, "training.steps=1"], output=tmp_path / "run")
    found = result.before_after["saying_a"]["difference"]["reward"]
    assert found["clusters"] == 2 and found["n"] == 6


def test_an_error_comes_after_the_results(recipe, tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise RecipeError("the suite is gone")

    monkeypatch.setattr(sys.modules["lmrl.training.train"], "before_after", fail)  # the name is the function's, too
    with pytest.raises(RecipeError, match="the suite is gone"):
        lmrl.train(recipe, ["training.steps=1"], output=tmp_path / "run")
    assert (tmp_path / "run" / "stages" / "main" / "final").is_dir()


@pytest.mark.parametrize(
    "changes, said",
    [
        (["evaluation.before_after=[no_such_suite]"], "no_such_suite"),
        (["evaluation.before_after=['lm-eval:mmlu']"], "is another tool's"),
        (["evaluation.before_after=[humaneval]"], "runs code that the policy writes"),
        (
            ["model.path=null", "model.config={model_type: llama}"],
            "a model from scratch has no earlier scores to compare with",
        ),
        (["stages.first={training: {steps: 1}, evaluation: {before_after: [mmlu]}}"], "stages.first.evaluation"),
    ],
)
def test_mistakes_stop_the_run_before_it_begins(recipe, tmp_path, changes, said):
    with pytest.raises(lmrl.errors.LmrlError, match=said):
        lmrl.train(recipe, changes, output=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_suites_of_one_name_are_numbered():
    from lmrl.recipe import OtherSuite

    wanted = [OtherSuite(suite=name) for name in ("a/x.yaml", "mmlu", "b/x.yaml")]
    assert before_after.labels(wanted) == ["x-1", "mmlu", "x-2"]
