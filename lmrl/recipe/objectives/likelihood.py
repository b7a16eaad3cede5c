"""Behaviour cloning."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from lmrl.recipe.objectives.base import ObjectiveOptions

if TYPE_CHECKING:
    from lmrl.recipe.recipe import Recipe


class LikelihoodObjective(ObjectiveOptions):
    """Behaviour cloning: maximises the likelihood of the action tokens."""

    name: Literal["likelihood"]
    uses_sampling_temperature = False
    uses_correction = False
    imitates = True
    entropy_coef: float = Field(0.0, ge=0)
    """Weight of an entropy bonus (0: plain likelihood)."""

    def mistakes(self, recipe: Recipe) -> Iterator[str]:
        if not recipe.source.has_log and recipe.source.best == 1:
            yield (
                "objective 'likelihood' imitates, and imitating all of its own episodes changes nothing: set source.best=0.3 "
                "to keep the best (expert iteration), or source.name=dataset with source.path or source.player"
            )
        if recipe.source.plays and recipe.source.has_log:
            yield (
                f"source '{recipe.source.name}' with fresh and logged episodes is for objectives that learn from any policy's episodes and their rewards (ilql, mc); "
                "'likelihood' would imitate both: set source.name=dataset, or source.name=rollouts with source.best below 1"
            )
