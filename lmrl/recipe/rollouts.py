"""The `rollouts` section: how episodes are sampled, and by what."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from lmrl import registry
from lmrl.recipe.base import Section
from lmrl.recipe.server import Server

CorrectionMode = Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]


class VLLM(Section):
    """Settings of engine `vllm` (see docs/rollouts.md)."""

    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Precision of vLLM's own copy of the weights, whatever the learner's is."""
    max_model_len: int | None = Field(None, ge=1)
    """Tokens of context and completion at most (null: what the model has positions for)."""
    memory: float | None = Field(None, gt=0)
    """GiB for the cache of keys and values (null: on a CPU 1, on a GPU what `gpu_memory_utilization` leaves)."""
    gpu_memory_utilization: float = Field(0.3, gt=0, le=1)
    """Share of the GPU's memory that vLLM takes in all; the learner needs the rest."""
    tensor_parallel_size: int = Field(1, ge=1)
    """GPUs that the model is split over."""
    enforce_eager: bool | None = None
    """Run without compilation and CUDA graphs: a quicker start, slower sampling (null: on a CPU yes, on a GPU no)."""
    sleep: bool = False
    """Give the GPU memory of weights and cache back during updates. Only on a GPU."""


class Rollouts(Section):
    """How episodes are sampled."""

    engine: str = "hf"
    """hf: the policy's own transformers model; vllm: a copy of its weights in vLLM, in the same process; vllm-server: copies
    in one or several vLLM servers; or one of your own (docs/plugins.md)."""
    options: dict[str, Any] = {}
    """Keyword arguments of an engine of your own."""
    prompts: int = Field(32, ge=1, le=1_000_000)
    """Prompts (or start states) per step."""
    samples: int = Field(1, ge=1, le=1_000_000)
    """Episodes for each prompt."""
    max_new_tokens: int = Field(64, ge=1, le=10_000_000)
    """Maximum new tokens per turn."""
    temperature: float = Field(1.0, ge=0)
    """Divides the logits; what is learned is the distribution at this temperature. 0: the likeliest token."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Draw from the likeliest tokens that have this probability together. Refused by policy gradients, as is `top_k`."""
    top_k: int = Field(0, ge=0)
    """Draw from this many of the likeliest tokens (0: no limit)."""
    stop: list[str] = []
    """Strings that end a turn."""
    slots: int = Field(256, ge=1, le=1_000_000)
    """Sequences decoded at a time; one that has ended gives its place to the next. Engine `hf` counts those that it keeps
    between two turns of an episode."""
    cache_tokens: int | None = Field(None, ge=1)
    """Tokens whose keys and values engine `hf` holds at a time, padding and what `max_new_tokens` may bring included (null: no
    limit). Where these take too much memory, fewer sequences than `slots` are decoded at a time."""
    ahead: Literal[0, 1] = 0
    """1: the episodes of a step are played while the step before is learned from, with weights one step old (engine
    `vllm-server` does both at once; the others play first). Of stages that play; for one process."""
    deterministic: bool = True
    """The engine waits for every step of an environment, so that nothing depends on how long steps take. false: episodes
    overtake each other, which saves time where environments are slow (`task.workers`)."""
    beta: float | None = Field(None, ge=0)
    """Weight of Q added to the log-probabilities, for a policy with Q heads (null: its objective's; 0: none)."""
    support: float | None = Field(None, ge=0, lt=1)
    """Tokens less likely than this under the policy without Q are never drawn, for a policy with Q heads (null: as its
    objective said)."""
    check_every: int = Field(50, ge=0)
    """Weight syncs between comparisons of sampled and learner's log-probabilities, beside the one after the first sync
    (0: that one only)."""
    tolerance: float = Field(0.1, gt=0)
    """Mean absolute difference of those, in nats a token, at which the run stops."""
    correction: Literal["auto", "none"] | CorrectionMode = "auto"
    """Importance weights against the difference of sampler and learner, in policy gradients: a token's or an episode's
    ratio, held below a cap or left out above it (see lmrl/objectives/correction.py). auto: `token_truncate`, but none
    with engine `hf` and `ahead: 0`, which samples from the learner itself."""
    correction_cap: float = Field(3.0, gt=0)
    """Largest such ratio."""
    vllm: VLLM = VLLM()
    server: Server = Server()

    @model_validator(mode="after")
    def _known_engine(self) -> Rollouts:
        if not registry.has_name("engine", self.engine):
            raise ValueError(f"`engine`: {registry.unknown('engine', self.engine)}")
        if self.options and self.engine in registry.SHIPPED["engine"]:
            raise ValueError(
                f"`options` are an engine's of your own, and engine '{self.engine}' has other keys: leave it out"
            )
        return self

    @property
    def corrects(self) -> CorrectionMode | None:
        """The correction that is meant; None: none."""
        if self.correction == "auto":
            return None if self.engine == "hf" and not self.ahead else "token_truncate"
        return None if self.correction == "none" else self.correction
