"""The policy module: trunk, vocabulary projection, heads and reference behind one forward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from torch import nn

from lmrl import distributed
from lmrl.accelerators import default_precision
from lmrl.errors import ModelError
from lmrl.policy.attention import take_attention
from lmrl.policy.cache import Cache
from lmrl.policy.forward import run_pass
from lmrl.policy.heads import HeadsSpec, Values, guide
from lmrl.policy.heads_files import below, load_heads, save_heads
from lmrl.policy.language_model import (
    AnyModel,
    embeddings_of,
    has_adapters,
    projection_of,
    without_adapters,
)
from lmrl.policy.layers import Layers
from lmrl.policy.logprobs import at_least_float32, product
from lmrl.policy.lora_linear import take_lora
from lmrl.policy.memory import fit, needs_checkpointing
from lmrl.policy.mixed_precision import take_mixed_precision
from lmrl.policy.passes import ABSENT, ForwardRequest, Guidance, Outputs, States
from lmrl.policy.probes import can_hold_slots, can_pack, can_share_prompts, head_is_linear
from lmrl.policy.quantized import numel, save_quantization
from lmrl.policy.score import score_passes
from lmrl.policy.slots import SlotCache
from lmrl.policy.states import run_states
from lmrl.recipe import Recipe
from lmrl.trajectories.batch import Batch, Microbatch, Sequence

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

REFERENCE_ADAPTER = "reference"
Reference: TypeAlias = "Literal['adapter_off', 'adapter'] | PreTrainedModel"
"""What divergence is measured from: the model without its adapter or with a second, frozen one, or a frozen copy."""


class Policy(nn.Module):
    """A causal language model ready for reinforcement learning.

    model: a transformers causal LM, or a peft model around one (adapter `default`).
    temperature: sampling temperature; log-probabilities are those of the distribution that is sampled from.
    """

    def __init__(
        self, model: AnyModel, tokenizer: Any, heads: HeadsSpec | None = None, reference: Reference | None = None
    ):
        super().__init__()
        self.model: AnyModel = model
        self.tokenizer = tokenizer
        self.values: Values = self._build_values(heads) if heads is not None else ABSENT
        self._reference = reference if reference is None or isinstance(reference, str) else [reference]  # not a child
        self.heads_are_new = True
        """False if the heads come from an earlier stage. A stage that resumes has what it began with, so that it continues alike."""
        self.quantization: str | None = None
        """How the frozen weights were quantized as they were read (see quantized.py)."""
        self.temperature = 1.0
        """That of log-probabilities and entropies."""
        self.microbatch_tokens = 4096
        """Tokens of a pass at most; becomes less if memory runs out (see memory.py)."""
        self.value_pull = torch.zeros(3)
        """Tally of the last update's gradients at the last hidden states (see pull.py)."""
        self.synchronized = False
        """True if all ranks must run every pass together, because the weights are sharded."""
        self.autocast_dtype: torch.dtype | None = None
        self.attention: str = "auto"
        """The recipe's `model.attention`."""
        self._is_decoding = self._was_training = False
        """True while decoding; and the mode before."""
        self._projection: torch.Tensor | None = None
        """While decoding: the vocabulary's matrix in the precision of passes."""
        self.layers = Layers()
        parts: list[nn.Module] = [self, *(self._reference if isinstance(self._reference, list) else [])]
        for part in parts:
            take_attention(part)
            take_mixed_precision(part)
        if has_adapters(model):
            take_lora(model)
        self.splits_head = head_is_linear(self.causal_lm)
        if heads is not None and heads.q == "probability" and not self.splits_head:
            raise ModelError(
                "objective.name=q_sft computes the logits of a second model from its vocabulary's matrix, but this model caps or "
                "scales its logits: set objective.name=ilql, or take another model"
            )
        super().train()  # all parts in one mode, which `train` relies on

    def train(self, mode: bool = True) -> Policy:
        """As for any module, but free if nothing changes: a step changes modes several times, over thousands of modules."""
        if mode != self.training:
            super().train(mode)
        self.layers.run_checkpointed(mode)
        return self

    def configure(self, recipe: Recipe) -> None:
        """Take over what a recipe says about passes through the model."""
        sampled = recipe.objective.uses_sampling_temperature and not recipe.source.has_log
        self.temperature = recipe.rollouts.temperature if sampled else 1.0
        self.microbatch_tokens = recipe.training.microbatch_tokens
        self.attention = recipe.model.attention
        if (recipe.training.precision or default_precision(self.device)) == "bfloat16":
            self.autocast_dtype = torch.bfloat16
        if self.device.type != "cpu":  # what autocast leaves in float32 need not be more exact than what it does not
            torch.set_float32_matmul_precision("highest" if self.autocast_dtype is None else "high")
        trunks = [self.causal_lm, *([self.values.trunk] if self.values and self.values.trunk else [])]
        if needs_checkpointing(recipe, self.device):
            self.layers.checkpoint(trunks, asked=bool(recipe.training.gradient_checkpointing))
        if recipe.training.compile:
            self.layers.compile(trunks)

    def begin_update(self, dropout: bool) -> None:
        """Make ready for passes with gradient, with the model's dropout or without."""
        self.train(dropout)
        self.layers.run_checkpointed(True)

    def _build_values(self, heads: HeadsSpec) -> Values:
        width, tokens = self.vocabulary.shape[1], self.vocabulary.shape[0]
        width = getattr(self.causal_lm.config.get_text_config(), "hidden_size", width)
        return Values(heads, width, tokens, self.causal_lm)

    # ------------------------------------------------------------------------------------------------------ structure
    @property
    def vocabulary(self) -> torch.Tensor:
        """The matrix that projects hidden states to logits, (V, D)."""
        return projection_of(self.causal_lm).weight

    @property
    def guidance(self) -> Guidance | None:
        """The policy's own guidance of decoding; None if it has no Q values."""
        spec = self.values.spec if self.values is not None else None
        return Guidance(spec.beta, spec.support) if spec is not None and spec.q is not None else None

    @property
    def causal_lm(self) -> PreTrainedModel:
        return without_adapters(self.model)

    @property
    def is_lora(self) -> bool:
        return has_adapters(self.model)

    @property
    def adapted_model(self) -> PeftModel:
        """The model with its adapters, of a policy that has some."""
        assert has_adapters(self.model)
        return self.model

    @property
    def device(self) -> torch.device:
        return embeddings_of(self.causal_lm).device

    @property
    def size(self) -> tuple[int, int]:
        """Parameters of the language model, without adapters and heads, and the width of its hidden states."""
        added = (".lora_", ".modules_to_save.")
        own = (numel(one) for name, one in self.causal_lm.named_parameters() if not any(part in name for part in added))
        return sum(own), getattr(self.causal_lm.config.get_text_config(), "hidden_size", self.vocabulary.shape[1])

    @property
    def precision(self) -> torch.dtype:
        """The precision of losses: float32, or float64 if the policy has been cast to it."""
        return at_least_float32(self.vocabulary.dtype)

    @property
    def max_length(self) -> int | None:
        """Tokens of context the model has positions for; None if its config does not say."""
        return getattr(self.causal_lm.config.get_text_config(), "max_position_embeddings", None)

    @property
    def has_reference(self) -> bool:
        return self._reference is not None

    @property
    def eos_ids(self) -> set[int]:
        """Tokens that end a turn."""
        ids = getattr(getattr(self.causal_lm, "generation_config", None), "eos_token_id", None)
        ids = [] if ids is None else [ids] if isinstance(ids, int) else list(ids)
        return {*ids, *([self.tokenizer.eos_token_id] if self.tokenizer.eos_token_id is not None else [])}

    @property
    def pad_id(self) -> int:
        pad = self.tokenizer.pad_token_id
        return pad if pad is not None else next(iter(sorted(self.eos_ids)), 0)

    def decode(self, tokens: list[int]) -> str:
        """Text of sampled tokens, special tokens left out."""
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))

    def trainable(self) -> dict[str, nn.Parameter]:
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    # -------------------------------------------------------------------------------------------------------- forward
    @cached_property
    def packs(self) -> bool:
        """True if microbatches are packed end to end, without padding."""
        return can_pack(self)

    @cached_property
    def shares_prompts(self) -> bool:
        """True if sequences that begin alike can be computed as one (see lmrl/trajectories/shared.py)."""
        return can_share_prompts(self)

    @cached_property
    def holds_slots(self) -> bool:
        """True if keys and values of sequences can be kept and gone on from (see lmrl/policy/slots.py)."""
        return can_hold_slots(self)

    def forward(
        self, batch: Microbatch, request: ForwardRequest = ForwardRequest(), reference: bool = False
    ) -> Outputs:
        """reference: by the reference instead of the policy."""
        if not reference:
            return run_pass(self, self.causal_lm, batch, request)
        with self._reference_model() as lm:
            return run_pass(self, lm, batch, request)

    def passes(self, micros: list[Microbatch]) -> list[Microbatch]:
        """These microbatches, padded with dummies to the longest rank's number if the ranks are synchronized."""
        if not self.synchronized:
            return micros
        lacking = distributed.all_max(len(micros)) - len(micros)
        return micros + [self.dummy_microbatch() for _ in range(lacking)]

    def dummy_microbatch(self) -> Microbatch:
        """A microbatch with which this rank joins the collectives of a pass."""
        tokens, first = torch.zeros(2, dtype=torch.long), torch.zeros(1, dtype=torch.long)
        return Batch([Sequence(tokens, first, first, {"floors": torch.zeros(1)})]).collate([0], self.pad_id, self.packs)

    @contextmanager
    def at_temperature(self, temperature: float) -> Iterator[None]:
        """Inside, log-probabilities and entropies are those at this temperature."""
        before, self.temperature = self.temperature, temperature
        try:
            yield
        finally:
            self.temperature = before

    @contextmanager
    def decoding(self) -> Iterator[None]:
        """Inside, passes are for sampling: without dropout or gradient."""
        self.begin_decoding()
        try:
            with torch.no_grad(), self.autocast():
                yield
        finally:
            self.end_decoding()

    def begin_decoding(self) -> None:
        """Switch off, until `end_decoding`, what is costly to switch for every token. The passes themselves need no_grad and autocast."""
        self._was_training = self.training
        self.eval()
        self.layers.run_compiled(False)
        self._is_decoding = True
        torch.autocast_increment_nesting()  # the weights that autocast has cast are kept until the end

    def end_decoding(self) -> None:
        """Back to the state before `begin_decoding`."""
        if torch.autocast_decrement_nesting() == 0:
            torch.clear_autocast_cache()
        self._is_decoding, self._projection = False, None
        self.train(self._was_training)
        self.layers.run_compiled(True)

    def new_cache(self, guidance: Guidance | None = None) -> Cache:
        two = guidance is not None and self.values.trunk is not None
        return Cache(self.causal_lm.config, two)

    def next_token_logits(
        self,
        cache: Cache | SlotCache,
        guidance: Guidance | None = None,
        last_B: torch.Tensor | None = None,
        **inputs: Any,
    ) -> torch.Tensor:
        """Logits after one position of each row, shape (B, V), for decoding; takes what the trunk takes.

        last_B: which position (None: the last).
        """

        # Two dimensions: a (B, 1, D) slice would make a batched product that copies the vocabulary matrix B times.
        def pick(hidden_BTD: torch.Tensor) -> torch.Tensor:
            if last_B is None:
                return hidden_BTD[:, -1]
            return hidden_BTD[torch.arange(len(last_B), device=last_B.device), last_B]

        states = run_states(self, inputs, pick, guidance is not None, cache)
        if guidance is None:
            return states.logits_NV
        assert states.q_NV is not None
        return guide(states.logits_NV, states.q_NV, guidance.beta, guidance.support)

    @torch.no_grad()
    def states(self, batch: Microbatch) -> States:
        """Logits and Q of the states of a small batch, over the whole vocabulary."""
        return self._states_of(batch, self.guidance is not None)

    def logits(self, batch: Microbatch) -> torch.Tensor:
        """Logits of the states of a small batch over the whole vocabulary, (N, V), with gradient."""
        return self._states_of(batch, with_q=False).logits_NV

    def _states_of(self, batch: Microbatch, with_q: bool) -> States:
        inputs = {"input_ids": batch.tokens_BT, "attention_mask": batch.mask_BT}
        return run_states(self, inputs, lambda hidden_BTD: hidden_BTD[batch.rows_N, batch.cols_N], with_q)

    def logits_of(self, hidden_ND: torch.Tensor) -> torch.Tensor:
        """Logits of hidden states, computed on an accelerator as `token_logprobs` does: not rounded to bfloat16."""
        head = projection_of(self.causal_lm)
        if self.autocast_dtype is None or hidden_ND.device.type != "cuda" or hidden_ND.dim() != 2:
            return head(hidden_ND)
        matrix = head.weight.to(self.autocast_dtype) if self._projection is None else self._projection
        if self._is_decoding:
            self._projection = matrix
        logits_NV = product(hidden_ND.to(self.autocast_dtype), matrix.T)
        bias = getattr(head, "bias", None)
        return logits_NV if bias is None else logits_NV + bias

    def autocast(self) -> torch.autocast:
        """The recipe's precision, for passes."""
        dtype = self.autocast_dtype
        return torch.autocast(self.device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)

    @torch.no_grad()
    def score(
        self, batch: Batch, request: ForwardRequest = ForwardRequest(), reference: bool = False
    ) -> dict[str, list[torch.Tensor]]:
        """Evaluate a batch without gradient: for each wanted field, one 1-D tensor a sequence, in the batch's order."""
        was_training = self.training
        self.eval()
        try:
            work = partial(score_passes, self, count=len(batch.sequences), request=request, reference=reference)
            return fit(self, batch, work, "score", want=asdict(request), reference=reference)
        finally:
            self.train(was_training)

    # ------------------------------------------------------------------------------------------------------ reference
    @contextmanager
    def _reference_model(self) -> Iterator[PreTrainedModel]:
        reference = self._reference
        if reference is None:
            raise RuntimeError("this policy was loaded without a reference")
        if isinstance(reference, list):
            yield reference[0]
        elif reference == "adapter_off":
            with self.adapted_model.disable_adapter():
                yield self.causal_lm
        else:
            self.adapted_model.set_adapter(REFERENCE_ADAPTER, inference_mode=True)
            try:
                yield self.causal_lm
            finally:
                self.adapted_model.set_adapter("default")

    def measure_from(self, other: Policy) -> None:
        """Take another policy's language model as the reference that divergence is measured from."""
        self._reference = [other.causal_lm]

    def to(self, *args: Any, **kwargs: Any) -> Policy:
        if isinstance(self._reference, list):
            self._reference[0].to(*args, **kwargs)
        return super().to(*args, **kwargs)

    # --------------------------------------------------------------------------------------------------------- saving
    def save(self, folder: Path, weights: dict[str, torch.Tensor] | None = None) -> None:
        """Write an ordinary transformers or peft folder, with the heads in files next to it.

        weights: as `state_dict` names them, if this process holds only a part of each.
        """
        folder.mkdir(parents=True, exist_ok=True)
        own = None if weights is None else below("model.", weights)
        if self.is_lora:
            self.save_adapter(folder, own)
        else:
            self.causal_lm.save_pretrained(folder, state_dict=own)
        self.tokenizer.save_pretrained(folder)
        if self.values is not None:
            save_heads(self.values, folder, None if weights is None else below("values.", weights))

    def save_adapter(self, folder: Path, weights: dict[str, torch.Tensor] | None = None) -> None:
        """Write the adapter, and how the model below it is quantized."""
        self.adapted_model.save_pretrained(
            str(folder), selected_adapters=["default"], save_embedding_layers=False, state_dict=weights
        )
        save_quantization(self.quantization, folder)

    def load_heads(self, folder: Path, put: Callable[[torch.Tensor, torch.Tensor], Any] = torch.Tensor.copy_) -> bool:
        """Take over the heads of a checkpoint; returns False if it has no such ones. put: see lmrl.policy.load.load_weights."""
        return self.values is not None and load_heads(self.values, folder, put)
