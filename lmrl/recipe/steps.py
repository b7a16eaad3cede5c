"""The sections `optimizer`, `training`, `evaluation` and `tracking`."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, field_validator, model_validator

from lmrl.plugins import registry
from lmrl.recipe.base import Plugin, Section
from lmrl.recipe.evaluations import OWN_TASK

Decay = Annotated[float, Field(ge=0, lt=1)]


class Optimizer(Section):
    """AdamW, or Muon or NAMO with AdamW, and a schedule."""

    name: Literal["adamw", "adamw_8bit", "muon", "namo"] | None = None
    """adamw_8bit: moments in 8 bits (Dettmers et al., arXiv 2110.02861), with bitsandbytes. muon: orthogonalized steps for the matrices
    of layers, scaled to the size of AdamW's (Liu et al., arXiv 2502.16982), and AdamW for embeddings, head, norms and value heads. namo:
    the same, but shorter where gradients disagree (Zhang et al., arXiv 2602.17080). These three work in one process, or in several
    without sharding (null: there, for all weights of a model of less than 10M parameters, namo with policy gradients other than
    archer, and muon with ilql and mc on logged episodes alone; else adamw)."""
    lr: float | None = Field(None, gt=0)
    """Learning rate (null: chosen by objective, trained weights and model size, see lmrl/recipe/rates.py; `lmrl show` prints it)."""
    head_lr: float | None = Field(None, gt=0)
    """Learning rate of value heads (null: for PPO by the model's hidden size; for Q heads `lr`, or 1e-3 if that is null too)."""
    betas: tuple[Decay, Decay] | None = None
    """Decay rates of AdamW's moment estimates (null: 0.9 and 0.95 for policy gradients, whose gradients may grow
    tenfold from one update to the next; else 0.9 and 0.999)."""
    eps: float = Field(1e-8, gt=0)
    """AdamW's epsilon, added to the denominator."""
    norm_floor: Annotated[float, Field(ge=0, le=1)] | None = None
    """The least that NAMO divides a matrix's step by, relative to the largest mean norm of its gradients so far (null: 0.5 for PPO,
    whose whitened advantages are as large when nothing is left to learn; else 0)."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay: every update shrinks each weight by this share times `lr`."""
    schedule: Literal["constant", "linear", "cosine"] | None = None
    """Learning rate after warm-up: constant, or falling to 0 over the stage (null: linear if a stage learns only from logged
    data, where a falling rate averages out noise; else constant)."""
    warmup_steps: int = Field(0, ge=0)
    """First steps, over which the learning rate rises from 0."""
    max_grad_norm: Annotated[float, Field(gt=0)] | Literal["auto"] | None = "auto"
    """Clip gradients to this norm (null: never; auto: 1, but 10 for Q values, which have to learn from rare large returns)."""

    @model_validator(mode="after")
    def _floor_of_namo(self) -> Self:
        if self.norm_floor is not None and self.name != "namo":
            raise ValueError("norm_floor is an option of NAMO: set name to namo too")
        return self


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
    """Length, seed, precision, memory and checkpoints of a stage."""

    steps: int = Field(100, ge=1)
    """Steps of the loop: each gets trajectories and learns from them."""
    seed: int = Field(0, ge=0)
    """Seed of all random streams."""
    microbatch_tokens: int = Field(4096, ge=1)
    """Tokens, padding included, that go through the model at once. If memory runs out, the run continues with half as many."""
    try_worst_case: bool | None = None
    """Before the first step, try an update's passes on the longest sequences that the recipe allows, so that a run that does not fit
    fails at once (null: on an accelerator). Not for reward models."""
    precision: Literal["float32", "bfloat16"] | None = None
    """bfloat16: autocast, and the output projection in bfloat16 with float32 accumulation. Trainable weights stay float32. null:
    bfloat16 on an accelerator that supports it, else float32."""
    gradient_checkpointing: bool | None = None
    """Recompute activations inside the model's layers in the backward pass instead of storing them: less memory, more time. null: on an
    accelerator, if the recipe would not fit otherwise by the estimate that `lmrl show` prints."""
    compile: bool = False
    """Compile the model's layers for the passes of an update (torch.compile): a minute at the start, faster steps on an accelerator."""
    checkpoint_every: int = Field(50, ge=0)
    """Steps between checkpoints (0: only at the end of a stage)."""
    keep_checkpoints: int = Field(2, ge=1)
    """Number of newest checkpoints to keep, besides the best."""
    final: Literal["auto", "best", "last"] = "auto"
    """The policy that a stage keeps. last: that of its last step. best: the one with the best evaluation. auto: the last, unless an
    earlier one was certainly better, on the same episodes. With `objective.kl_target`, earlier ones beyond it are excluded. Not for
    reward models."""
    kl_band: float | None = Field(0.03, gt=0)
    """Nats per token by which a step of policy gradients may move the policy. If it moves further, the learning rate is
    lowered at once; if it moves less than half as far, the rate is raised again, up to the recipe's (null: the rate is not adapted)."""
    on_collapse: Literal["rollback", "stop", "warn"] = "rollback"
    """What happens if a stage has certainly lost most of what it gained (see docs/guard.md). rollback: go back to the best checkpoint
    with a lower learning rate, and after three rollbacks end the stage with it; stop: end with it at once; warn: only warn. Ending
    this way means exit code 3. Not for reward models."""
    max_nonfinite: int = Field(3, ge=1)
    """The run stops after this many updates in a row with a non-finite loss or gradient."""
    listeners: list[CustomListener] = []
    """Your own listeners (docs/plugins.md), called after lmrl's."""
    threads: int | None = Field(None, ge=1, le=4096)
    """CPU threads (null: torch decides)."""


class OtherSuite(Section):
    """A suite to play in addition to the run's own evaluation."""

    suite: str
    """Its name or file."""
    episodes: int | None = Field(None, ge=1)
    """Number of its start states or prompts (null: as the suite says)."""
    changes: list[str] = []
    """Overrides of the suite, as in `lmrl eval`, for instance `task.prompts.path=mmlu.jsonl`."""


def as_suites(given: Any) -> Any:
    """Turn bare names of suites into sections."""
    return [{"suite": one} if isinstance(one, str) else one for one in given] if isinstance(given, list) else given


class Evaluation(Section):
    """What a stage is scored on, and when."""

    suite: str | None = OWN_TASK
    """A suite's name or file. task: the stage's own task, on separate seeds of an environment or on held-out prompts. Prompts
    without rewards or held-out rows are not scored, nor are those of a stage that only learns from logs if a learned model or a server
    would have to judge them. null: no evaluation."""
    every: int | None = Field(None, ge=0)
    """Steps between evaluations. 0: only at the start and the end of a stage. null: also up to eight times in between, as long as all
    evaluations play less than 8 % of the episodes that the stage learns from (2 % if they are logged, see lmrl/recipe/evaluations.py);
    a stage too short for that is not scored on its own task."""
    episodes: int | None = Field(None, ge=1)
    """Start states to score during the run (null: as the suite says; on the stage's own task, 16 to 256 episodes)."""
    metric: str | None = None
    """Metric that determines the best checkpoint, higher is better (null: the suite's first)."""
    before_after: Annotated[list[OtherSuite], BeforeValidator(as_suites)] = []
    """Suites, such as `[mmlu, ifeval]` or `[{suite: mmlu, episodes: 200}]`, that the base model and the final policy both play at the
    end of the run: what training has cost on other tasks (the alignment tax), as paired differences with intervals."""
    diagnostics_every: int = Field(50, ge=0)
    """Steps between diagnostics of an objective with values, on a fixed probe batch (0: none)."""
    gate: Gate | None = None
    """Rolls the policy back if it gets worse (null: no gate)."""
    show_samples: int = Field(2, ge=0)
    """Number of samples displayed during training."""
    show_every: int = Field(10, ge=1)
    """Steps between these."""


class Gate(Section):
    """Watch the policy through a stage's first steps, and roll it back if it performs worse than at the start of the stage.

    Scores are the suite's metric, normalised: 0 is the random player, 100 the optimal one. They are compared with the
    policy at the start of the stage, paired over start states.
    """

    drop: float = Field(5.0, ge=0)
    """Allowed drop, in points of normalised score."""
    every: int = Field(5, ge=1)
    """Steps between measurements."""
    steps: int | None = Field(None, ge=1)
    """First steps that are watched (null: the whole stage)."""
    lr_factor: float = Field(0.5, gt=0, le=1)
    """Factor on the learning rate after a rollback."""
    max_rollbacks: int = Field(3, ge=1)
    """After this many rollbacks the stage ends with the best checkpoint."""


class CustomTracker(Named):
    """A tracker by name, or your own: `file.py:Name` or a dotted path to a class derived from accelerate.tracking.GeneralTracker.
    Further keys are arguments of the call that starts it, for instance wandb's `entity` and `tags`."""

    kind = "tracker"

    @model_validator(mode="before")
    @classmethod
    def _name_alone(cls, given: Any) -> Any:
        return {"name": given} if isinstance(given, str) else given


class Tracking(Section):
    """Experiment trackers, besides the run folder."""

    trackers: list[CustomTracker] = []
    """aim, clearml, comet_ml, dvclive, mlflow, swanlab, tensorboard, trackio, wandb, or your own (docs/plugins.md); with
    options: `{name: wandb, entity: TEAM}`."""

    @field_validator("trackers")
    @classmethod
    def _distinct(cls, trackers: list[CustomTracker]) -> list[CustomTracker]:
        names = [tracker.name for tracker in trackers]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"'{name}' is named twice: name each tracker once")
        return trackers

    project: str = "lmrl"
    """Project name in the trackers."""
