"""The tutorials' code runs as it is printed."""

import re
from pathlib import Path

import pytest

from lmrl.environments.check import check_environment
from lmrl.recipe.files import load_recipe
from lmrl.recipe.task import Reward
from lmrl.rewards.check import check_reward
from lmrl.training import dry_run

TUTORIALS = Path(__file__).resolve().parents[2] / "docs/tutorials"


def blocks(page: str, language: str) -> list[str]:
    """The page's fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", (TUTORIALS / page).read_text(), re.MULTILINE | re.DOTALL)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_own_reward_is_fit_and_trains(folder):
    (folder / "mine.py").write_text(blocks("own_reward.md", "python")[0])
    (folder / "prompts.jsonl").write_text(blocks("own_reward.md", "json")[0])
    (folder / "short.yaml").write_text(blocks("own_reward.md", "yaml")[0])
    findings = list(check_reward(Reward(function="mine.py:short", options={"limit": 4}), None, 30.0))
    assert findings and all(finding.passed is not False for finding in findings)
    dry_run(load_recipe("short.yaml"))


def test_own_environment_is_fit_and_trains(folder):
    (folder / "guess.py").write_text(blocks("own_environment.md", "python")[0])
    (folder / "guess.yaml").write_text(blocks("own_environment.md", "yaml")[0])
    recipe = load_recipe("guess.yaml")
    findings = list(check_environment(recipe.task, 20))
    assert findings and all(finding.passed is not False for finding in findings)
    dry_run(recipe)
