"""The `rollouts` section: how episodes are sampled, and by what."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from lmrl.plugins import registry
from lmrl.recipe.base import FreeForm, Section
from lmrl.recipe.server import Server

CorrectionMode = Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]


class VLLM(Section):
    """Settings of engine `vllm` (see docs/rollouts.md)."""

    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Precision of vLLM's own copy of the weights, whatever the learner's is."""
    max_model_len: int | None = Field(None, ge=1)
    """Maximum tokens of context and completion (null: the model's maximum)."""
    memory: float | None = Field(None, gt=0)
    """GiB for the cache of keys and values (null: on a CPU 1, on a GPU what `gpu_memory_utilization` leaves)."""
    gpu_memory_utilization: float = Field(0.3, gt=0, le=1)
    """Share of the GPU's memory that vLLM uses in total; the learner needs the rest."""
    tensor_parallel_size: int = Field(1, ge=1)
    """GPUs that the model is split over."""
    enforce_eager: bool | None = None
    """Run without compilation and CUDA graphs: starts faster, samples more slowly (null: on a CPU yes, on a GPU no)."""
    sleep: bool = False
    """Release the GPU memory of weights and cache during updates. Only on a GPU."""


class Rollouts(Section):
    """How episodes are sampled."""

    engine: str = "hf"
    """hf: the policy's own transformers model; vllm: a copy of its weights in vLLM, in the same process; vllm-server: copies
    in one or several vLLM servers; or your own engine (docs/plugins.md)."""
    options: FreeForm = {}
    """Keyword arguments of your own engine."""
    prompts: int = Field(32, ge=1, le=1_000_000)
    """Prompts (or start states) per step."""
    samples: int = Field(1, ge=1, le=1_000_000)
    """Episodes per prompt."""
    max_new_tokens: int = Field(64, ge=1, le=10_000_000)
    """Maximum new tokens per turn."""
    temperature: float = Field(1.0, ge=0)
    """Divides the logits; training is on the distribution at this temperature. 0: greedy."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Nucleus sampling: draw from the most likely tokens with this total probability. Policy gradients refuse it, as they do `top_k`."""
    top_k: int = Field(0, ge=0)
    """Draw from this many of the most likely tokens (0: no limit)."""
    stop: list[str] = []
    """Strings that end a turn."""
    slots: int = Field(256, ge=1, le=1_000_000)
    """Sequences decoded at a time; a finished one makes room for the next. With engine `hf` this includes sequences kept
    between two turns of an episode."""
    cache_tokens: int | None = Field(None, ge=1)
    """Limit on the tokens whose keys and values engine `hf` holds at a time, including padding and `max_new_tokens` (null: no
    limit). Sequences that do not fit wait, even if `slots` are free."""
    ahead: Literal[0, 1] = 0
    """1: play the next step's episodes while the current step trains, with weights one step old (engine
    `vllm-server` overlaps the two; the others play first). For stages that play; for one process."""
    deterministic: bool = True
    """true: the engine waits for every environment step, so that results do not depend on timing. false: episodes may
    overtake each other, which saves time with slow environments (`task.workers`)."""
    beta: float | None = Field(None, ge=0)
    """Weight of Q added to the log-probabilities, for a policy with Q heads (null: its objective's; 0: none)."""
    support: float | None = Field(None, ge=0, lt=1)
    """For a policy with Q heads: tokens less likely than this under the policy without Q are never drawn (null: the objective's
    value)."""
    check_every: int = Field(50, ge=0)
    """Weight syncs between checks that compare the sampler's and the learner's log-probabilities, in addition to the check after the
    first sync (0: only that one)."""
    tolerance: float = Field(0.1, gt=0)
    """Mean absolute difference in such a check, in nats per token, at which the run stops."""
    correction: Literal["auto", "none"] | CorrectionMode = "auto"
    """Importance weights that correct policy gradients for the mismatch of sampler and learner: ratios per token or per episode,
    truncated at a cap or masked above it (see lmrl/objectives/correction.py). auto: `token_truncate`, or none
    with engine `hf` and `ahead: 0`, which samples from the learner itself."""
    correction_cap: float = Field(3.0, gt=0)
    """Largest importance ratio."""
    vllm: VLLM = VLLM()
    server: Server = Server()

    @model_validator(mode="after")
    def _known_engine(self) -> Rollouts:
        if not registry.has_name("engine", self.engine):
            raise ValueError(f"`engine`: {registry.unknown('engine', self.engine)}")
        if self.options and self.engine in registry.SHIPPED["engine"]:
            raise ValueError(
                f"`options` are for an engine of your own, and engine '{self.engine}' has other keys: leave it out"
            )
        return self

    @property
    def corrects(self) -> CorrectionMode | None:
        """The correction that `auto` stands for; None: no correction."""
        if self.correction == "auto":
            return None if self.engine == "hf" and not self.ahead else "token_truncate"
        return None if self.correction == "none" else self.correction
