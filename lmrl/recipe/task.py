"""The `task` section: an environment, or prompts with rewards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import AllowInfNan, BeforeValidator, Field, field_validator, model_validator

from lmrl.plugins.objects import is_object, name_alone, named_rewards
from lmrl.recipe.base import EnvironmentName, FreeForm, Plugin, RowsPath, Section
from lmrl.recipe.opponent import OpponentOf
from lmrl.recipe.templates import Shots

SpecialTokens = Literal["text", "parse"]
"""How names of special tokens, such as `<|im_end|>`, are read inside prompts, observations, tool results and logged actions:
as plain text, or as that token (`parse`: for prompts that are already rendered). Those of a chat template are always tokens."""

OpenEnd = Annotated[float, AllowInfNan(True)]
STAGE_PREFIX = "stages/"
"""Prefix of a reward's `model` that is the result of an earlier stage of the same run."""


CallTimeout = Annotated[float, Field(gt=0)] | None
"""Maximum seconds for one call of a reward function or an environment (null: no limit). After that the call fails: a worker is
replaced, a call in the run's own process is interrupted, and if that is impossible the run ends with a line that names it.
A reward's own `timeout` takes precedence; `url` and `model` have their own limits."""


class Prompts(Section):
    """Where prompts come from: a JSONL, Parquet or CSV file, a folder of `save_to_disk`, or a dataset on the hub."""

    path: RowsPath | None = None
    """Null: the prompts of the logged episodes, `source.path`."""
    column: str = "prompt"
    """Column of the prompt. In preference data without it, the prompt is the common prefix of chosen and rejected."""
    split: str = "train"
    """Split of a dataset on the hub or of `save_to_disk`; `config` and `revision` apply only to the hub."""
    config: str | None = None
    """Configuration of a hub dataset (null: its only or default one)."""
    revision: str | None = None
    """Branch, tag or commit (null: main)."""
    columns: dict[str, str] = {}
    """Column names in the file that differ from the format's, for the prompt's messages or pairs, as under `source`."""
    chat: bool = False
    """Put each prompt through the model's chat template (columns with lists of messages always are)."""
    system: str | None = None
    """System message; only with the chat template."""
    max_tokens: int = Field(512, ge=1)
    """Prompts with more tokens are dropped and counted."""
    holdout: float = Field(0.1, ge=0, le=1)
    """Share of the different prompts, drawn with a fixed seed, whose rows are held out for evaluation. 1, the default of suites: all."""
    limit: int | None = Field(None, ge=1)
    """Use only this many rows, the first ones."""
    where: str | None = None
    """Jinja expression of a row's columns: rows for which it is false are dropped (`subject == 'anatomy'`)."""
    fields: dict[str, str] = {}
    """Further columns, each a Jinja expression of the others, evaluated in order."""
    template: str | None = None
    """Jinja template of the prompt (null: the text of `column`)."""
    opening: str = ""
    """Jinja template of the text before the examples and the prompt."""
    shots: Shots = Shots()

    @model_validator(mode="after")
    def _system_needs_chat(self) -> Prompts:
        if self.system is not None and not self.chat:
            raise ValueError("`system` needs `chat: true`")
        return self


