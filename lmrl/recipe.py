"""The recipe: one strict, typed description of a run.

Everything a run does is written here and nowhere else. Reading files and overrides is `recipe_files`; nothing in this
module imports torch, so that `lmrl show` answers at once.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

MAIN_STAGE = "main"


class Section(BaseModel):
    """A part of a recipe: unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class Plugin(Section):
    """A part that names code of one's own: further keys are that code's options, checked when it is loaded."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


# ---------------------------------------------------------------------------------------------------------------- model
class Lora(Section):
    """Low-rank adapters through peft."""

    r: int = Field(16, ge=1)
    alpha: float = Field(32, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)
    """While imitating; objectives that compare log-probabilities switch all dropout off."""
    target_modules: str | list[str] = "all-linear"


class Model(Section):
    """The policy's starting point: `path` (hub name, folder, GGUF file), or `config` for one built from scratch."""

    path: str | None = None
    revision: str | None = None
    config: dict[str, Any] | None = None
    tokenizer: Literal["char", "word"] = "char"
    lora: Lora | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    trust_remote_code: bool = False

    @model_validator(mode="after")
    def _one_origin(self) -> Model:
        if self.path is None and self.config is None:
            raise ValueError("needs `path` (hub name, folder or GGUF file) or `config` (a model built from scratch)")
        if self.path is not None:
            self.config = None  # so that one override, model.path=..., puts a real model into any recipe
        if self.config is not None and self.lora is not None:
            raise ValueError(
                "`lora` adapts a pretrained model: give `path`, or train the model from scratch without it"
            )
        if self.dtype != "float32" and self.lora is None:
            raise ValueError(
                "`dtype: bfloat16` is for frozen weights, so it needs `lora`; trainable weights are float32 "
                "(for bfloat16 arithmetic set training.precision=bfloat16)"
            )
        return self


# ----------------------------------------------------------------------------------------------------------------- task
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

    @property
    def options(self) -> dict[str, Any]:
        return self.model_dump(include={"graph", "nodes", "max_length", "edge_probability"})


class CustomTask(EpisodeLimits, Plugin):
    """An environment of one's own, `file.py:Name` or a dotted path."""

    environment: str


ENVIRONMENTS = {"random_walks": RandomWalksTask}


# --------------------------------------------------------------------------------------------------------------- source
class RolloutsSource(Section):
    """Fresh episodes by the current policy (sizes and sampling are under `rollouts`)."""

    name: Literal["rollouts"] = "rollouts"


class DatasetSource(Section):
    """Logged episodes: a file of `prompt` and `completion`, or episodes played by a scripted player."""

    name: Literal["dataset"]
    path: str | None = None
    split: str = "train"
    player: str | None = None
    """A scripted player of the environment, for instance `random`."""
    episodes: int = Field(1000, ge=1)
    """How many episodes the player plays."""
    batch_size: int = Field(64, ge=1)
    """Episodes a step."""

    @model_validator(mode="after")
    def _one_origin(self) -> DatasetSource:
        if (self.path is None) == (self.player is None):
            raise ValueError("needs either `path` (a file of prompt and completion) or `player` (a scripted player)")
        return self


SOURCES = {"rollouts": RolloutsSource, "dataset": DatasetSource}


class Rollouts(Section):
    """How episodes are sampled."""

    engine: Literal["hf"] = "hf"
    prompts: int = Field(32, ge=1)
    """Prompts (or start states) a step."""
    samples: int = Field(1, ge=1)
    """Episodes for each prompt."""
    max_new_tokens: int = Field(64, ge=1)
    """Tokens a turn at most."""
    temperature: float = Field(1.0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0)
    """0: no limit."""
    stop: list[str] = []
    """Strings that end a turn."""
    slots: int = Field(256, ge=1)
    """Sequences decoded at a time."""


# ------------------------------------------------------------------------------------------------------------ objective
class LikelihoodObjective(Section):
    """Behaviour cloning: the likelihood of the action tokens."""

    name: Literal["likelihood"]
    entropy_coef: float = Field(0.0, ge=0)
    """Weight of an entropy bonus (0: plain likelihood)."""


