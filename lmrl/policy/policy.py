"""The policy module: trunk, vocabulary projection, value head and reference behind one forward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lmrl.policy.logprobs import token_logprobs
from lmrl.recipe import Recipe
from lmrl.trajectories.batch import Batch, Microbatch

VALUE_HEAD_FILE = "value_head.safetensors"
REFERENCE_ADAPTER = "reference"
LOGIT_SETTINGS = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")
"""Settings by which models of transformers cap or scale their logits; the probe below finds others."""


@dataclass(frozen=True)
class Want:
    """What a forward pass has to bring back."""

    logprobs: bool = True
    values: bool = False
    detach_values: bool = False
    """Stop the gradient of the values at the trunk."""


@dataclass
class Outputs:
    """Per action token, flat over the microbatch: all tensors have shape (N,)."""

    logprobs: torch.Tensor | None = None
    entropy: torch.Tensor | None = None
    values: torch.Tensor | None = None


class ValueHead(nn.Module):
    """Linear value head, float32, zero at the start so that advantages begin as plain returns."""

    def __init__(self, width: int):
        super().__init__()
        self.linear = nn.Linear(width, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            return self.linear(hidden.to(self.linear.weight.dtype)).squeeze(-1)


class Policy(nn.Module):
    """A causal language model ready for reinforcement learning.

    model: a transformers causal LM, or a peft model around one (adapter `default`).
    reference: None, `"adapter_off"`, `"adapter"` (a second, frozen adapter), or a frozen copy of the model.
    temperature: sampling temperature; log-probabilities are those of the distribution that is sampled from.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, value_head: bool = False, reference: Any = None):
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        width = self.causal_lm.get_input_embeddings().weight.shape[1]
        width = getattr(self.causal_lm.config.get_text_config(), "hidden_size", width)
        self.value_head = ValueHead(width) if value_head else None
        self._reference = reference if reference is None or isinstance(reference, str) else [reference]  # not a child
        self.temperature = 1.0
        self.microbatch_tokens = 4096
        self.autocast_dtype: torch.dtype | None = None
        self.splits_head = _head_is_linear(self.causal_lm)

    def configure(self, recipe: Recipe) -> None:
        """Take over what a recipe says about passes through the model."""
        self.temperature = recipe.rollouts.temperature if recipe.source.name == "rollouts" else 1.0
        self.microbatch_tokens = recipe.training.microbatch_tokens
        if recipe.training.precision == "bfloat16":
            self.autocast_dtype = torch.bfloat16

    # ------------------------------------------------------------------------------------------------------ structure
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
    def forward(self, batch: Microbatch, want: Want = Want()) -> Outputs:
        return self._run(self.causal_lm, batch, want)

    def _run(self, lm: nn.Module, batch: Microbatch, want: Want) -> Outputs:
        with self._autocast():
            # Without padding the attention needs no mask and takes its fastest path.
            mask = None if bool(batch.mask_BT.all()) else batch.mask_BT
            inputs = {"input_ids": batch.tokens_BT, "attention_mask": mask, "use_cache": False}
            if self.splits_head:
                hidden_BTD = getattr(lm, lm.base_model_prefix)(**inputs).last_hidden_state
            else:
                result = lm(**inputs, output_hidden_states=True)
                hidden_BTD = result.hidden_states[-1]
            hidden_ND = hidden_BTD[batch.rows_N, batch.cols_N]
            outputs = Outputs()
            if want.logprobs and self.splits_head:
                head = lm.get_output_embeddings()
                bias = getattr(head, "bias", None)
                outputs.logprobs, outputs.entropy = token_logprobs(
                    hidden_ND, head.weight, bias, batch.targets_N, self.temperature
                )
            elif want.logprobs:
                logits_NV = result.logits[batch.rows_N, batch.cols_N].float() / self.temperature
                logprobs_NV = logits_NV.log_softmax(-1)
                outputs.logprobs = logprobs_NV.gather(1, batch.targets_N[:, None])[:, 0]
                outputs.entropy = -(logprobs_NV.exp() * logprobs_NV).sum(-1)
            if want.values:
                outputs.values = self.value_head(hidden_ND.detach() if want.detach_values else hidden_ND)
        return outputs

    def next_token_logits(self, **inputs: Any) -> torch.Tensor:
        """Logits after the last position of each row, shape (B, V), for decoding; takes what the trunk takes."""
        lm = self.causal_lm
        with self._autocast():
            if not self.splits_head:
                return lm(**inputs).logits[:, -1]
            # Two dimensions: a (B, 1, D) slice would make a batched product that copies the vocabulary matrix B times.
            hidden_BD = getattr(lm, lm.base_model_prefix)(**inputs).last_hidden_state[:, -1]
            return lm.get_output_embeddings()(hidden_BD)

    def _autocast(self):
        dtype = self.autocast_dtype
        return torch.autocast(self.device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)

    @torch.no_grad()
    def score(self, batch: Batch, want: Want = Want(), reference: bool = False) -> dict[str, list[torch.Tensor]]:
        """Evaluate a batch without gradient: for each wanted field, one 1-D tensor a sequence, in the batch's order."""
        fields: dict[str, list[torch.Tensor]] = {}
        was_training = self.training
        self.eval()
        for micro in batch.microbatches(self.microbatch_tokens, self.pad_id):
            micro = micro.to(self.device)
            outputs = self._run_reference(micro, want) if reference else self(micro, want)
            for name in ("logprobs", "entropy", "values"):
                flat = getattr(outputs, name)
                if flat is None:
                    continue
                slots = fields.setdefault(name, [None] * len(batch.sequences))
                for index, part in zip(micro.indices, flat.float().cpu().split(micro.lengths), strict=True):
                    slots[index] = part
        self.train(was_training)
        return fields

    # ------------------------------------------------------------------------------------------------------ reference
    def _run_reference(self, batch: Microbatch, want: Want) -> Outputs:
        with self._reference_model() as lm:
            return self._run(lm, batch, want)

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
    def save(self, folder: Path) -> None:
        """Write an ordinary transformers or peft folder, with the value head beside it."""
        folder.mkdir(parents=True, exist_ok=True)
        if self.is_lora:
            self.model.save_pretrained(folder, selected_adapters=["default"], save_embedding_layers=False)
        else:
            self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        if self.value_head is not None:
            save_file(self.value_head.state_dict(), folder / VALUE_HEAD_FILE)

    def load_value_head(self, folder: Path) -> None:
        """Take over the value head of a checkpoint, where it has one."""
        if self.value_head is not None and (folder / VALUE_HEAD_FILE).exists():
            self.value_head.load_state_dict(load_file(folder / VALUE_HEAD_FILE))


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
