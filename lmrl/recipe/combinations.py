"""Which sections go together: a combination that makes no sense is refused with the reason and the fix."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lmrl.recipe.evaluations import OWN_TASK
from lmrl.recipe.objective import (
    OBJECTIVES,
    DPOObjective,
    GroupObjective,
    LikelihoodObjective,
    PPOObjective,
    QObjective,
    QSFTObjective,
    RewardModelObjective,
)
from lmrl.recipe.source import DatasetOptions, DatasetSource, MixtureSource, RolloutsSource
from lmrl.recipe.task import PromptTask


def mistakes(recipe: Any) -> Iterator[str]:
    """One line for each combination in a recipe that cannot work."""
    objective, source, task, model = recipe.objective, recipe.source, recipe.task, recipe.model
    if source.best_among == "prompt" and source.best == 1:
        yield (
            "`source.best_among=prompt` says among which episodes source.best ranks, but that is 1 and keeps all: set "
            "source.best below 1, or leave it at all"
        )
    if isinstance(objective, RewardModelObjective):
        yield from _reward_model(source)
        if recipe.optimizer.name != "adamw":
            yield f"`optimizer.name={recipe.optimizer.name}`: a reward model is trained by adamw, set that for its stage"
        return
    if task is None:
        yield "missing key 'task': what the policy plays, an environment or prompts"
        return
    rolls_out = isinstance(source, RolloutsSource)
    if isinstance(objective, PPOObjective | GroupObjective):
        yield from _policy_gradient(recipe, rolls_out)
    elif source.name != "dataset" and recipe.rollouts.correction not in ("auto", "none"):
        if objective.name in OBJECTIVES:
            yield (
                f"`rollouts.correction` weighs policy gradients (ppo, grpo, dr_grpo, rloo, reinforce_pp), and '{objective.name}' "
                "is none: leave it at auto"
            )
    if isinstance(objective, DPOObjective):
        yield from _pairs(recipe, rolls_out)
    if rolls_out and source.resample and recipe.rollouts.samples == 1:
        yield "`source.resample` replaces prompts whose samples all earned the same: set rollouts.samples to 2 or more"
    if rolls_out and source.best_among == "prompt" and recipe.rollouts.samples == 1:
        yield "`source.best_among=prompt` ranks samples of the same prompt: set rollouts.samples to 2 or more"
    if isinstance(objective, LikelihoodObjective) and not isinstance(source, DatasetOptions) and source.best == 1:
        yield (
            "objective 'likelihood' imitates, and imitating all of one's own episodes changes nothing: set source.best=0.3 "
            "to keep the best (expert iteration), or source.name=dataset with source.path or source.player"
        )
    if isinstance(source, MixtureSource) and isinstance(objective, LikelihoodObjective):
        yield (
            "source 'mixture' is for objectives that learn from any policy's episodes and their rewards (ilql, mc); "
            "'likelihood' would imitate both: set source.name=dataset, or source.name=rollouts with source.best below 1"
        )
    if isinstance(objective, QSFTObjective) and not (isinstance(source, DatasetOptions) and source.name == "dataset"):
        yield (
            "objective 'q_sft' measures values against the behaviour that made the data, which fresh episodes change: "
            "set source.name=dataset (for online learning use objective.name=ilql)"
        )
    if isinstance(objective, QObjective | QSFTObjective) and source.best < 1:
        yield f"objective '{objective.name}' learns from bad episodes as well as good ones: leave source.best at 1"
    if isinstance(objective, QSFTObjective) and model.lora is not None:
        yield "objective 'q_sft' trains a second copy of all weights beside the policy: leave model.lora out"
    if isinstance(objective, QObjective) and objective.trunk == "separate" and model.lora is not None:
        yield (
            "`objective.trunk: separate` trains a second copy of all weights: with model.lora use shared (or detached)"
        )
    if isinstance(task, PromptTask):
        if not isinstance(source, DatasetOptions) or isinstance(source, MixtureSource):
            if not task.rewards:
                yield "a task of prompts learns from rewards: list at least one under task.rewards"
        if getattr(source, "player", None):
            yield "`source.player` plays an environment; prompts have none: give source.path"
    if getattr(source, "turns", None) is not None:
        if getattr(task, "history", "all") == "all":
            yield "`source.turns` cuts episodes between turns, but here all turns share a context: set task.history=1 (or N)"
        if objective.name == "mc" or getattr(objective, "calibrated", False):
            yield "`source.turns` cuts off the returns that followed, which the objective needs: leave it out"
    evaluation = recipe.evaluation
    unscored = evaluation.suite is None or evaluation.suite == OWN_TASK and not recipe.scores_own_task
    if evaluation.gate is not None and unscored:
        yield "`evaluation.gate` measures on a suite: set evaluation.suite"
    if recipe.training.final == "best" and unscored and evaluation.metric is None:
        yield "`training.final=best` keeps the policy that scores best, but none is scored: set evaluation.suite"


def _pairs(recipe: Any, rolls_out: bool) -> Iterator[str]:
    source, options = recipe.source, recipe.objective
    if isinstance(source, MixtureSource):
        yield "objective 'dpo' learns from pairs of one origin: set source.name=dataset (or rollouts)"
    elif rolls_out and recipe.rollouts.samples == 1:
        yield "objective 'dpo' compares samples of the same prompt: set rollouts.samples to 2 or more"
    if source.best < 1:
        yield "objective 'dpo' learns from bad episodes as well as good ones: leave source.best at 1"
    if getattr(source, "turns", None) is not None:
        yield "objective 'dpo' compares whole episodes: leave source.turns out"
    if options.cache_reference and rolls_out:
        yield "`objective.cache_reference` is for logged episodes, which come again: set source.name=dataset"


def _policy_gradient(recipe: Any, rolls_out: bool) -> Iterator[str]:
    name = recipe.objective.name
    if not rolls_out:
        yield (
            f"objective '{name}' learns from its own fresh episodes: set source.name=rollouts "
            "(for logged data use objective.name=ilql or likelihood)"
        )
    elif recipe.source.best < 1:
        yield f"objective '{name}' learns from bad episodes as well as good ones: leave source.best at 1"
    if name in ("grpo", "dr_grpo", "rloo") and recipe.rollouts.samples == 1:
        yield f"objective '{name}' compares samples of the same prompt: set rollouts.samples to 2 or more"
    if recipe.rollouts.top_p < 1 or recipe.rollouts.top_k > 0:
        yield (
            f"objective '{name}' needs the full distribution, because truncated sampling biases the probability ratio: "
            "set rollouts.top_p=1 and rollouts.top_k=0"
        )
    if recipe.rollouts.temperature == 0:
        yield f"objective '{name}' explores by sampling: set rollouts.temperature above 0"
    if recipe.rollouts.ahead and recipe.rollouts.correction == "none":
        yield (
            f"`rollouts.ahead` has objective '{name}' learn from what older weights have played, which importance weights have "
            "to correct: leave rollouts.correction at auto, or set rollouts.ahead=0"
        )


def _reward_model(source: Any) -> Iterator[str]:
    learns = "objective 'reward_model' learns from pairs of a chosen and a rejected completion"
    if not isinstance(source, DatasetSource) or source.path is None:
        yield f"{learns}: set source.name=dataset and source.path (and leave source.player out)"
        return
    if source.best < 1:
        yield f"{learns}, which have no returns to rank them by: leave source.best at 1"
    if source.turns is not None:
        yield f"{learns} as a whole: leave source.turns out"
