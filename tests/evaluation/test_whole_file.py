"""Suites that name a file of prompts."""

import pytest

import lmrl
from lmrl.errors import RecipeError
from lmrl.evaluation.suites import load_suite


def test_a_suite_scores_all_of_its_own_file(tmp_path, tiny_folder):
    (tmp_path / "prompts.jsonl").write_text("".join(f'{{"prompt": "{letter}"}}\n' for letter in "abcdef"))
    (tmp_path / "reward.py").write_text(
        "def long(completions, **_):\n    return [float(len(one)) for one in completions]\n"
    )
    (tmp_path / "suite.yaml").write_text(
        "task: {prompts: {path: prompts.jsonl}, rewards: [{function: 'reward.py:long'}]}\n"
        "rollouts: {max_new_tokens: 3}\nmetrics: [reward]\n"
    )
    suite = str(tmp_path / "suite.yaml")
    found = lmrl.evaluate(tiny_folder, suite)
    assert found.metrics["reward"]["n"] == 6 and found.played.startswith("all 6 prompts, ")
    assert lmrl.evaluate(tiny_folder, suite, ["task.prompts.holdout=1"]).metrics == found.metrics
    assert lmrl.evaluate(tiny_folder, suite, ["task.prompts.holdout=0.5"]).metrics["reward"]["n"] == 3


def test_a_file_replaces_the_hub_dataset(tmp_path):
    """Its keys are left out, also those of a suite in a folder that is called like an override."""
    folder = tmp_path / "override "
    folder.mkdir()
    (folder / "prompts.jsonl").write_text('{"prompt": "a"}\n')
    (folder / "suite.yaml").write_text("task: {prompts: {path: someone/data, config: main, revision: old}}\n")
    changes = [f"task.prompts.path={folder / 'prompts.jsonl'}", "task.prompts.revision=new"]
    prompts = load_suite(folder / "suite.yaml", changes).task.prompts
    assert (prompts.config, prompts.revision) == (None, "new")


@pytest.mark.parametrize("rewards", ["", ", rewards: [{function: 'lmrl.reward_models.answers.numeric', weight: 0}]"])
def test_prompts_that_nothing_scores_are_refused(tmp_path, tiny_folder, rewards):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a", "answer": "1"}\n')
    (tmp_path / "suite.yaml").write_text(
        f"task: {{prompts: {{path: prompts.jsonl}}{rewards}}}\nrollouts: {{max_new_tokens: 2}}\n"
    )
    for score in (lmrl.evaluate, lambda policy, suite: lmrl.compare([policy, f"{policy}/"], suite)):
        with pytest.raises(RecipeError, match="no reward with a weight to score its prompts by"):
            score(tiny_folder, tmp_path / "suite.yaml")
    found = lmrl.compare([tiny_folder, f"{tiny_folder}/"], tmp_path / "suite.yaml", metrics=["length"])
    assert [one.mean for one in found.differences] == [0.0]
