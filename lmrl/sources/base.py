"""Sources: where a step's trajectories come from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from lmrl.recipe import Recipe, SourceOptions
from lmrl.rollouts.sampler import Sampler
from lmrl.rollouts.task import Task
from lmrl.trajectories.trajectory import Trajectory

if TYPE_CHECKING:
    from lmrl.sources.dataset import Dataset


@dataclass
class SourceBatch:
    """A step's trajectories; each rank has its shard.

    learn: those to train on. played: fresh ones by the current policy, scored or not.
    """

    learn: list[Trajectory]
    played: list[Trajectory] = field(default_factory=list)
    failed: int = 0
    """Number of played episodes that could not be scored."""
    dropped: int = 0
    """Number of scored episodes whose groups are too small (task.min_group)."""
    measures: dict[str, float] = field(default_factory=dict)
    """The source's own metrics, the same on every rank."""


@dataclass(frozen=True)
class SourceRequest:
    """The arguments of a source.

    bad_rows: file in which skipped malformed rows are reported, if they are to be skipped. compares: True to sample
    logged episodes in groups of one prompt.
    """

    recipe: Recipe
    task: Task
    sampler: Sampler
    stage: str
    bad_rows: Path | None = None
    compares: bool = False

    @property
    def seed(self) -> int:
        return self.recipe.training.seed


class Source:
    """Base of all sources. `next` depends only on the step, the policy and the saved state."""

    Options: type[SourceOptions] | None = None
    """The class of its section in a recipe, for a custom source."""
    dataset: Dataset | None = None
    """Its logged episodes, if it has any."""
    task_notes: Sequence[str] = ()
    """Notes for the user about tasks other than the recipe's own."""

    @classmethod
    def build(cls, wanted: SourceRequest) -> Source:
        """The source that a recipe describes. A custom one gets only the request, unless it overrides this."""
        made: Callable[[SourceRequest], Source] = cls
        return made(wanted)

    def next(self, step: int) -> SourceBatch:
        """The trajectories of a step, counted from 1."""
        raise NotImplementedError

    def wait(self) -> list[Trajectory]:
        """Wait until no rollout is running in the background; returns the next step's episodes if they were sampled."""
        return []

    def stop(self, forget: bool = False) -> None:
        """Cancel rollouts that run in the background. forget: also drop finished episodes of the next step."""

    def save(self, folder: Path) -> None:
        """Write the source's state next to a checkpoint, for a resumed run."""

    def load(self, folder: Path) -> None:
        pass
