"""The source `blend`: several tasks and logs in one run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from lmrl.recipe.base import Section
from lmrl.recipe.source import DatasetOptions, SourceOptions

if TYPE_CHECKING:
    from lmrl.recipe.recipe import Recipe

OWN = "own"
"""Default name of the part that is the recipe's own task."""


class PartLog(DatasetOptions):
    """Logged episodes of a part; the blend decides how many are used per step."""

    name: str = "log"

    @model_validator(mode="after")
    def _no_batch(self) -> PartLog:
        if self.batch_size != type(self).model_fields["batch_size"].default:
            raise ValueError("`batch_size` of a part follows from its weight: set source.batch_size")
        return self


class Part(Section):
    """A part of a blend: a task to play, or logged episodes of one."""

    name: str = Field(OWN, pattern=r"^[A-Za-z0-9_][\w.-]*$")
    """Prefix of its metrics: `NAME/reward`, ..."""
    weight: float = Field(1.0, gt=0)
    """Its share of `rollouts.prompts` (tasks) or of `batch_size` (logs), relative to the other parts of the same kind."""
    task: Any = None
    """Like the recipe's `task`, with prompts or an environment (null: the recipe's own)."""
    log: PartLog | None = None
    """Logged episodes of that task, as in source `dataset` (null: the task is played)."""

    @field_validator("task")
    @classmethod
    def _checked(cls, task: Any) -> Any:
        from pydantic import TypeAdapter

        from lmrl.recipe.recipe import TaskSection

        if task is None:
            return None
        try:
            return TypeAdapter(TaskSection).validate_python(task)
        except ValidationError as error:
            mistake = error.errors()[0]
            keys = ".".join(str(key) for key in mistake["loc"] if not str(key).startswith("<"))
            raise ValueError(
                f"`task{'.' if keys else ''}{keys}`: {mistake['msg'].removeprefix('Value error, ')}"
            ) from error


class Curriculum(Section):
    """Pause prompts (or start states) that are always or never solved, and bring them back later."""

    solved: float = 1.0
    """An episode counts as solved if its reward (or return) is at least this."""
    low: float = Field(0.0, ge=0, le=1)
    """A prompt rests if its solved share is at most this ..."""
    high: float = Field(1.0, ge=0, le=1)
    """... or at least this."""
    episodes: int = Field(8, ge=1)
    """Number of episodes of a prompt from which its solved share is computed; then the count restarts."""
    rest: int = Field(20, ge=1)
    """Steps that it rests. If it is still too easy or too hard afterwards, it rests twice as long."""
    longest: int = Field(320, ge=1)
    """Maximum steps of a rest."""

    @model_validator(mode="after")
    def _apart(self) -> Curriculum:
        if not self.low < self.high:
            raise ValueError("`low` has to be below `high`, or every prompt would rest")
        return self


class BlendSource(SourceOptions):
    """Several tasks and logs together, mixed by weight.

    Every part has its own metrics, `NAME/reward` and others. Evaluation is on the recipe's own task.
    """

    name: Literal["blend"]
    parts: list[Part] = Field([Part()], min_length=1)
    """Tasks and logs; by default only the recipe's own task (for a curriculum)."""
    batch_size: int = Field(64, ge=1, le=1_000_000)
    """Logged episodes per step, over all logs."""
    curriculum: Curriculum | None = None
    """Curriculum over the prompts of the played parts (null: all prompts in turn)."""

    @model_validator(mode="after")
    def _sensible(self) -> BlendSource:
        names = [part.name for part in self.parts]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two parts are called '{name}': give each its own `name`")
        if self.curriculum is not None and not self.plays:
            raise ValueError("`curriculum` chooses what is played, and all parts are logs: leave it out")
        if self.batch_size != type(self).model_fields["batch_size"].default and not self.has_log:
            raise ValueError("`batch_size` counts logged episodes, and no part is a log: set rollouts.prompts")
        return self

    @property
    def plays(self) -> bool:  # type: ignore[override]
        return any(part.log is None for part in self.parts)

    @property
    def has_log(self) -> bool:  # type: ignore[override]
        return any(part.log is not None for part in self.parts)

    @property
    def plays_own_task(self) -> bool:
        return any(part.log is None and part.task is None for part in self.parts)

    def sections(self, recipe: Recipe) -> list[tuple[str, SourceOptions, Any]]:
        return [
            (f"source.parts.{part.name}.log", part.log, recipe.task if part.task is None else part.task)
            for part in self.parts
            if part.log is not None
        ]

    def episodes_a_step(self, recipe: Recipe) -> tuple[int, int]:
        prompts, samples = recipe.rollouts.prompts, recipe.rollouts.samples
        if not self.has_log:
            return prompts, samples
        return (prompts * samples if self.plays else 0) + self.batch_size, 1