class PPOObjective(Section):
    """Proximal policy optimisation over action tokens (Schulman et al., arXiv 1707.06347)."""

    name: Literal["ppo"]
    epochs: int = Field(2, ge=1)
    minibatches: int = Field(1, ge=1)
    clip: float = Field(0.2, gt=0)
    clip_high: float | None = Field(None, gt=0)
    """Upper clipping bound where it differs from `clip`."""
    value_coef: float = Field(0.5, ge=0)
    value_clip: float | None = Field(0.2, gt=0)
    """Clipping of the value around its old estimate (null: none)."""
    gamma: float = Field(1.0, gt=0, le=1)
    """Discount a turn."""
    gamma_token: float = Field(1.0, gt=0, le=1)
    """Discount a token inside a turn."""
    lam: float = Field(0.95, ge=0, le=1)
    whiten_advantages: bool = True
    entropy_coef: float = Field(0.0, ge=0)
    kl_coef: float = Field(0.0, ge=0)
    """Weight of the divergence from the reference (0: none, and no reference is kept)."""
    kl_in: Literal["reward", "loss"] = "reward"
    """Where the divergence enters: per-token in the reward (k1), or as a loss term (k3)."""
    kl_target: float | None = Field(None, gt=0)
    """Nats an episode that `kl_coef` is adapted towards (null: fixed)."""
    kl_horizon: int = Field(1000, ge=1)
    """Episodes over which `kl_coef` adapts."""
    target_kl: float | None = Field(None, gt=0)
    """Update epochs end early once the policy has moved this far (nats a token)."""
    missing_eos_penalty: float = Field(0.0, ge=0)
    """Taken from the reward of a turn that was cut off by the token limit."""
    value_warmup_steps: int = Field(0, ge=0)
    """First steps that train the value head alone."""
    detach_value: bool = False
    """Stop the value loss at the trunk, so that it trains the head alone."""

    @model_validator(mode="after")
    def _adaptive_needs_start(self) -> PPOObjective:
        if self.kl_target is not None and self.kl_coef == 0:
            raise ValueError("`kl_target` adapts `kl_coef`, which has to start above 0")
        return self


class CustomObjective(Plugin):
    """An objective of one's own, `file.py:Name` or a dotted path."""

    name: str


OBJECTIVES = {"likelihood": LikelihoodObjective, "ppo": PPOObjective}


def is_plugin(name: Any) -> bool:
    """Whether a name is code of one's own (`file.py:Name`, `package.module.Name`) and no shipped one."""
    return isinstance(name, str) and (":" in name or "." in name)


# ------------------------------------------------------------------------------------------------- everything about steps
class Optimizer(Section):
    """AdamW with a schedule."""

    lr: float = Field(1e-4, gt=0)
    head_lr: float | None = Field(None, gt=0)
    """Learning rate of value heads where it differs from `lr`."""
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """What the learning rate does after warm-up, down to 0 over the stage."""
    warmup_steps: int = Field(0, ge=0)
    max_grad_norm: float | None = Field(1.0, gt=0)


class Training(Section):
    """How long, how reproducibly, in what pieces."""

    steps: int = Field(100, ge=1)
    seed: int = Field(0, ge=0)
    microbatch_tokens: int = Field(4096, ge=1)
    """Tokens, padding included, that go through the model at once."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16: autocast. Trainable weights stay float32."""
    checkpoint_every: int = Field(50, ge=0)
    """Steps between checkpoints (0: only at the end of a stage)."""
    keep_checkpoints: int = Field(2, ge=1)
    """Newest checkpoints to keep, beside the best."""
    max_nonfinite: int = Field(3, ge=1)
    """The run stops after so many updates in a row with a non-finite loss or gradient."""
    threads: int | None = Field(None, ge=1)
    """CPU threads (null: torch decides)."""


class Evaluation(Section):
    """The suite that a run is scored on."""

    suite: str | None = None
    every: int = Field(0, ge=0)
    """Steps between evaluations (0: at the start and the end of a stage)."""
    episodes: int | None = Field(None, ge=1)
    """Start states to score during the run (null: as many as the suite says)."""
    metric: str | None = None
    """Metric that names the best checkpoint, higher is better (null: the suite's first)."""
    show_samples: int = Field(2, ge=0)
    """Samples shown live."""
    show_every: int = Field(10, ge=1)
    """Steps between samples shown live."""


class Tracking(Section):
    """Experiment trackers, through accelerate."""

    trackers: list[Literal["tensorboard", "wandb", "trackio"]] = []
    project: str = "lmrl"


def _choose(key: str, shipped: dict[str, type], custom: str | None):
    def choose(value: Any) -> str | None:
        name = value.get(key) if isinstance(value, dict) else getattr(value, key, None)
        if isinstance(name, str) and name in shipped:
            return f"<{name}>"
        return custom if custom and is_plugin(name) else None

    return choose


def _choose_task(value: Any) -> str | None:
    given = value if isinstance(value, dict) else getattr(value, "__dict__", {})
    return "<prompts>" if "environment" not in given else _choose_environment(value)