class Reward(Section):
    """One reward: a function, a scorer behind HTTP, or a learned model."""

    function: str | None = None
    """`file.py:name` or a dotted path; a function or class with trl's signature."""
    url: str | None = None
    """Address of a scorer (see lmrl/rewards/http.py), for instance `lmrl reward serve`."""
    model: str | list[str] | None = None
    """A sequence classifier: a folder, a hub name, or `stages/NAME` for the reward model that an earlier stage trained; several
    make an ensemble. `options` are the arguments of lmrl.rewards.model.RewardModel."""
    weight: float = 1.0
    """Weight in the sum of rewards. 0: watched, not trained on."""
    options: FreeForm = {}
    """Arguments of the function or class, or options of `url` and `model`."""
    name: str | None = None
    """Name in metrics (null: from `function`, `url` or `model`)."""
    timeout: float | None = Field(None, gt=0)
    """Maximum seconds per call; a synchronous function then runs in a worker process, since nothing else can stop it."""
    workers: int = Field(0, ge=0)
    """Concurrent processes, each for a part of the batch (0: the run's own process)."""
    memory_mb: int | None = Field(None, ge=64)
    """Limit on the address space of a worker, in MB."""
    retries: int = Field(2, ge=0)
    """Retries after a temporary failure (lmrl.TemporaryError, ConnectionError, TimeoutError)."""
    normalize: Literal["running"] | tuple[float, float] | None = None
    """Subtract a mean and divide by a standard deviation before weighting: [MEAN, STD], or `running`, those of all
    training samples so far (evaluation then reports raw scores). Recorded components keep their raw scores."""
    clip: tuple[OpenEnd, OpenEnd] | None = None
    """Lowest and highest value, after normalisation (-.inf and .inf: no limit on that side)."""

    @field_validator("function", mode="before")
    @classmethod
    def _function_by_name(cls, function: Any) -> Any:
        return name_alone(function) if callable(function) else function

    @model_validator(mode="after")
    def _sensible(self) -> Reward:
        if sum(bool(one) for one in (self.function, self.url, self.model)) != 1:
            raise ValueError("a reward is one of `function`, `url` and `model`")
        if self.memory_mb is not None and self.workers == 0:
            raise ValueError("`memory_mb` limits worker processes: set `workers` to 1 or more")
        if isinstance(self.normalize, tuple) and not self.normalize[1] > 0:
            raise ValueError("`normalize` is [MEAN, STD] with STD above 0, or `running`")
        if self.clip is not None and not self.clip[0] < self.clip[1]:
            raise ValueError("`clip` is [LOW, HIGH] with LOW < HIGH")
        if is_object(self.function) and (self.workers or self.timeout is not None):
            raise ValueError(
                f"`{'workers' if self.workers else 'timeout'}`: a Python object runs in the run's own process: leave it out, or "
                "put the function into a file, `file.py:name`"
            )
        return self

    @property
    def kind(self) -> str:
        return next(kind for kind in ("function", "url", "model") if getattr(self, kind))

    @property
    def what(self) -> str:
        """The function, address or model(s), as given."""
        return ", ".join(self.models) or self.url or self.function or ""

    @property
    def models(self) -> list[str]:
        return [self.model] if isinstance(self.model, str) else self.model or []

    @property
    def label(self) -> str:
        if self.name or self.kind == "url":
            return self.name or self.kind
        if self.models:
            return self.models[0].rstrip("/").rsplit("/", 1)[-1]
        return (self.function or "").replace(":", ".").rsplit(".", 1)[-1]

    def target(self) -> tuple[str, dict[str, Any]]:
        """The function or class that does the work, and its options."""
        if self.kind == "url":
            limits = {} if self.timeout is None else {"timeout": self.timeout}
            return "lmrl.rewards.http.Scorer", {"url": self.url, "retries": self.retries} | limits | self.options
        if self.kind == "model":
            return "lmrl.rewards.model.RewardModel", {"model": self.model} | self.options
        return self.function or "", dict(self.options)


def any_weighted(rewards: Sequence[Reward]) -> bool:
    """True if rewards judge episodes; those of weight 0 are only watched."""
    return any(reward.weight for reward in rewards)


def as_rewards(given: Any) -> Any:
    """Turn a single reward, and rewards given by name, into a list of sections."""
    given = named_rewards(given)
    items = given if isinstance(given, list) else [given]
    return [
        ({"url": one} if one.startswith(("http://", "https://")) else {"function": one})
        if isinstance(one, str)
        else one
        for one in items
    ]


