"""The policy module: trunk, vocabulary projection, heads and reference behind one forward."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from lmrl import distributed
from lmrl.accelerators import default_precision
from lmrl.errors import ModelError
from lmrl.policy.attention import take_attention
from lmrl.policy.cache import Cache, cache_arguments
from lmrl.policy.forward import run_pass
from lmrl.policy.heads import HeadsSpec, Values, guide, probability_ratio
from lmrl.policy.logprobs import at_least_float32, product
from lmrl.policy.memory import Passes, fit, needs_checkpointing
from lmrl.policy.mixed_precision import take_mixed_precision
from lmrl.policy.passes import ABSENT, ForwardRequest, Guidance, Outputs, States
from lmrl.policy.probes import can_hold_slots, can_pack, can_share_prompts, head_is_linear
from lmrl.policy.quantized import numel, save_quantization
from lmrl.policy.slots import SlotCache
from lmrl.recipe import Recipe
from lmrl.trajectories.batch import Batch, Microbatch, Sequence

HEADS_FILE, HEADS_CONFIG = "heads.safetensors", "heads.json"
REFERENCE_ADAPTER = "reference"


class Policy(nn.Module):
    """A causal language model ready for reinforcement learning.

    model: a transformers causal LM, or a peft model around one (adapter `default`).
    reference: None, `"adapter_off"`, `"adapter"` (a second, frozen adapter), or a frozen copy of the model.
    temperature: sampling temperature; log-probabilities are those of the distribution that is sampled from.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, heads: HeadsSpec | None = None, reference: Any = None):
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.values: Values = self._build_values(heads) if heads is not None else ABSENT
        self._reference = reference if reference is None or isinstance(reference, str) else [reference]  # not a child
        self.heads_are_new = True
        """True until the heads have learned something."""
        self.quantization: str | None = None
        """How the frozen weights were quantized as they were read (see quantized.py)."""
        self.temperature = 1.0
        self.microbatch_tokens = 4096
        """Tokens of a pass at most; becomes less where memory runs out (see memory.py)."""
        self.value_pull = torch.zeros(3)
        """Tally of the last update's gradients at the last hidden states (see pull.py)."""
        self.synchronized = False
        """True if all ranks must run every pass together, because the weights are sharded."""
        self.autocast_dtype: torch.dtype | None = None
        self.attention: str = "auto"
        """The recipe's `model.attention`."""
        self._is_decoding = False
        self._projection: torch.Tensor | None = None
        """While decoding: the vocabulary's matrix in the precision of passes."""
        self._compiled: dict[nn.Module, Callable] = {}
        """Layers by what runs them, except while sampling."""
        for part in (self, *(self._reference if isinstance(self._reference, list) else [])):
            take_attention(part)
            take_mixed_precision(part)
        self.splits_head = head_is_linear(self.causal_lm)
        self._checkpointed: list[nn.Module] = []
        super().train()  # all parts in one mode, which `train` relies on

    def train(self, mode: bool = True) -> Policy:
        """As for any module, but free where nothing changes: a step changes modes several times, over thousands of modules."""
        if mode != self.training:
            super().train(mode)
        for layer in self._checkpointed:
            layer.training = mode
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
            self._checkpoint(trunks, asked=bool(recipe.training.gradient_checkpointing))
        if recipe.training.compile:
            layers = [layer for trunk in trunks for layer in decoder_layers(trunk)]
            self._compiled = {layer: torch.compile(layer.forward, dynamic=True) for layer in layers}
            for layer, compiled in self._compiled.items():
                layer.forward = compiled

    def _checkpoint(self, trunks: list[nn.Module], asked: bool) -> None:
        """Let the layers of these trunks compute their activations again. asked: refuse trunks that cannot."""
        for trunk in trunks:
            if not trunk.supports_gradient_checkpointing:
                if not asked:
                    continue
                kind = type(trunk).__name__
                raise ModelError(f"training.gradient_checkpointing: {kind} does not support it; leave it out")
            trunk.gradient_checkpointing_enable()
            layers = (module for module in trunk.modules() if isinstance(module, GradientCheckpointingLayer))
            self._checkpointed += [layer for layer in layers if layer.gradient_checkpointing]

    def begin_update(self, dropout: bool) -> None:
        """Make ready for passes with gradient, with the model's dropout or without."""
        self.train(dropout)
        for layer in self._checkpointed:  # they checkpoint themselves in training mode only, and take no cache then
            layer.training = True

    def _build_values(self, heads: HeadsSpec) -> Values:
        width, tokens = self.vocabulary.shape[1], self.vocabulary.shape[0]
        width = getattr(self.causal_lm.config.get_text_config(), "hidden_size", width)
        return Values(heads, width, tokens, self.causal_lm)

    # ------------------------------------------------------------------------------------------------------ structure
    @property
    def vocabulary(self) -> torch.Tensor:
        """The matrix that projects hidden states to logits, (V, D)."""
        return self.causal_lm.get_output_embeddings().weight

    @property
    def guidance(self) -> Guidance | None:
        """How this policy decodes unless something else is asked for; None where it has no Q values."""
        spec = self.values.spec if self.values is not None else None
        return Guidance(spec.beta, spec.support) if spec is not None and spec.q is not None else None

    @property
    def causal_lm(self) -> nn.Module:
        return _unwrapped(self.model)

    @property
    def is_lora(self) -> bool:
        return hasattr(self.model, "peft_config")

    @property
    def device(self) -> torch.device:
        return self.causal_lm.get_input_embeddings().weight.device

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
        """Tokens of context the model has positions for, where its config says so."""
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
        return self.tokenizer.decode(tokens, skip_special_tokens=True)

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
    def decoding(self) -> Iterator[None]:
        """Inside, passes are for sampling: without dropout or gradient."""
        was_training = self.training
        self.eval()
        for layer in self._compiled:  # they are compiled for passes over whole sequences
            del layer.forward
        try:
            # One autocast region around all passes: at its end the weights that it cast are forgotten.
            self._is_decoding = True
            with torch.no_grad(), self.autocast():
                yield
        finally:
            self._is_decoding, self._projection = False, None
            self.train(was_training)
            for layer, compiled in self._compiled.items():
                layer.forward = compiled

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

        states = self._states(inputs, pick, guidance is not None, cache)
        if guidance is None:
            return states.logits_NV
        return guide(states.logits_NV, states.q_NV, guidance.beta, guidance.support)

    @torch.no_grad()
    def states(self, batch: Microbatch) -> States:
        """Logits, values and Q of the states of a small batch, over the whole vocabulary."""
        states = self._states_of(batch, self.guidance is not None)
        if self.values is not None and self.values.v is not None:
            # The features are the target trunk's where there is one; V's target belongs to them.
            states.values_N = self.values.value(states.features_ND, self.values.target_v)[0]
        return states

    def logits(self, batch: Microbatch) -> torch.Tensor:
        """Logits of the states of a small batch over the whole vocabulary, (N, V), with gradient."""
        return self._states_of(batch, with_q=False).logits_NV

    def _states_of(self, batch: Microbatch, with_q: bool) -> States:
        inputs = {"input_ids": batch.tokens_BT, "attention_mask": batch.mask_BT}
        return self._states(inputs, lambda hidden_BTD: hidden_BTD[batch.rows_N, batch.cols_N], with_q)

    def _states(
        self, inputs: dict[str, Any], pick: Callable, with_q: bool, cache: Cache | SlotCache | None = None
    ) -> States:
        """Run the trunks that are needed; `pick` chooses states from hidden states of shape (B, T, D)."""
        lm, values = self.causal_lm, self.values
        kept = cache.policy if cache else None
        with self.autocast():
            if self.splits_head:
                trunk = getattr(lm, lm.base_model_prefix)
                hidden_ND = pick(trunk(**inputs, **cache_arguments(trunk, kept)).last_hidden_state)
                logits_NV = self._logits(hidden_ND)
            else:
                result = lm(**inputs, **cache_arguments(lm, kept), output_hidden_states=True)
                hidden_ND, logits_NV = pick(result.hidden_states[-1]), pick(result.logits)
            states = States(hidden_ND, logits_NV)
            if not with_q:
                return states
            if values.trunk is not None:
                target = values.target_trunk
                trunk = getattr(target, target.base_model_prefix) if values.spec.q == "probability" else target
                arguments = cache_arguments(trunk, cache.values if cache else None)
                states.features_ND = pick(trunk(**inputs, **arguments).last_hidden_state)
            if values.spec.q == "probability":
                states.q_NV = probability_ratio(target.get_output_embeddings()(states.features_ND), logits_NV)
            else:
                with torch.autocast(hidden_ND.device.type, enabled=False):
                    states.q_NV = values.guiding(states.features_ND, self.vocabulary)
        return states

    def _logits(self, hidden_ND: torch.Tensor) -> torch.Tensor:
        """Logits over the vocabulary, computed on an accelerator as `token_logprobs` does: not rounded to bfloat16."""
        head = self.causal_lm.get_output_embeddings()
        if self.autocast_dtype is None or hidden_ND.device.type != "cuda" or hidden_ND.dim() != 2:
            return head(hidden_ND)
        matrix = head.weight.to(self.autocast_dtype) if self._projection is None else self._projection
        if self._is_decoding:
            self._projection = matrix
        logits_NV = product(hidden_ND.to(self.autocast_dtype), matrix.T)
        return logits_NV if getattr(head, "bias", None) is None else logits_NV + head.bias

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
            work = partial(self._score, count=len(batch.sequences), request=request, reference=reference)
            return fit(self, batch, work, "score", want=asdict(request), reference=reference)
        finally:
            self.train(was_training)

    def _score(
        self, passes: Passes, count: int, request: ForwardRequest, reference: bool
    ) -> dict[str, list[torch.Tensor]]:
        fields: dict[str, list[torch.Tensor]] = {}
        if not count:
            fields = {"logprobs": [], "entropy": [], "values": [], "greedy": []}
        for micro, idle, _ in passes:
            micro = micro.to(self.device)
            outputs = self(micro, request, reference)
            if idle:
                continue
            for name in ("logprobs", "entropy", "values", "target_values", "greedy"):
                flat = getattr(outputs, name)
                if flat is None:
                    continue
                slots = fields.setdefault(name, [None] * count)
                for index, part in zip(
                    micro.indices, flat.to("cpu", at_least_float32(flat.dtype)).split(micro.lengths), strict=True
                ):
                    slots[index] = part
        return fields

    # ------------------------------------------------------------------------------------------------------ reference
    @contextmanager
    def _reference_model(self) -> Iterator[nn.Module]:
        if self._reference is None:
            raise RuntimeError("this policy was loaded without a reference")
        if self._reference == "adapter_off":
            with self.model.disable_adapter():
                yield self.causal_lm
        elif self._reference == "adapter":
            self.model.set_adapter(REFERENCE_ADAPTER, inference_mode=True)
            try:
                yield self.causal_lm
            finally:
                self.model.set_adapter("default")
        else:
            yield self._reference[0]

    def measure_from(self, other: Policy) -> None:
        """Take another policy's language model as the reference that divergence is measured from."""
        self._reference = [other.causal_lm]

    def to(self, *args: Any, **kwargs: Any) -> Policy:
        if isinstance(self._reference, list):
            self._reference[0].to(*args, **kwargs)
        return super().to(*args, **kwargs)

    # --------------------------------------------------------------------------------------------------------- saving
    def save(self, folder: Path, weights: dict[str, torch.Tensor] | None = None) -> None:
        """Write an ordinary transformers or peft folder, with the heads beside it. weights: as `state_dict` names them,
        where this process's own are but a part."""
        folder.mkdir(parents=True, exist_ok=True)
        own = {} if weights is None else {"state_dict": below("model.", weights)}
        if self.is_lora:
            self.model.save_pretrained(folder, selected_adapters=["default"], save_embedding_layers=False, **own)
            save_quantization(self.quantization, folder)
        else:
            self.model.save_pretrained(folder, **own)
        self.tokenizer.save_pretrained(folder)
        if self.values is not None:
            heads = self.values.state_dict() if weights is None else below("values.", weights)
            save_file(unshared(heads), folder / HEADS_FILE)
            (folder / HEADS_CONFIG).write_text(json.dumps(asdict(self.values.spec)) + "\n")

    def load_heads(self, folder: Path, put: Callable[[torch.Tensor, torch.Tensor], Any] = torch.Tensor.copy_) -> None:
        """Take over the heads of a checkpoint, where it has the same ones. put: see lmrl.policy.load.load_weights."""
        spec = saved_heads(folder)
        if self.values is None or spec is None or not _same_heads(spec, self.values.spec):
            return
        own, saved = self.values.state_dict(), load_file(folder / HEADS_FILE)
        with torch.no_grad():
            for name in dict.fromkeys(
                [*own, *saved]
            ):  # in one order everywhere; a name that one of them lacks is an error
                put(own[name], saved[name])
        self.heads_are_new = False


