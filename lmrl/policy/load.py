"""Policies and classifiers, loaded to be trained or used, and the weights of a checkpoint."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lmrl.errors import ModelError
from lmrl.policy.adapters import add_adapter, with_lora
from lmrl.policy.classifier import Classifier
from lmrl.policy.heads import HeadsSpec
from lmrl.policy.heads_files import saved_heads
from lmrl.policy.language_model import AnyModel, has_adapters, merged_model, without_adapters
from lmrl.policy.merged import merged_tensors
from lmrl.policy.origins import CLASSIFIER, build_model, newest_checkpoint, open_model
from lmrl.policy.policy import Policy, Reference
from lmrl.policy.quantized import is_quantized, plain_copy, saved_quantization
from lmrl.recipe import Model

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

ALIGNMENT = 64
"""Bytes to a multiple of which torch places what it allocates on a CPU."""


def load_policy(
    options: Model,
    start: Path | None = None,
    texts: Callable[[], Iterable[str]] = lambda: (),
    heads: HeadsSpec | None = None,
    reference: bool = False,
) -> Policy:
    """The policy of a stage as it begins.

    start: checkpoint folder of the stage before, instead of `model.path` or `model.config`.
    texts: called for the vocabulary of a model from scratch.
    reference: keep the policy as it is now to measure divergence from: the switched-off adapter if the stage begins
    from a bare base model, a second adapter if it begins from an adapter, a frozen copy otherwise.
    """
    origin = _origin(options, start)
    model: AnyModel
    if origin is None:
        model, tokenizer = build_model(options, texts, **attention_of(options))
        quantization = None
    else:
        model, tokenizer = open_model(
            origin,
            options.dtype,
            options.trust_remote_code,
            options.revision,
            trainable=options.lora is not None,
            quantization=options.quantization,
            **attention_of(options),
        )
        quantization = _agreed_quantization(options, origin)
    if options.chat_template is not None:
        tokenizer.chat_template = options.chat_template
    kept: Reference | None = None
    if options.lora is not None:
        model, kept = with_lora(model, options.lora, origin, options.revision, reference)
    else:
        model = _merged(model) if has_adapters(model) else model
        model.requires_grad_(True)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = aligned(parameter.data.float())
    if reference and kept is None:
        kept = _frozen(copy.deepcopy(without_adapters(model)))
    policy = Policy(model, tokenizer, heads=heads, reference=kept if reference else None)
    policy.quantization = quantization
    _match_arithmetic(policy, options.dtype)
    if start is not None:
        policy.heads_are_new = not policy.load_heads(start)
    return policy


def _origin(options: Model, start: Path | None) -> str | None:
    """The name or folder that a stage's policy is read from; None: it is built from a config."""
    if start is not None:
        return str(start)
    return None if options.path is None else str(newest_checkpoint(options.path))


def attention_of(options: Model) -> dict[str, Any]:
    """Settings for the attention that transformers builds a model with; none if its own choice is kept."""
    return {} if options.attention in ("auto", "varlen") else {"attn_implementation": options.attention}


def _agreed_quantization(options: Model, origin: str) -> str | None:
    """The quantization of a recipe, which must be that of the adapter it continues with."""
    found = saved_quantization(newest_checkpoint(origin))
    if options.lora is not None and found not in (None, options.quantization):
        raise ModelError(
            f"model.quantization: '{origin}' is an adapter of a base in {found}, but the recipe asks for "
            f"{options.quantization}: set model.quantization={found}"
        )
    return options.quantization


def _merged(model: PeftModel) -> PreTrainedModel:
    """The model that an adapter makes of its base, in float32 if that was quantized."""
    lm = without_adapters(model)
    if not any(is_quantized(parameter) for parameter in lm.parameters()):
        return merged_model(model)
    return plain_copy(lm, {name: tensor.float() for name, tensor in merged_tensors(lm)})


