"""The `task` section: an environment, or prompts with rewards."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from lmrl.recipe.base import Plugin, Section


class Prompts(Section):
    """Where prompts come from: a JSONL or Parquet file, or a dataset on the hub."""

    path: str | None = None
    """Null: the prompts of the logged episodes, `source.path`."""
    column: str = "prompt"
    """Of preference data without such a column the prompt is what chosen and rejected begin with."""
    split: str = "train"
    chat: bool = False
    """Put each prompt through the model's chat template (columns holding message lists always are)."""
    system: str | None = None
    """System message, with the chat template only."""
    max_tokens: int = Field(512, ge=1)
    """Prompts with more tokens are left out, and counted."""
    holdout: float = Field(0.1, ge=0, lt=1)
    """Share of the rows, drawn by a fixed seed, that is never trained on and serves evaluation."""
    limit: int | None = Field(None, ge=1)
    """Use only the first rows."""

    @model_validator(mode="after")
    def _system_needs_chat(self) -> Prompts:
        if self.system is not None and not self.chat:
            raise ValueError("`system` needs `chat: true`")
        return self


class Reward(Section):
    """One reward function: `file.py:name` or a dotted path."""

    function: str
    weight: float = 1.0
    options: dict[str, Any] = {}
    name: str | None = None

    @property
    def label(self) -> str:
        return self.name or self.function.replace(":", ".").rsplit(".", 1)[-1]


class PromptTask(Section):
    """Episodes of one step: a prompt, a completion, and rewards computed for the whole batch at once."""

    prompts: Prompts
    rewards: list[Reward] = []
    max_failed: float = Field(0.1, ge=0, le=1)
    """The run stops when a larger share of a batch could not be judged."""

    @model_validator(mode="after")
    def _distinct_names(self) -> PromptTask:
        labels = [reward.label for reward in self.rewards]
        for label in labels:
            if labels.count(label) > 1:
                raise ValueError(f"two rewards are called '{label}': give each its own `name`")
        return self


class EpisodeLimits(Section):
    history: Literal["all"] | Annotated[int, Field(ge=1)] = "all"
    """What the policy sees of an episode: everything, or the last N observations with the turns between them."""
    max_turns: int = Field(100, ge=1)
    """An episode is truncated after so many turns."""
    max_failed: float = Field(0.1, ge=0, le=1)
    """The run stops when the environment fails in a larger share of a batch."""
    chat: bool = False
    """Put observations through the model's chat template."""


class RandomWalksTask(EpisodeLimits):
    """Shortest paths on one generated graph (see lmrl/environments/random_walks.py)."""

    environment: Literal["random_walks"]
    graph: int = Field(1000, ge=0)
    nodes: int = Field(21, ge=3, le=26)
    max_length: int = Field(10, ge=3)
    edge_probability: float = Field(0.1, gt=0, le=1)
    stepwise: bool = False
    """One node a turn, instead of the whole walk in one."""

    @property
    def options(self) -> dict[str, Any]:
        return self.model_dump(include={"graph", "nodes", "max_length", "edge_probability", "stepwise"})


class MazeTask(EpisodeLimits):
    """Walk to the goal of a double-T maze, one move a turn (see lmrl/environments/maze.py)."""

    environment: Literal["maze"]
    history: Literal["all"] | Annotated[int, Field(ge=1)] = 1
    observed: Literal["fully", "partially"] = "fully"
    """partially: the observation tells the walls around, and not the position."""

    @property
    def options(self) -> dict[str, Any]:
        return {"observed": self.observed}


class CustomTask(EpisodeLimits, Plugin):
    """An environment of one's own, `file.py:Name` or a dotted path."""

    environment: str


ENVIRONMENTS = {"random_walks": RandomWalksTask, "maze": MazeTask}
