"""The `source` section: where trajectories come from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from lmrl.recipe.base import Plugin, RowsPath, Section

if TYPE_CHECKING:
    from lmrl.recipe.recipe import Recipe

Players = str | dict[str, float]
"""A scripted player, or several with their shares of the episodes."""


class SourceOptions(Section):
    """Base class of all sources' options. A subclass adds its options, and overrides the defaults that differ."""

    name: str
    plays: ClassVar[bool] = True
    """True if it plays fresh episodes, whose number `rollouts` sets."""
    has_log: ClassVar[bool] = False
    """True if it also learns from logged episodes."""
    best: Any = 1.0
    best_among: Any = "all"

    @property
    def plays_own_task(self) -> bool:
        """True if it plays the recipe's own task."""
        return self.plays

    def sections(self, recipe: Recipe) -> list[tuple[str, SourceOptions, Any]]:
        """The sections that choose among episodes (`best`, `turns`), each with its key and its task."""
        return [("source", self, recipe.task)]

    def episodes_a_step(self, recipe: Recipe) -> tuple[int, int]:
        """Prompts per step, and episodes per prompt, that are learned from."""
        return recipe.rollouts.prompts, recipe.rollouts.samples


class RolloutsSource(SourceOptions):
    """Fresh episodes by the current policy (sizes and sampling are under `rollouts`)."""

    name: Literal["rollouts"] = "rollouts"
    best: float = Field(1.0, gt=0, le=1)
    """Learn only from this share of each step's episodes, those with the highest returns."""
    best_among: Literal["all", "prompt"] = "all"
    """What `best` is a share of: all episodes of a step, or those of each prompt (keeping at least one).
    Ties are broken at random."""
    resample: int = Field(0, ge=0)
    """Maximum rounds in which prompts whose samples all earned the same are replaced by further ones (dynamic sampling,
    DAPO, arXiv 2503.14476). Needs rollouts.samples of at least 2."""


class DatasetOptions(SourceOptions):
    """Options of logged episodes, shared by `dataset` and `mixture`: a file or folder, or a scripted player."""

    has_log = True

    path: RowsPath | None = None
    """JSONL or Parquet, a folder of Parquet shards, or a dataset on the hub (see lmrl/trajectories/rows.py)."""
    split: str = "train"
    """Split of a dataset on the hub or of `save_to_disk`; `config` and `revision` apply only to the hub."""
    config: str | None = None
    """Configuration of a hub dataset (null: its only or default one)."""
    revision: str | None = None
    """Branch, tag or commit (null: main)."""
    columns: dict[str, str] = {}
    """Column names in the file that differ from the format's: `{prompt: question, completion: answer}`."""
    player: Players | None = None
    """A scripted player of the environment, for instance `random`, or shares: `{random: 0.9, optimal: 0.1}`."""
    episodes: int = Field(1000, ge=1, le=100_000_000)
    """Number of episodes that the player plays."""
    batch_size: int = Field(64, ge=1, le=1_000_000)
    """Episodes per step; pairs, for objectives that compare episodes."""
    max_tokens: int | None = Field(None, ge=1)
    """Episodes with more tokens are dropped and counted."""
    turns: int | None = Field(None, ge=1)
    """Learn from a random piece of this many turns of each episode (null: from all of it). Many
    pieces of many episodes make steadier updates than a few whole ones. Needs `task.history: N`."""
    best: float = Field(1.0, gt=0, le=1)
    """Learn only from this share of the episodes, those with the highest returns (below 1: filtered)."""
    best_among: Literal["all", "prompt"] = "all"
    """What `best` is a share of: all episodes, or those of each prompt (keeping at least one).
    Ties are broken at random."""
    skip_bad_rows: bool = False
    """Count malformed rows and move them to the run's bad_rows.jsonl, instead of stopping."""

    @field_validator("player")
    @classmethod
    def _shares_add_up(cls, player: Players | None) -> Players | None:
        if isinstance(player, dict) and (any(share < 0 for share in player.values()) or not sum(player.values()) > 0):
            raise ValueError("the players' shares have to be positive, for instance {random: 0.9, optimal: 0.1}")
        return player

    @model_validator(mode="after")
    def _one_origin(self) -> DatasetOptions:
        if (self.path is None) == (self.player is None):
            raise ValueError("needs either `path` (logged episodes) or `player` (a scripted player)")
        if self.player is not None and (self.config or self.revision):
            raise ValueError(
                "`config` and `revision` belong to a dataset on the hub, and `player` uses none: leave them out"
            )
        return self

    def episodes_a_step(self, recipe: Recipe) -> tuple[int, int]:
        return self.batch_size, 1


class DatasetSource(DatasetOptions):
    """Logged episodes, in shuffled passes."""

    name: Literal["dataset"]
    plays = False


class MixtureSource(DatasetOptions):
    """Logged and fresh episodes together: from offline to online learning.

    Each step plays `rollouts.prompts` x `rollouts.samples` fresh episodes into a replay buffer, and learns from
    `batch_size` episodes, of which a share comes from the buffer and the rest from the log.
    """

    name: Literal["mixture"]
    online: float = Field(0.5, ge=0, le=1)
    """Share of fresh episodes in a batch at the first step ..."""
    online_end: float = Field(1.0, ge=0, le=1)
    """... and at the last; linear in between."""
    warmup_steps: int = Field(0, ge=0)
    """First steps that only collect, without updates (WSRL, Zhou et al., arXiv 2412.07762)."""
    replay: int = Field(2000, ge=1)
    """Capacity of the buffer: it keeps the newest episodes."""


class CustomSource(SourceOptions, Plugin):
    """A custom source: `file.py:Name`, a dotted path, or the name of an installed one. Its keys are checked when its code is
    loaded."""


SOURCES: dict[str, type[SourceOptions]] = {
    "rollouts": RolloutsSource,
    "dataset": DatasetSource,
    "mixture": MixtureSource,
}
