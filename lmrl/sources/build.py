"""The source that a recipe names."""

from __future__ import annotations

from pathlib import Path

from lmrl.recipe import MixtureSource, Recipe, RolloutsSource
from lmrl.rollouts.sampler import Sampler
from lmrl.rollouts.task import Task
from lmrl.sources.async_rollouts import AsyncRollouts
from lmrl.sources.base import Source
from lmrl.sources.dataset import build_dataset
from lmrl.sources.fresh import FreshRollouts
from lmrl.sources.mixture import Mixture


def build_source(
    recipe: Recipe, task: Task, sampler: Sampler, stage: str, bad_rows: Path | None = None, compares: bool = False
) -> Source:
    """The source of a stage's recipe.

    bad_rows: where malformed rows are reported, if they are to be skipped. compares: sample logged episodes in groups
    of one prompt.
    """
    seed = recipe.training.seed
    if isinstance(recipe.source, RolloutsSource):
        options = recipe.source
        by_prompt = options.best_among == "prompt"
        fresh = FreshRollouts(sampler, recipe.rollouts, seed, stage, options.best, by_prompt, options.resample)
        return _maybe_async(fresh, recipe)
    dataset = build_dataset(recipe.source, task, seed, stage, bad_rows, compares)
    if not isinstance(recipe.source, MixtureSource):
        return dataset
    fresh = _maybe_async(FreshRollouts(sampler, recipe.rollouts, seed, stage), recipe)
    return Mixture(fresh, dataset, recipe.source, recipe.training.steps, task.renderer.tokenizer)


def _maybe_async(fresh: FreshRollouts, recipe: Recipe) -> FreshRollouts | AsyncRollouts:
    """Fresh episodes, sampled asynchronously if the recipe sets `rollouts.ahead`."""
    return AsyncRollouts(fresh, recipe.training.steps) if recipe.rollouts.ahead else fresh
