"""The `task` section: an environment, or prompts with rewards."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from lmrl.recipe.base import Plugin, Section

STAGE_PREFIX = "stages/"
"""A reward's `model` that begins so is the result of an earlier stage of the same run."""


class Prompts(Section):
    """Where prompts come from: a JSONL or Parquet file, or a dataset on the hub."""

    path: str
    column: str = "prompt"
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
    """One reward: a function, or a learned model."""

    function: str | None = None
    """`file.py:name` or a dotted path."""
    model: str | list[str] | None = None
    """A sequence classifier (folder or hub name), `stages/NAME` (the reward model that an earlier stage trained), or a
    list of them, an ensemble. Its options are the arguments of lmrl.rewards.model.RewardModel."""
    weight: float = 1.0
    options: dict[str, Any] = {}
    normalize: Literal["running"] | tuple[float, float] | None = None
    """Subtract a mean and divide by a standard deviation before weighting: [MEAN, STD], or `running`, those of all
    training samples so far (evaluation then reports the score as it is). Components stay as they were scored."""
    clip: tuple[float, float] | None = None
    """Lowest and highest value, after normalisation."""
    name: str | None = None

    @model_validator(mode="after")
    def _sensible(self) -> Reward:
        if (self.function is None) == (not self.model):
            raise ValueError("needs either `function` (file.py:name) or `model` (a sequence classifier, or several)")
        if isinstance(self.normalize, tuple) and not self.normalize[1] > 0:
            raise ValueError("`normalize` is [MEAN, STD] with STD above 0, or `running`")
        if self.clip is not None and not self.clip[0] < self.clip[1]:
            raise ValueError("`clip` is [LOW, HIGH] with LOW < HIGH")
        return self

    @property
    def models(self) -> list[str]:
        return [self.model] if isinstance(self.model, str) else self.model or []

    @property
    def label(self) -> str:
        if self.name is None and self.models:
            return self.models[0].rstrip("/").rsplit("/", 1)[-1]
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
