"""Suites: what a checkpoint is scored on, as YAML."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from lmrl.errors import RecipeError
from lmrl.recipe import Choices, PromptTask, Rollouts, Section, TaskSection, any_weighted
from lmrl.recipe.document import Document, read_yaml
from lmrl.recipe.files import find_yaml, merge
from lmrl.recipe.methods import take_arguments
from lmrl.recipe.overrides import OVERRIDE, apply_overrides
from lmrl.recipe.paths import resolve_files
from lmrl.recipe.validation import validate

SAMPLING = ("max_new_tokens", "temperature", "top_p", "top_k", "stop", "slots", "cache_tokens", "beta", "support")
"""Keys of a run's `rollouts` that evaluating its own task takes over; the engine is `hf`."""


class Suite(Section):
    """A task, how to sample, and how many episodes."""

    description: str = ""
    task: TaskSection
    follows_run: bool = False
    """Score a run on its own task instead, if it is of the same kind: the same environment, or prompts with rewards."""
    rollouts: Rollouts = Rollouts()
    episodes: int | None = Field(None, ge=1)
    """Start states to play, in order (null: every held-out prompt, or every start state)."""
    shuffled: bool = False
    """Take them in a random order that is always the same."""
    samples: int = Field(1, ge=1)
    """Episodes from each start state."""
    metrics: list[str] = Field(["return"], min_length=1)
    """Columns of tables; the first is the main one, which also names the best checkpoint. Unset: `reward` if the task
    has rewards, `acc` for `choices`, `length` for prompts that nothing else scores, otherwise `return`."""
    seed: int = Field(0, ge=0)
    choices: Choices | None = None
    """Score given answers to the prompts by their log-likelihood, instead of sampled ones by rewards."""
    run_code: bool | None = None
    """True: rewards may run code that the policy writes. False: they do run such code, and `lmrl eval` requires
    --run-code."""

    @property
    def is_unscored(self) -> bool:
        """True for prompts without a reward that has a weight: their episodes have no reward."""
        return isinstance(self.task, PromptTask) and self.choices is None and not any_weighted(self.task.rewards)

    @model_validator(mode="after")
    def _choose_metric(self) -> Suite:
        if "metrics" not in self.model_fields_set:
            rewards = getattr(self.task, "rewards", None)
            self.metrics = [
                "acc" if self.choices else "length" if self.is_unscored else "reward" if rewards else "return"
            ]
        return self

    @model_validator(mode="after")
    def _check(self) -> Suite:
        if self.choices is None:
            return self
        if not isinstance(self.task, PromptTask):
            raise ValueError("`choices` answer prompts: the task is an environment")
        if self.task.rewards:
            raise ValueError("`choices` are scored by their log-likelihood: leave out `task.rewards`")
        if self.samples != 1:
            raise ValueError("`choices` are not sampled: leave out `samples`")
        if self.rollouts.engine != "hf":
            raise ValueError("`choices` are scored by the policy's own model: leave out `rollouts.engine`")
        return self


def load_suite(name: str | Path, overrides: Sequence[str] = (), task: dict[str, Any] | None = None) -> Suite:
    """A suite by path or shipped name.

    A file of prompts is scored as a whole, unless the suite says `holdout`.

    task: the task of a run's recipe. A suite that follows runs, of the same kind (the same environment, or prompts),
    is then played with the run's own settings: its graph, its held-out prompts, its rewards.
    """
    document = read_yaml(find_yaml(name, "eval"))
    if "objective" in document.data:
        raise RecipeError(
            f"{document.path} is a recipe, not a suite: a suite has a task, and maybe rollouts, episodes, samples and "
            "metrics"
        )
    resolve_files(document.data, document.folder)
    arguments = take_arguments(document.data)
    own, follows = document.data.get("task"), document.data.get("follows_run") is True
    if follows and task is not None and isinstance(own, dict) and _same_kind(own, task):
        document.data["task"] = merge(own, task)
    else:
        _score_whole_file(own)
    apply_overrides(document, overrides, arguments)
    resolve_files(document.data, document.folder)
    _read_own_file(document)
    return validate(Suite, document)


def _same_kind(own: dict[str, Any], task: dict[str, Any]) -> bool:
    """True if a run's task is judged like the suite's: in the same environment, or by rewards, which runs that imitate or
    learn from pairs do not have."""
    judged = bool(task.get("rewards")) or not own.get("rewards")
    return own.get("environment") == task.get("environment") and judged


def _read_own_file(document: Document) -> None:
    """Drop the keys that select from the suite's hub dataset if an override names a file instead."""
    task = document.data.get("task")
    prompts = task.get("prompts") if isinstance(task, dict) else None
    for section, keys in ((prompts, ("task", "prompts")), ((prompts or {}).get("shots"), ("task", "prompts", "shots"))):
        if isinstance(section, dict) and Path(str(section.get("path"))).exists():
            for name in ("config", "revision"):
                if not document.places.get((*keys, name), "").startswith(OVERRIDE):
                    section.pop(name, None)


def _score_whole_file(task: Any) -> None:
    """A suite's own file of prompts is scored as a whole, unless the suite holds some of it out."""
    prompts = task.get("prompts") if isinstance(task, dict) else None
    if isinstance(prompts, dict):
        prompts.setdefault("holdout", 1)


def allow_code(suite: Suite) -> Suite:
    """The suite with permission to run code that the policy writes. Raises RecipeError if it runs none."""
    if suite.run_code is None:
        raise RecipeError("--run-code: nothing of this suite runs code that the policy writes: leave it out")
    return suite.model_copy(update={"run_code": True})


def refuse_code(suite: Suite) -> None:
    """Raise RecipeError for a suite that runs the policy's code without permission."""
    if suite.run_code is False:
        raise RecipeError(
            "the suite runs code that the policy writes, as your user and on this machine: allow it, --run-code "
            "(or run_code=true in the suite)"
        )


def refuse_unscored(suite: Suite) -> None:
    """Raise RecipeError for prompts that nothing scores, or whose rewards are only watched."""
    if suite.is_unscored:
        raise RecipeError(
            "task.rewards: the suite has no reward with a weight to score its prompts by: add one (or `choices`), or keep the answers, "
            "--log LOG, and score them later, lmrl eval --rescore LOG"
        )


def own_suite(
    task: dict[str, Any], rollouts: dict[str, Any], overrides: Sequence[str] = (), policy: str = "the policy"
) -> Suite:
    """The suite that a run's own task makes: fresh episodes of an environment, or prompts, sampled as the run sampled.

    task, rollouts: of the run's recipe, as plain data. policy: its name, for messages. Raises RecipeError for a task of prompts without a reward.
    """
    sampling = {name: rollouts[name] for name in SAMPLING if name in rollouts}
    if task.get("opponent_in_evaluation") is not None:
        task = task | {"opponent": task["opponent_in_evaluation"], "opponent_in_evaluation": None}
    document = Document({"task": task, "rollouts": sampling})
    apply_overrides(document, overrides)
    resolve_files(document.data, document.folder)
    suite = validate(Suite, document)
    if suite.is_unscored:
        raise RecipeError(
            f"task.rewards: the own task of {policy} has no reward to score by: name a suite, --suite NAME"
        )
    return suite