def below(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors whose names begin with the prefix, named without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def unshared(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors as a file can hold them: contiguous, and copied where one shares its memory with an earlier one."""
    found, seen = {}, set()
    for name, tensor in tensors.items():
        place = tensor.untyped_storage().data_ptr()
        found[name] = (tensor.detach().clone() if place in seen else tensor.detach()).contiguous()
        seen.add(place)
    return found


def saved_heads(folder: Path) -> HeadsSpec | None:
    """The heads that a checkpoint folder holds."""
    file = folder / HEADS_CONFIG
    return HeadsSpec(**json.loads(file.read_text())) if file.exists() else None


def _same_heads(one: HeadsSpec, other: HeadsSpec) -> bool:
    parts = ("value", "q", "twins", "bins", "value_target")
    same_trunk = (one.trunk == "separate") == (other.trunk == "separate")
    return same_trunk and all(getattr(one, part) == getattr(other, part) for part in parts)


def decoder_layers(module: nn.Module) -> list[nn.Module]:
    """The layers of a module that transformers says are not to be split."""
    parts = list(module.modules())
    kinds = {kind for part in parts for kind in getattr(part, "_no_split_modules", None) or ()}
    return [part for part in parts if type(part).__name__ in kinds]


def _unwrapped(model: nn.Module) -> nn.Module:
    return model.get_base_model() if hasattr(model, "peft_config") else model