class PromptTask(Section):
    """Episodes of one turn: a prompt, a completion, and rewards computed for the whole batch at once."""

    prompts: Prompts
    rewards: Annotated[list[Reward], BeforeValidator(as_rewards)] = []
    """`file.py:function` (or several of them), an address, or sections with the options of each."""
    max_failed: float = Field(0.1, ge=0, le=1)
    """The run stops if a larger share of a batch could not be judged."""
    min_group: int = Field(1, ge=1)
    """Minimum number of judged episodes of a prompt; smaller groups are dropped and counted (`dropped`)."""
    call_timeout: CallTimeout = 600
    """Maximum seconds for one call of a reward function; after that its batch is retried row by row."""
    special_tokens: SpecialTokens = "text"
    """How special tokens in prompts and completions are read: `text`, or `parse` for prompts with control tokens on purpose."""

    @model_validator(mode="after")
    def _distinct_names(self) -> PromptTask:
        labels = [reward.label for reward in self.rewards]
        for label in labels:
            if labels.count(label) > 1:
                raise ValueError(f"two rewards are called '{label}': give each its own `name`")
        return self


class AgentTask(Section):
    """Episodes played by a program, which calls the policy through an OpenAI-compatible API as often as it likes."""

    agent: str | None = None
    """`file.py:solve` or a dotted path: `solve(row, client, **options)`, plain or async, returns the reward, or a dict with `reward`
    and metrics; with `rewards`, text or nothing."""
    agent_command: list[str] | None = None
    """A program in any language and its arguments: it gets the row as JSON on its standard input, and the address and key in
    OPENAI_BASE_URL and OPENAI_API_KEY; its last printed line is, as JSON, what `solve` would return."""
    tools: list[str | FreeForm] = []
    """Instead of a program, tools that the policy calls until it answers: `file.py:function` or a dotted path, a
    function with type hints; `python`, or `{python: {seconds: 5}}`, runs code; `{mcp: {command: [...]}}` or `{mcp: {url: ...}}` are
    the tools of an MCP server. `rewards` judge the answer. `options`: `prompt` (the column with the question), `system`, `rounds`
    (maximum answers, 8), `seconds` per call (30) and `characters` of a result (4000)."""
    data: str
    """Rows of tasks: a JSONL, Parquet or CSV file, a folder of `save_to_disk`, or a hub dataset."""
    split: str = "train"
    """Split of a dataset on the hub or of `save_to_disk`; `config` and `revision` apply only to the hub."""
    config: str | None = None
    """Configuration of a hub dataset (null: its only or default one)."""
    revision: str | None = None
    """Branch, tag or commit (null: main)."""
    holdout: float = Field(0.1, ge=0, lt=1)
    """Share of the rows, drawn with a fixed seed, that is held out for evaluation."""
    limit: int | None = Field(None, ge=1)
    """Use only this many rows, the first ones."""
    options: FreeForm = {}
    """Further arguments of `agent`."""
    rewards: Annotated[list[Reward], BeforeValidator(as_rewards)] = []
    """Reward functions that judge episodes instead of the program: they get the row's columns, and as completion the text that the
    program returned (if none, everything the policy said)."""
    max_calls: int = Field(100, ge=1)
    """Maximum answers per episode; an episode that asks for more fails."""
    workers: int = Field(64, ge=1, le=10_000)
    """Number of concurrent programs."""
    max_failed: float = Field(0.1, ge=0, le=1)
    """The run stops if a larger share of a batch's episodes fails."""
    min_group: int = Field(1, ge=1)
    """Minimum number of successful episodes of a row; smaller groups are dropped and counted (`dropped`)."""
    call_timeout: CallTimeout = 600
    """Maximum seconds for an episode; after that it fails, and a command is killed."""
    special_tokens: SpecialTokens = "text"
    """How special tokens in messages and prompts are read: `text`, or `parse` as control tokens."""

    history: ClassVar[str] = "all"
    chat: ClassVar[bool] = True

    @model_validator(mode="after")
    def _one_program(self) -> AgentTask:
        if sum(bool(one) for one in (self.agent, self.agent_command, self.tools)) != 1:
            raise ValueError("an agent task is played by exactly one of `agent`, `agent_command` and `tools`: set one")
        if self.tools and not any_weighted(self.rewards):
            raise ValueError("`tools` end with an answer, and nothing judges it: list a reward under `rewards`")
        if self.agent_command is not None and (not self.agent_command or self.options):
            raise ValueError("`agent_command` is a program and its arguments; `options` are those of `agent`")
        return self


