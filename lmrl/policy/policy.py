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
from lmrl.errors import ModelError
from lmrl.policy.attention import ATTENTION, take_attention
from lmrl.policy.cache import Cache
from lmrl.policy.heads import CHUNK, HeadsSpec, Values, guide, probability_ratio
from lmrl.policy.logprobs import token_logprobs
from lmrl.policy.memory import Passes, fit
from lmrl.policy.passes import ForwardRequest, Guidance, Outputs, States
from lmrl.policy.pull import bounded
from lmrl.recipe import Recipe
from lmrl.trajectories.batch import Batch, Microbatch, Sequence
from lmrl.trajectories.shared import pack, positions, visible

HEADS_FILE, HEADS_CONFIG = "heads.safetensors", "heads.json"
REFERENCE_ADAPTER = "reference"
LOGIT_SETTINGS = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")
"""Settings by which models of transformers cap or scale their logits; the probe below finds others."""


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
        self.values = self._build_values(heads) if heads is not None else None
        self._reference = reference if reference is None or isinstance(reference, str) else [reference]  # not a child
        self.heads_are_new = True
        """Whether the heads have yet to learn anything."""
        self.temperature = 1.0
        self.microbatch_tokens = 4096
        """Tokens of a pass at most; becomes less where memory runs out (see memory.py)."""
        self.value_pull = torch.zeros(3)
        """Tally of the last update's gradients at the last hidden states (see pull.py)."""
        self.synchronized = False
        """True if all ranks must run every pass together, because the weights are sharded."""
        self.autocast_dtype: torch.dtype | None = None
        for part in (self, *(self._reference if isinstance(self._reference, list) else [])):
            take_attention(part)
        self.splits_head = _head_is_linear(self.causal_lm)
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
        if recipe.training.precision == "bfloat16":
            self.autocast_dtype = torch.bfloat16
        if recipe.training.gradient_checkpointing:
            trunks = [self.causal_lm, *([self.values.trunk] if self.values and self.values.trunk else [])]
            for trunk in trunks:
                if not trunk.supports_gradient_checkpointing:
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
        own = (one.numel() for name, one in self.causal_lm.named_parameters() if ".lora_" not in name)
        return sum(own), getattr(self.causal_lm.config.get_text_config(), "hidden_size", self.vocabulary.shape[1])

    @property
    def precision(self) -> torch.dtype:
        """What losses are computed in: float32, or float64 where the policy has been cast to it."""
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
    def forward(
        self, batch: Microbatch, request: ForwardRequest = ForwardRequest(), reference: bool = False
    ) -> Outputs:
        """reference: by the reference instead of the policy."""
        if not reference:
            return self._run(self.causal_lm, batch, request)
        with self._reference_model() as lm:
            return self._run(lm, batch, request)

    def passes(self, micros: list[Microbatch]) -> list[Microbatch]:
        """These microbatches, padded with dummies to the longest rank's number if the ranks are synchronized."""
        if not self.synchronized:
            return micros
        lacking = distributed.all_max(len(micros)) - len(micros)
        return micros + [self.dummy_microbatch() for _ in range(lacking)]

    def dummy_microbatch(self) -> Microbatch:
        """A microbatch with which this rank joins the collectives of a pass."""
        tokens, first = torch.zeros(2, dtype=torch.long), torch.zeros(1, dtype=torch.long)
        return Batch([Sequence(tokens, first, first, {"floors": torch.zeros(1)})]).collate([0], self.pad_id)

    def _run(self, lm: nn.Module, batch: Microbatch, request: ForwardRequest) -> Outputs:
        outputs = Outputs()
        with self._autocast():
            inputs = self._inputs(batch)
            separate = self.values is not None and self.values.trunk is not None
            hidden_ND = None
            if request.logprobs or not separate:
                hidden_ND = self._policy_outputs(lm, inputs, batch, request, outputs)
            if request.probability is not None:
                self._second_model(inputs, batch, request, outputs)
            elif request.values or request.q:
                target_ND = hidden_ND
                if separate:
                    hidden_ND = self.values.trunk(**inputs).last_hidden_state[batch.rows_N, batch.cols_N]
                    with torch.no_grad():
                        target_ND = self.values.target_trunk(**inputs).last_hidden_state[batch.rows_N, batch.cols_N]
                with torch.autocast(hidden_ND.device.type, enabled=False):
                    hidden_ND = hidden_ND.detach() if request.detach_values else hidden_ND
                    self._head_outputs(hidden_ND, target_ND, batch, request, outputs)
        return outputs

    def _inputs(self, batch: Microbatch) -> dict[str, Any]:
        inputs = {"input_ids": batch.tokens_BT, "use_cache": False}
        if batch.branches_BT is not None:
            mask_B1TT = visible(batch.branches_BT)[:, None]
            # Eager attention adds its mask to the scores.
            if self.causal_lm.config._attn_implementation not in ("sdpa", ATTENTION):
                dtype = self.causal_lm.dtype
                mask_B1TT = torch.zeros_like(mask_B1TT, dtype=dtype).masked_fill(~mask_B1TT, torch.finfo(dtype).min)
            return inputs | {"attention_mask": mask_B1TT, "position_ids": positions(batch.branches_BT)}
        # Without padding the attention needs no mask and takes its fastest path.
        return inputs | {"attention_mask": None if bool(batch.mask_BT.all()) else batch.mask_BT}

    @cached_property
    def packs(self) -> bool:
        """Whether the model computes packed sequences (see trajectories/shared.py) as it computes plain ones, by trial.

        Not those with a state instead of attention, with a window, or with an attention that ignores the mask.
        """
        config = self.causal_lm.config.get_text_config()
        kinds = getattr(config, "layer_types", None) or ["full_attention"]
        if set(kinds) != {"full_attention"} or getattr(config, "sliding_window", None) is not None:
            return False
        tokens = torch.arange(12) % self.vocabulary.shape[0]
        plain = [
            Sequence(torch.cat([tokens[:4], own]), torch.arange(3, 3 + len(own)), own)
            for own in (tokens[4:7], tokens[7:])
        ]
        was_training = self.training
        try:
            scores = [self.score(Batch(part))["logprobs"] for part in (plain, [pack(plain)])]
        except (TypeError, ValueError, RuntimeError, IndexError, NotImplementedError):
            return False
        finally:
            self.train(was_training)
        tolerance = 1e-4 if self.causal_lm.dtype == torch.float32 and self.autocast_dtype is None else 5e-2
        return torch.allclose(torch.cat(scores[0]), torch.cat(scores[1]), atol=tolerance, rtol=0)

    def _policy_outputs(
        self, lm: nn.Module, inputs: dict[str, Any], batch: Microbatch, request: ForwardRequest, outputs: Outputs
    ) -> torch.Tensor:
        """Fill in log-probabilities and entropy; return the hidden states of the action tokens for the heads, (N, D)."""
        if self.splits_head:
            hidden_BTD = getattr(lm, lm.base_model_prefix)(**inputs).last_hidden_state
        else:
            result = lm(**inputs, output_hidden_states=True)
            hidden_BTD = result.hidden_states[-1]
        hidden_ND = values_ND = hidden_BTD[batch.rows_N, batch.cols_N]
        if request.logprobs and request.value_pull is not None and self.splits_head and hidden_ND.requires_grad:
            hidden_ND, values_ND = bounded(hidden_ND, request.value_pull, self.value_pull)
        if request.logprobs and self.splits_head:
            head = lm.get_output_embeddings()
            bias = getattr(head, "bias", None)
            outputs.logprobs, outputs.entropy = token_logprobs(
                hidden_ND, head.weight, bias, batch.targets_N, self.temperature
            )
        elif request.logprobs:
            logits_NV = result.logits[batch.rows_N, batch.cols_N]
            logits_NV = logits_NV.to(at_least_float32(logits_NV.dtype)) / self.temperature
            logprobs_NV = logits_NV.log_softmax(-1)
            outputs.logprobs = logprobs_NV.gather(1, batch.targets_N[:, None])[:, 0]
            outputs.entropy = -(logprobs_NV.exp() * logprobs_NV).sum(-1)
        return values_ND

    def _head_outputs(
        self,
        hidden_ND: torch.Tensor,
        target_ND: torch.Tensor,
        batch: Microbatch,
        request: ForwardRequest,
        outputs: Outputs,
    ) -> None:
        values, actions_N, matrix = self.values, batch.targets_N, self.vocabulary
        if request.values:
            outputs.values, outputs.value_logits = values.value(hidden_ND)
        if request.q:
            taken, logits = zip(*[values.taken(q, hidden_ND, actions_N, matrix) for q in values.q], strict=True)
            outputs.q = torch.stack(taken)
            outputs.q_logits = torch.stack(logits) if values.spec.bins else None
            with torch.no_grad():
                targets = [values.taken(q, target_ND, actions_N, matrix)[0] for q in values.target_q]
                outputs.target_q = torch.stack(targets).amin(0)
                if values.target_v is not None:
                    outputs.target_values = values.value(target_ND, values.target_v)[0]
        if request.push is not None:
            floors = batch.fields["floors"] if request.floors else None
            pushed = [values.push_down(q, hidden_ND, actions_N, matrix, request.push, floors) for q in values.q]
            outputs.push = torch.stack([push for push, _ in pushed])
            outputs.bound = torch.stack([bound for _, bound in pushed]).mean(0) if request.floors else None

    def _second_model(
        self, inputs: dict[str, Any], batch: Microbatch, request: ForwardRequest, outputs: Outputs
    ) -> None:
        """Q-SFT: log-probabilities of the second model, and the best supported ratio of its target to the policy."""
        rows, cols, actions_N = batch.rows_N, batch.cols_N, batch.targets_N
        values = self.values
        head, trunk = values.trunk.get_output_embeddings(), getattr(values.trunk, values.trunk.base_model_prefix)
        hidden_ND = trunk(**inputs).last_hidden_state[rows, cols]
        logprobs_N, _ = token_logprobs(hidden_ND, head.weight, getattr(head, "bias", None), actions_N)
        taken_N = (hidden_ND * head.weight[actions_N]).sum(-1)
        every_N = hidden_ND @ head.weight.sum(0)  # the sum of all logits, without the logits
        if getattr(head, "bias", None) is not None:
            taken_N, every_N = taken_N + head.bias[actions_N], every_N + head.bias.sum()
        outputs.logprobs, outputs.vocabulary = logprobs_N, values.tokens
        outputs.other_logprobs = every_N - values.tokens * (taken_N - logprobs_N) - logprobs_N
        with torch.no_grad():
            pi_ND = getattr(self.causal_lm, self.causal_lm.base_model_prefix)(**inputs).last_hidden_state[rows, cols]
            target = values.target_trunk
            p_ND = getattr(target, target.base_model_prefix)(**inputs).last_hidden_state[rows, cols]
            best = []
            for pi, p in zip(*(part.split(max(CHUNK // values.tokens, 1)) for part in (pi_ND, p_ND)), strict=True):
                pi_logits = self.causal_lm.get_output_embeddings()(pi).float()
                ratio = probability_ratio(target.get_output_embeddings()(p), pi_logits)
                supported = guide(pi_logits, torch.zeros_like(pi_logits), 0.0, request.probability).isfinite()
                best.append(ratio.masked_fill(~supported, 0).amax(-1))
            outputs.best_ratio = torch.cat(best)

    @contextmanager
    def decoding(self) -> Iterator[None]:
        """Inside, passes are for sampling: without dropout or gradient."""
        was_training = self.training
        self.eval()
        try:
            # One autocast region around all passes: at its end the weights that it cast are forgotten.
            with torch.no_grad(), self._autocast():
                yield
        finally:
            self.train(was_training)

    def new_cache(self, guidance: Guidance | None = None) -> Cache:
        two = guidance is not None and self.values.trunk is not None
        return Cache(self.causal_lm.config, two)

    def next_token_logits(self, cache: Cache, guidance: Guidance | None = None, **inputs: Any) -> torch.Tensor:
        """Logits after the last position of each row, shape (B, V), for decoding; takes what the trunk takes."""
        # Two dimensions: a (B, 1, D) slice would make a batched product that copies the vocabulary matrix B times.
        states = self._states(inputs, lambda hidden_BTD: hidden_BTD[:, -1], guidance is not None, cache)
        if guidance is None:
            return states.logits_NV
        return guide(states.logits_NV, states.q_NV, guidance.beta, guidance.support)

    @torch.no_grad()
    def states(self, batch: Microbatch) -> States:
        """Logits, values and Q of the states of a small batch, over the whole vocabulary."""
        inputs = {"input_ids": batch.tokens_BT, "attention_mask": batch.mask_BT}
        states = self._states(
            inputs, lambda hidden_BTD: hidden_BTD[batch.rows_N, batch.cols_N], self.guidance is not None
        )
        if self.values is not None and self.values.v is not None:
            # The features are the target trunk's where there is one; V's target belongs to them.
            states.values_N = self.values.value(states.features_ND, self.values.target_v)[0]
        return states

    def _states(self, inputs: dict[str, Any], pick: Callable, with_q: bool, cache: Cache | None = None) -> States:
        """Run the trunks that are needed; `pick` chooses states from hidden states of shape (B, T, D)."""
        lm, values = self.causal_lm, self.values
        own = {"past_key_values": cache.policy if cache else None, "use_cache": cache is not None}
        with self._autocast():
            if self.splits_head:
                hidden_ND = pick(getattr(lm, lm.base_model_prefix)(**inputs, **own).last_hidden_state)
                logits_NV = lm.get_output_embeddings()(hidden_ND)
            else:
                result = lm(**inputs, **own, output_hidden_states=True)
                hidden_ND, logits_NV = pick(result.hidden_states[-1]), pick(result.logits)
            states = States(hidden_ND, logits_NV)
            if not with_q:
                return states
            own = own | {"past_key_values": cache.values if cache else None}
            if values.trunk is not None:
                target = values.target_trunk
                trunk = getattr(target, target.base_model_prefix) if values.spec.q == "probability" else target
                states.features_ND = pick(trunk(**inputs, **own).last_hidden_state)
            if values.spec.q == "probability":
                states.q_NV = probability_ratio(target.get_output_embeddings()(states.features_ND), logits_NV)
            else:
                with torch.autocast(hidden_ND.device.type, enabled=False):
                    states.q_NV = values.guiding(states.features_ND, self.vocabulary)
        return states

    def _autocast(self):
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
            fields = {"logprobs": [], "entropy": [], "values": []}
        for micro, idle, _ in passes:
            micro = micro.to(self.device)
            outputs = self(micro, request, reference)
            if idle:
                continue
            for name in ("logprobs", "entropy", "values"):
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
        else:
            self.model.save_pretrained(folder, **own)
        self.tokenizer.save_pretrained(folder)
        if self.values is not None:
            heads = self.values.state_dict() if weights is None else below("values.", weights)
            state = {name: tensor.detach().clone().contiguous() for name, tensor in heads.items()}
            save_file(state, folder / HEADS_FILE)
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


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def below(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Those whose names begin with the prefix, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def saved_heads(folder: Path) -> HeadsSpec | None:
    """The heads that a checkpoint folder holds."""
    file = folder / HEADS_CONFIG
    return HeadsSpec(**json.loads(file.read_text())) if file.exists() else None


def _same_heads(one: HeadsSpec, other: HeadsSpec) -> bool:
    parts = ("value", "q", "twins", "bins")
    same_trunk = (one.trunk == "separate") == (other.trunk == "separate")
    return same_trunk and all(getattr(one, part) == getattr(other, part) for part in parts)


def _unwrapped(model: nn.Module) -> nn.Module:
    return model.get_base_model() if hasattr(model, "peft_config") else model


@torch.no_grad()
def _head_is_linear(lm: nn.Module) -> bool:
    """Whether the logits are a plain projection of the trunk's last hidden state.

    Some models cap or scale their logits; those go through the model's own head, with more memory.
    """
    head, trunk = lm.get_output_embeddings(), getattr(lm, lm.base_model_prefix, None)
    if trunk is None or trunk is lm or getattr(head, "weight", None) is None:
        return False
    config = lm.config.get_text_config()
    if any(getattr(config, name, None) not in (None, 1, 1.0) for name in LOGIT_SETTINGS):
        return False
    was_training = lm.training
    lm.eval()
    probe = torch.arange(8, device=head.weight.device)[None] % head.weight.shape[0]
    expected = lm(input_ids=probe, use_cache=False).logits.float()
    hidden = trunk(input_ids=probe, use_cache=False).last_hidden_state
    actual = nn.functional.linear(hidden.to(head.weight.dtype), head.weight, getattr(head, "bias", None)).float()
    lm.train(was_training)
    return expected.shape == actual.shape and torch.allclose(expected, actual, rtol=1e-2, atol=1e-3)