_choose_environment = _choose("environment", ENVIRONMENTS, "<custom>")
TASKS = {"<prompts>": PromptTask, "<custom>": CustomTask} | {f"<{name}>": cls for name, cls in ENVIRONMENTS.items()}
CHOICES = {
    "task": ("environment", _choose_task, TASKS),
    "source": ("name", _choose("name", SOURCES, None), {f"<{name}>": cls for name, cls in SOURCES.items()}),
    "objective": (
        "name",
        _choose("name", OBJECTIVES, "<custom>"),
        {f"<{name}>": cls for name, cls in OBJECTIVES.items()} | {"<custom>": CustomObjective},
    ),
}
"""Sections whose keys depend on a name in them: the key that holds the name, the choice, and the classes by tag."""

TaskSection = Annotated[
    Annotated[PromptTask, Tag("<prompts>")]
    | Annotated[RandomWalksTask, Tag("<random_walks>")]
    | Annotated[CustomTask, Tag("<custom>")],
    Discriminator(_choose_task),
]
SourceSection = Annotated[
    Annotated[RolloutsSource, Tag("<rollouts>")] | Annotated[DatasetSource, Tag("<dataset>")],
    Discriminator(CHOICES["source"][1]),
]
ObjectiveSection = Annotated[
    Annotated[LikelihoodObjective, Tag("<likelihood>")]
    | Annotated[PPOObjective, Tag("<ppo>")]
    | Annotated[CustomObjective, Tag("<custom>")],
    Discriminator(CHOICES["objective"][1]),
]


class Recipe(Section):
    """A run. Top-level keys describe the last stage; `stages` holds what earlier ones do differently, in order."""

    description: str = ""
    model: Model
    task: TaskSection
    source: SourceSection = RolloutsSource()
    rollouts: Rollouts = Rollouts()
    objective: ObjectiveSection
    optimizer: Optimizer = Optimizer()
    training: Training = Training()
    evaluation: Evaluation = Evaluation()
    tracking: Tracking = Tracking()
    stages: dict[str, dict[str, Any]] = {}

    @model_validator(mode="after")
    def _sensible(self) -> Recipe:
        ppo = isinstance(self.objective, PPOObjective)
        rolls_out = isinstance(self.source, RolloutsSource)
        if ppo and not rolls_out:
            raise ValueError(
                "objective 'ppo' learns from its own fresh episodes: set source.name=rollouts "
                "(for logged data use objective.name=likelihood)"
            )
        if isinstance(self.objective, LikelihoodObjective) and rolls_out:
            raise ValueError(
                "objective 'likelihood' imitates logged episodes: set source.name=dataset with source.path or source.player"
            )
        if ppo and (self.rollouts.top_p < 1 or self.rollouts.top_k > 0):
            raise ValueError(
                "objective 'ppo' needs the full distribution, because truncated sampling biases the probability ratio: "
                "set rollouts.top_p=1 and rollouts.top_k=0"
            )
        if ppo and self.rollouts.temperature == 0:
            raise ValueError("objective 'ppo' explores by sampling: set rollouts.temperature above 0")
        if isinstance(self.task, PromptTask):
            if rolls_out and not self.task.rewards:
                raise ValueError("a task of prompts learns from rewards: list at least one under task.rewards")
            if isinstance(self.source, DatasetSource) and self.source.player:
                raise ValueError("`source.player` plays an environment; prompts have none: give source.path")
        for name, changes in self.stages.items():
            if "tracking" in changes:
                raise ValueError(f"`stages.{name}.tracking`: trackers belong to the whole run, set `tracking` itself")
        if MAIN_STAGE in self.stages:
            raise ValueError(f"`stages.{MAIN_STAGE}` is what the top-level keys describe: choose another name")
        return self

    def arithmetic(self) -> dict[str, int]:
        """How a step's episodes become updates, as far as it is known before sampling."""
        if isinstance(self.source, RolloutsSource):
            prompts, samples = self.rollouts.prompts, self.rollouts.samples
        else:
            prompts, samples = self.source.batch_size, 1
        epochs = getattr(self.objective, "epochs", 1)
        minibatches = getattr(self.objective, "minibatches", 1)
        return {
            "prompts": prompts,
            "samples": samples,
            "episodes": prompts * samples,
            "epochs": epochs,
            "minibatches": minibatches,
            "episodes_per_minibatch": -(-prompts * samples // minibatches),
            "updates_per_step": epochs * minibatches,
            "steps": self.training.steps,
            "updates": epochs * minibatches * self.training.steps,
        }
