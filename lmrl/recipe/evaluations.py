"""Default number of evaluations of a stage, and of their episodes.

An evaluation plays episodes that are not trained on. The plan depends on counts, not on time, so that a resumed run
evaluates like an uninterrupted one: all evaluations together play a small share of the episodes that the stage learns from.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lmrl.recipe.recipe import Recipe

OWN_TASK = "task"
"""Value of `evaluation.suite` that means the stage's own task."""
SHARE, OFFLINE_SHARE = 0.08, 0.02
"""Episodes played in all evaluations of a stage, as a share of those it learns from. The share is smaller for an offline stage,
which learns from episodes without the time to play them."""
BETWEEN = 8
"""Maximum number of evaluations between a stage's start and end."""
AROUND = 4
"""Evaluations at the start and the end, plus the fresh ones of the last and the best policy."""
LEAST, ENOUGH, MOST, MOST_OFFLINE = 16, 32, 256, 64
"""Episodes of an evaluation: with fewer than LEAST there is none; fewer than ENOUGH are too few to compare policies."""


@dataclass(frozen=True)
class Plan:
    """every: steps between evaluations (0: at the start and the end). episodes: of each evaluation."""

    every: int
    episodes: int


def room(recipe: Recipe) -> float:
    """Budget: episodes that all evaluations of a stage may play together."""
    steps, rollouts = recipe.training.steps, recipe.rollouts
    if recipe.source.plays:
        return SHARE * steps * rollouts.prompts * rollouts.samples
    return OFFLINE_SHARE * steps * math.prod(recipe.source.episodes_a_step(recipe))


def is_imitation(recipe: Recipe) -> bool:
    """True if a stage only imitates logged episodes (usually a warm-up, where only the end result matters)."""
    return recipe.objective.imitates and not recipe.source.plays


def own_plan(recipe: Recipe) -> Plan | None:
    """Evaluations of a stage on its own task; None if it is too short for any.

    The recipe's own settings take precedence. Otherwise there are as many as the budget allows with enough episodes each.
    """
    stated, steps, spare = recipe.evaluation, recipe.training.steps, room(recipe)
    counts = [0] if is_imitation(recipe) else [count for count in (BETWEEN, 4, 2, 1, 0) if count < steps]
    if stated.every is not None:
        counts = [(steps - 1) // stated.every if stated.every else 0]
    size = 0
    for between in counts:
        evaluations = between + AROUND if between else 2
        size = stated.episodes or min(int(spare / evaluations), MOST if recipe.source.plays else MOST_OFFLINE)
        if size * evaluations <= spare and size >= (stated.episodes or ENOUGH):
            break
    asked = (stated.every, stated.episodes, stated.gate) != (None, None, None) or recipe.training.final == "best"
    if size < LEAST and not asked:
        return None
    every = math.ceil(steps / (between + 1)) if between else 0
    return Plan(every if stated.every is None else stated.every, stated.episodes or max(size, LEAST))


def suite_interval(recipe: Recipe, size: int) -> int:
    """Steps between evaluations on a suite of `size` episodes (0: at the start and the end)."""
    if recipe.evaluation.every is not None:
        return recipe.evaluation.every
    between = min(BETWEEN, int(room(recipe) / size) - AROUND, recipe.training.steps - 1)
    return math.ceil(recipe.training.steps / (between + 1)) if between > 0 and not is_imitation(recipe) else 0
