"""Checks across sections: a combination that cannot work is refused with the reason and the fix.

Rules for a single objective are in its own section (lmrl/recipe/objectives).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from lmrl.recipe.evaluations import OWN_TASK
from lmrl.recipe.task import PromptTask

if TYPE_CHECKING:
    from lmrl.recipe.recipe import Recipe


def mistakes(recipe: Recipe) -> Iterator[str]:
    """Yield one line for each combination in a recipe that cannot work."""
    objective, source, task = recipe.objective, recipe.source, recipe.task
    for key, section, played in source.sections(recipe):
        if section.best_among == "prompt" and section.best == 1:
            yield (
                f"`{key}.best_among=prompt` has no effect while {key}.best is 1, which keeps all episodes: set "
                f"{key}.best below 1, or {key}.best_among=all"
            )
        if getattr(section, "turns", None) is not None and getattr(played, "history", "all") == "all":
            yield f"`{key}.turns` cuts episodes between turns, but here all turns share a context: set task.history=1 (or N)"
        if getattr(section, "player", None) and isinstance(played, PromptTask):
            yield f"`{key}.player` plays an environment; prompts have none: give {key}.path"
    if not objective.leaves_policy:
        if recipe.model.quantization is not None:
            yield (
                f"`model.quantization={recipe.model.quantization}` is for policies, and '{objective.name}' trains a reward model: "
                "leave it out, or set model.dtype=bfloat16"
            )
        yield from objective.mistakes(recipe)
        return
    if task is None:
        yield "missing key 'task': what the policy plays, an environment or prompts"
        return
    if not objective.uses_correction and source.plays and recipe.rollouts.correction not in ("auto", "none"):
        yield (
            f"`rollouts.correction` weights policy gradients (ppo, archer, grpo, dr_grpo, rloo, reinforce_pp), and '{objective.name}' "
            "is none: leave it at auto"
        )
    yield from objective.mistakes(recipe)
    if source.name == "blend" and recipe.rollouts.ahead:
        yield "`rollouts.ahead` plays one task ahead of the step, and source 'blend' plays several: set it to 0"
    if source.plays and not source.has_log and recipe.rollouts.samples == 1:
        if getattr(source, "resample", 0):
            yield "`source.resample` replaces prompts whose samples all earned the same: set rollouts.samples to 2 or more"
        if source.best_among == "prompt":
            yield "`source.best_among=prompt` ranks samples of the same prompt: set rollouts.samples to 2 or more"
    if getattr(task, "allowed_actions", False) and recipe.rollouts.engine in ("vllm", "vllm-server"):
        yield (
            f"`task.allowed_actions` restricts what is sampled, which engine '{recipe.rollouts.engine}' cannot: set rollouts.engine=hf"
        )
    if source.plays and task.min_group > recipe.rollouts.samples:
        yield (
            f"`task.min_group`={task.min_group} keeps no group of rollouts.samples={recipe.rollouts.samples} episodes: set it "
            "to that number at most"
        )
    tasks = [task, *(part.task for part in getattr(source, "parts", ()) if part.task is not None)]
    if any(one.normalize == "running" for played in tasks for one in getattr(played, "rewards", ())):
        fix = "set `normalize: [MEAN, STD]`, or leave it out"
        if source.plays and source.has_log:
            yield (
                f"`normalize: running` changes the unit of fresh rewards as training goes on, and source '{source.name}' learns from "
                f"them together with logged rewards, which have the file's unit: {fix}"
            )
        if getattr(source, "curriculum", None) is not None:
            yield (
                "`normalize: running` changes the unit of rewards as training goes on, and `source.curriculum.solved` is one "
                f"number for all steps: {fix}"
            )
    if isinstance(task, PromptTask):
        if source.plays_own_task and not task.rewards:
            yield "a task of prompts learns from rewards: list at least one under task.rewards"
    evaluation = recipe.evaluation
    unscored = evaluation.suite is None or evaluation.suite == OWN_TASK and not recipe.scores_own_task
    if evaluation.gate is not None and unscored:
        yield "`evaluation.gate` measures on a suite: set evaluation.suite"
    if recipe.training.final == "best" and unscored and evaluation.metric is None:
        yield "`training.final=best` keeps the policy with the best score, but nothing is scored: set evaluation.suite"