class EnvironmentTask(Section):
    """Keys that the tasks of all environments share."""

    if TYPE_CHECKING:  # each subclass says which names it has
        environment: str

    history: Literal["all"] | Annotated[int, Field(ge=1)] = "all"
    """The part of an episode that the policy sees: everything, or the last N observations with the turns between them."""
    max_turns: int = Field(100, ge=1)
    """An episode is truncated after this many turns."""
    max_failed: float = Field(0.1, ge=0, le=1)
    """The run stops if the environment fails in a larger share of a batch."""
    call_timeout: CallTimeout = 600
    """Maximum seconds for one call of the environment; after that its episode fails."""
    min_group: int = Field(1, ge=1)
    """Minimum number of successful episodes of a start state; smaller groups are dropped and counted (`dropped`)."""
    workers: int = Field(0, ge=0, le=10_000)
    """Threads that step environments concurrently (0: one after another in the run's own thread). For environments that
    wait for tools or services; a call over `call_timeout` is abandoned in its thread. See `rollouts.deterministic`."""
    chat: bool = False
    """Put observations through the model's chat template."""
    special_tokens: SpecialTokens = "text"
    """How special tokens in observations and logged actions are read: `text`, or `parse` as control tokens."""
    allowed_actions: bool = False
    """Sample only actions that the environment's `allowed_actions()` lists. Probabilities are renormalised over them, also in
    training. Only with rollouts.engine=hf."""


class RandomWalksTask(EnvironmentTask):
    """Shortest paths on a generated graph."""

    environment: Literal["random_walks"]
    graph: int = Field(1000, ge=0)
    """Number (seed) of the graph."""
    nodes: int = Field(21, ge=3, le=26)
    """Nodes of the graph."""
    max_length: int = Field(10, ge=3)
    """Maximum nodes of a walk."""
    edge_probability: float = Field(0.1, gt=0, le=1)
    """Probability of an edge between two nodes."""
    stepwise: bool = False
    """One node per turn, instead of the whole walk in one turn."""

    @model_validator(mode="after")
    def _walks_are_free(self) -> RandomWalksTask:
        if self.allowed_actions and not self.stepwise:
            raise ValueError("`allowed_actions` lists the next nodes: set `stepwise: true`")
        return self

    @property
    def options(self) -> dict[str, Any]:
        return self.model_dump(include={"graph", "nodes", "max_length", "edge_probability", "stepwise"})


class MazeTask(EnvironmentTask):
    """Walk to the goal of a double-T maze, one move per turn."""

    environment: Literal["maze"]
    history: Literal["all"] | Annotated[int, Field(ge=1)] = 1
    observed: Literal["fully", "partially"] = "fully"
    """partially: the observation shows the surrounding walls but not the position."""

    @property
    def options(self) -> dict[str, Any]:
        return {"observed": self.observed}


class NimTask(EnvironmentTask):
    """Nim with one heap, for two players (see lmrl/environments/nim.py)."""

    environment: Literal["nim"]
    history: Literal["all"] | Annotated[int, Field(ge=1)] = 1
    sticks: int = Field(10, ge=2)
    """Sticks in the largest starting heap."""
    most: int = Field(3, ge=1)
    """Maximum sticks that a player may take."""
    opponent: OpponentOf = None
    """Who plays the other side (null: `self`), a name or a section."""
    opponent_in_evaluation: OpponentOf = None
    """The opponent in evaluations (null: `opponent`; instead of `self`, a scripted player of the game)."""

    @property
    def options(self) -> dict[str, Any]:
        return {"sticks": self.sticks, "most": self.most}


class CustomTask(EnvironmentTask, Plugin):
    """A custom environment, `file.py:Name` or a dotted path, or one of another library, LIBRARY:ID."""

    environment: EnvironmentName
    opponent: OpponentOf = None
    """In a multi-player game: who plays the other sides (null: `self`), a name or a section. Other environments get a bare name as
    an option of their own."""
    opponent_in_evaluation: OpponentOf = None
    """The opponent in evaluations (null: `opponent`; instead of `self`, a scripted player of the game)."""


ENVIRONMENTS: dict[str, type[EnvironmentTask]] = {"random_walks": RandomWalksTask, "maze": MazeTask, "nim": NimTask}
