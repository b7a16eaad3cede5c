"""Suites: what a checkpoint is scored on, as YAML."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field

from lmrl.recipe import Rollouts, Section, TaskSection
from lmrl.recipe_files import apply_override, find_yaml, merge, read_yaml, resolve_files, validate


class Suite(Section):
    """A task, how to sample, and how many episodes."""

    description: str = ""
    task: TaskSection
    follows_run: bool = False
    """Score a run on its own task instead, where it is of the same kind."""
    rollouts: Rollouts = Rollouts()
    episodes: int | None = Field(None, ge=1)
    """Start states to play, in order (null: every held-out prompt, or every start state)."""
    samples: int = Field(1, ge=1)
    """Episodes from each."""
    metrics: list[str] = Field(["return"], min_length=1)
    """Columns of tables; the first is the main one, which also names the best checkpoint."""
    seed: int = Field(0, ge=0)


def load_suite(name: str | Path, overrides: list[str] = (), task: dict[str, Any] | None = None) -> Suite:
    """A suite by path or shipped name.

    task: the task of a run's recipe. A suite that follows runs, of the same kind (the same environment, or prompts),
    is then played with the run's own settings: its graph, its held-out prompts, its rewards.
    """
    document = read_yaml(find_yaml(name, "eval"))
    resolve_files(document.data, document.path.parent)
    own = document.data.get("task")
    follows = document.data.get("follows_run") is True and task is not None and isinstance(own, dict)
    if follows and own.get("environment") == task.get("environment"):
        document.data["task"] = merge(own, task)
    for override in overrides:
        apply_override(document, override)
    resolve_files(document.data, document.path.parent)
    return validate(Suite, document)