def aligned(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor at an address as torch's own: weights read from a file lie anywhere in it, and kernels round by the address, so that
    a resumed run would differ from one that was never stopped."""
    return tensor if tensor.data_ptr() % ALIGNMENT == 0 else tensor.clone()


def open_policy(path: str, dtype: str = "float32", trust_remote_code: bool = False) -> Policy:
    """Any saved policy, with its Q heads if it has any, to be used and not trained: hub name, folder, GGUF file, adapter or run."""
    model, tokenizer = open_model(path, dtype, trust_remote_code, key="policy")
    folder = newest_checkpoint(path)
    heads = saved_heads(folder)
    policy = Policy(model.requires_grad_(False), tokenizer, heads if heads is not None and heads.q else None)
    policy.load_heads(folder)
    policy.requires_grad_(False)
    policy.quantization = saved_quantization(folder)
    _match_arithmetic(policy, dtype)
    return policy


def load_classifier(
    options: Model,
    start: Path | None = None,
    texts: Callable[[], Iterable[str]] = lambda: (),
    max_tokens: int | None = None,
) -> Classifier:
    """A model with one output for a whole text, to be trained as a reward model; arguments as for `load_policy`.

    The head is new unless the model is such a classifier already. A LoRA adapter of an earlier stage is merged.
    max_tokens: of a longer text the end is kept.
    """
    origin = options.path if start is None else str(start)
    model: AnyModel
    if origin is None:
        model, tokenizer = build_model(options, texts, CLASSIFIER, num_labels=1, **attention_of(options))
    else:
        # Read in float32, so that merging an adapter rounds once and not for every matrix twice.
        model, tokenizer = open_model(
            origin,
            "float32",
            options.trust_remote_code,
            options.revision,
            auto=CLASSIFIER,
            num_labels=1,
            **attention_of(options),
        )
        if has_adapters(model):
            model = merged_model(model)
        model.to(getattr(torch, options.dtype))
    if options.chat_template is not None:
        tokenizer.chat_template = options.chat_template
    if options.lora is not None:
        model = add_adapter(model, options.lora, "SEQ_CLS", options.revision)
    else:
        model.requires_grad_(True)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if options.dtype == "bfloat16":
        _keep_input_dtype(model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise ModelError(
            f"model.path: the tokenizer of '{options.path}' has neither a pad nor an eos token to pad with"
        )
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    return Classifier(model, tokenizer, max_tokens)


def open_classifier(
    path: str,
    dtype: str = "float32",
    max_tokens: int | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Classifier:
    """A saved sequence classifier (hub name, folder or adapter), to be asked and not trained.

    Raises ModelError if it cannot be loaded, or is a language model without a classification head.
    """
    model, tokenizer = open_model(
        path, dtype, trust_remote_code, revision, auto=CLASSIFIER, key="reward model", complete=True
    )
    model = merged_model(model) if has_adapters(model) else model
    return Classifier(_frozen(model), tokenizer, max_tokens)


def _frozen(model: PreTrainedModel) -> PreTrainedModel:
    """This model, to be used and not trained."""
    frozen: PreTrainedModel = model.requires_grad_(False).eval()  # type: ignore[no-untyped-call,unused-ignore]  # typed in some releases of transformers
    return frozen


def _match_arithmetic(policy: Policy, dtype: str) -> None:
    if dtype == "bfloat16":
        policy.autocast_dtype = torch.bfloat16
        _keep_input_dtype(policy.model)


def _keep_input_dtype(model: nn.Module) -> None:
    """Beside bfloat16 base weights, compute adapters in bfloat16 too, although their weights are float32.

    Otherwise peft keeps a float32 copy of every adapter's input for the backward pass.
    """
    module: Any
    for module in model.modules():
        if hasattr(module, "cast_input_dtype_enabled"):
            module.cast_input_dtype_enabled = False


@torch.no_grad()
def load_weights(
    policy: Policy,
    folder: Path,
    trust_remote_code: bool = False,
    put: Callable[[torch.Tensor, torch.Tensor], Any] = torch.Tensor.copy_,
) -> None:
    """Copy the weights of a checkpoint of this very policy into it, bit by bit.

    put: writes a saved tensor, whole, into one of the policy's, which may be a piece of it.
    """
    if policy.is_lora:
        from peft import get_peft_model_state_dict, load_peft_weights

        adapter = get_peft_model_state_dict(policy.adapted_model, adapter_name="default", save_embedding_layers=False)
        own = policy.model.state_dict() | adapter
        for name, other in load_peft_weights(str(folder), device="cpu").items():
            put(own[name], other)
    else:
        saved, _ = open_model(str(folder), trust_remote_code=trust_remote_code, key="checkpoint")
        for parameter, other in zip(policy.model.parameters(), saved.parameters(), strict=True):
            put(parameter, other)
    policy.load_heads(folder, put)
