"""Sections about steps: `optimizer`, `training`, `evaluation`, `tracking`."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from lmrl import registry
from lmrl.recipe.base import Plugin, Section
from lmrl.recipe.evaluations import OWN_TASK

Decay = Annotated[float, Field(ge=0, lt=1)]


class Optimizer(Section):
    """AdamW, or Muon with AdamW, and a schedule."""

    name: Literal["adamw", "adamw_8bit", "muon"] = "adamw"
    """adamw_8bit: moments in 8 bits (Dettmers et al., arXiv 2110.02861), by bitsandbytes. muon: orthogonalized steps for the matrices
    of layers, as long as AdamW's (Liu et al., arXiv 2502.16982), and AdamW for embeddings, head, norms and value heads. Both are for
    one process, or for several that shard nothing."""
    lr: float | None = Field(None, gt=0)
    """Learning rate (null: by what is learned, what is trained and the model's size, see lmrl/recipe/rates.py; `lmrl show` tells)."""
    head_lr: float | None = Field(None, gt=0)
    """Learning rate of value heads (null: of PPO's by the model's width; of Q heads `lr`, or 1e-3 where that is null too)."""
    betas: tuple[Decay, Decay] | None = None
    """Decay rates of AdamW's means of gradients and of their squares (null: 0.9 and 0.95 for policy gradients, whose gradients may grow
    tenfold from one update to the next; else 0.9 and 0.999)."""
    eps: float = Field(1e-8, gt=0)
    """Added to the root of the mean square that AdamW divides by."""
    weight_decay: float = Field(0.0, ge=0)
    """Share of each weight, times `lr`, that every update takes away."""
    schedule: Literal["constant", "linear", "cosine"] | None = None
    """The learning rate after warm-up: it stays, or falls to 0 over the stage (null: linear where a stage learns from logged
    data alone, whose noise a falling rate averages out; else constant)."""
    warmup_steps: int = Field(0, ge=0)
    """First steps, over which the learning rate rises from 0."""
    max_grad_norm: Annotated[float, Field(gt=0)] | Literal["auto"] | None = "auto"
    """Longer gradients are shortened to this norm (null: never; auto: 1, but 10 for Q values, which have to believe in rare returns)."""


class Named(Plugin):
    """A part by name: `file.py:Name`, a dotted path, or the name of a shipped or installed one; further keys are its options."""

    kind: ClassVar[registry.Kind]
    name: str

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        if not registry.has_name(cls.kind, name):
            raise ValueError(registry.unknown(cls.kind, name))
        return name


class CustomListener(Named):
    """A custom listener, with its options."""

    kind = "listener"


class Training(Section):
    """How long, how reproducibly, in what pieces."""

    steps: int = Field(100, ge=1)
    """Steps of the loop: each draws trajectories and learns from them."""
    seed: int = Field(0, ge=0)
    """Names all random streams."""
    microbatch_tokens: int = Field(4096, ge=1)
    """Tokens, padding included, that go through the model at once. If memory runs out, the run continues with half as many."""
    try_worst_case: bool | None = None
    """Before the first step, try an update's passes on the longest sequences that the recipe allows, so that what does not fit
    fails at once (null: on an accelerator). Reward models do not know this."""
    precision: Literal["float32", "bfloat16"] | None = None
    """bfloat16: autocast, and the product with the vocabulary in bfloat16 with sums in float32. Trainable weights stay float32. null:
    bfloat16 on an accelerator that computes in it, else float32."""
    gradient_checkpointing: bool | None = None
    """Keep no activations inside the model's layers for the backward pass, but compute them again: less memory, more time. null: on an
    accelerator whose memory the recipe would not fit otherwise, by the estimate that `lmrl show` prints."""
    compile: bool = False
    """Compile the model's layers for the passes of an update (torch.compile): a minute at the start, faster steps on an accelerator."""
    checkpoint_every: int = Field(50, ge=0)
    """Steps between checkpoints (0: only at the end of a stage)."""
    keep_checkpoints: int = Field(2, ge=1)
    """Newest checkpoints to keep, besides the best."""
    final: Literal["auto", "best", "last"] = "auto"
    """The policy that a stage leaves. last: that of its last step. best: the one that was evaluated best. auto: the last, unless an
    earlier one was certainly better, on the same episodes. With `objective.kl_target`, earlier ones beyond it are left out. Reward
    models do not know this."""
    kl_band: float | None = Field(0.03, gt=0)
    """Nats a token by which a step of policy gradients may move the policy. Where it has moved further, the learning rate is
    lowered at once, and raised again, up to the recipe's, where it moves less than half as far (null: the rate is left alone)."""
    on_collapse: Literal["rollback", "stop", "warn"] = "rollback"
    """When a stage has certainly lost most of what it gained (see docs/guard.md). rollback: go back to the best checkpoint with a lower
    learning rate, and end with it after three times; stop: end with it at once; warn: only say so. Both ends have exit code 3. Reward
    models do not know this."""
    max_nonfinite: int = Field(3, ge=1)
    """The run stops after this many updates in a row with a non-finite loss or gradient."""
    listeners: list[CustomListener] = []
    """Listeners of your own (docs/plugins.md), called after lmrl's."""
    threads: int | None = Field(None, ge=1, le=4096)
    """CPU threads (null: torch decides)."""


class OtherSuite(Section):
    """A suite beside the run's own task."""

    suite: str
    """Its name or file."""
    episodes: int | None = Field(None, ge=1)
    """Start states or prompts of it (null: as many as the suite says)."""
    changes: list[str] = []
    """Changes of it as `lmrl eval` takes them, for instance `task.prompts.path=mmlu.jsonl`."""


def as_suites(given: Any) -> Any:
    """Names of suites as sections."""
    return [{"suite": one} if isinstance(one, str) else one for one in given] if isinstance(given, list) else given


class Evaluation(Section):
    """Scoring of a stage: on what, and when."""

    suite: str | None = OWN_TASK
    """A suite's name or file. task: the stage's own task: an environment with evaluation's own seeds, or held-out prompts; prompts
    without rewards or held-out rows are not scored, nor are logged ones that a learned model or a server would judge. null: no
    evaluation."""
    every: int | None = Field(None, ge=0)
    """Steps between evaluations. 0: at the start and the end of a stage. null: also up to eight times in between, as long as all
    evaluations play less than 8 % of the episodes that the stage learns from (2 % of logged ones, see lmrl/recipe/evaluations.py);
    a stage too short for that is not scored on its own task."""
    episodes: int | None = Field(None, ge=1)
    """Start states to score during the run (null: as many as the suite says; of the stage's own task, 16 to 256 episodes)."""
    metric: str | None = None
    """Metric that names the best checkpoint, higher is better (null: the suite's first)."""
    before_after: Annotated[list[OtherSuite], BeforeValidator(as_suites)] = []
    """Suites, such as `[mmlu, ifeval]` or `[{suite: mmlu, episodes: 200}]`, that the base model and the final policy both play at the
    end of the run: what training has cost elsewhere (the alignment tax), as paired differences with intervals."""
    diagnostics_every: int = Field(50, ge=0)
    """Steps between diagnostics of an objective with values, on a fixed probe batch (0: none)."""
    gate: Gate | None = None
    show_samples: int = Field(2, ge=0)
    """Samples shown live."""
    show_every: int = Field(10, ge=1)
    """Steps between samples shown live."""


class Gate(Section):
    """Watch the policy through a stage's first steps, and take it back where it loses what it could do before.

    Scores are the suite's metric, normalised: 0 is the random player, 100 the optimal one. They are paired over start
    states with the policy as the stage began.
    """

    drop: float = Field(5.0, ge=0)
    """Points of normalised score that may be lost."""
    every: int = Field(5, ge=1)
    """Steps between measurements."""
    steps: int | None = Field(None, ge=1)
    """First steps that are watched (null: the whole stage)."""
    lr_factor: float = Field(0.5, gt=0, le=1)
    """After a rollback the learning rate is multiplied by this."""
    max_rollbacks: int = Field(3, ge=1)
    """After this many, the stage ends with the best checkpoint."""


class CustomTracker(Named):
    """A tracker by name, or one of your own: `file.py:Name` or a dotted path, a class derived from accelerate.tracking.GeneralTracker.
    Further keys are arguments of what it starts, for instance wandb's `entity` and `tags`."""

    kind = "tracker"

    @model_validator(mode="before")
    @classmethod
    def _name_alone(cls, given: Any) -> Any:
        return {"name": given} if isinstance(given, str) else given


class Tracking(Section):
    """Experiment trackers, besides the run folder."""

    trackers: list[CustomTracker] = []
    """aim, clearml, comet_ml, dvclive, mlflow, swanlab, tensorboard, trackio, wandb, or one of your own (docs/plugins.md); with
    options as `{name: wandb, entity: TEAM}`."""

    @field_validator("trackers")
    @classmethod
    def _distinct(cls, trackers: list[CustomTracker]) -> list[CustomTracker]:
        names = [tracker.name for tracker in trackers]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"'{name}' is named twice: name each tracker once")
        return trackers

    project: str = "lmrl"
    """The project's name there."""
