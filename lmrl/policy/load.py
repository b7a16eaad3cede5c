"""Loading policies: a hub name, a folder, a GGUF file, a run of lmrl, a LoRA adapter, or a config built from scratch."""

from __future__ import annotations

import copy
import json
import logging
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from lmrl.errors import ModelError, did_you_mean
from lmrl.policy.heads import HeadsSpec
from lmrl.policy.policy import REFERENCE_ADAPTER, Policy, saved_heads
from lmrl.policy.tokenizers import build_tokenizer
from lmrl.recipe import Lora, Model

ADAPTER_CONFIG = "adapter_config.json"

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
logging.getLogger("transformers").setLevel(logging.ERROR)


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
    reference: keep the policy as it is now to measure divergence from: the switched-off adapter where the stage begins
    from a bare base model, a second adapter where it begins from an adapter, a frozen copy otherwise.
    """
    if start is None and options.path is None:
        model, tokenizer = _from_scratch(options, texts)
        origin = None
    else:
        origin = str(start) if start else options.path
        model, tokenizer = _open(
            origin, options.dtype, options.trust_remote_code, options.revision, trainable=options.lora is not None
        )
    kind = None
    if options.lora is not None:
        model, kind = _with_lora(model, options.lora, origin, options.revision, reference)
    elif hasattr(model, "peft_config"):
        model = model.merge_and_unload()
    if options.lora is None:
        model.requires_grad_(True)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if reference and kind is None:
        kind = copy.deepcopy(model).requires_grad_(False).eval()
    policy = Policy(model, tokenizer, heads=heads, reference=kind if reference else None)
    _match_arithmetic(policy, options.dtype)
    if start is not None:
        policy.load_heads(start)
    return policy


def open_policy(path: str, dtype: str = "float32", trust_remote_code: bool = False) -> Policy:
    """Any saved policy, with its Q heads if it has any, to be used and not trained: hub name, folder, GGUF file, adapter or run."""
    model, tokenizer = _open(path, dtype, trust_remote_code)
    folder = _checkpoint_of(path)
    heads = saved_heads(folder)
    policy = Policy(model.requires_grad_(False), tokenizer, heads if heads is not None and heads.q else None)
    policy.load_heads(folder)
    policy.requires_grad_(False)
    _match_arithmetic(policy, dtype)
    return policy


def _match_arithmetic(policy: Policy, dtype: str) -> None:
    """Beside bfloat16 base weights, compute adapters in bfloat16 too, although their weights are float32.

    Otherwise peft keeps a float32 copy of every adapter's input for the backward pass.
    """
    if dtype == "bfloat16":
        policy.autocast_dtype = torch.bfloat16
        for module in policy.model.modules():
            if hasattr(module, "cast_input_dtype_enabled"):
                module.cast_input_dtype_enabled = False


@torch.no_grad()
def load_weights(policy: Policy, folder: Path, trust_remote_code: bool = False) -> None:
    """Copy the weights of a checkpoint of this very policy into it, bit by bit."""
    if policy.is_lora:
        from peft import load_peft_weights, set_peft_model_state_dict

        set_peft_model_state_dict(policy.model, load_peft_weights(str(folder), device="cpu"), adapter_name="default")
    else:
        saved, _ = _open(str(folder), trust_remote_code=trust_remote_code)
        for own, other in zip(policy.model.parameters(), saved.parameters(), strict=True):
            own.copy_(other)
    policy.load_heads(folder)


# ---------------------------------------------------------------------------------------------------------------- origins
def _from_scratch(options: Model, texts: Callable[[], Iterable[str]]) -> tuple[nn.Module, Any]:
    tokenizer = build_tokenizer(options.tokenizer, texts())
    settings = dict(options.config)
    kind = settings.pop("model_type", None)
    if kind is None:
        raise ModelError("model.config: needs a `model_type` of transformers, for instance llama or gpt2")
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    try:
        known = transformers.AutoConfig.for_model(kind)
        names = {*known.to_dict(), *known.attribute_map}
        for name in set(settings) - names:  # transformers would keep an unknown setting and ignore it
            raise ModelError(f"model.config: '{kind}' has no setting '{name}'{did_you_mean(name, names)}")
        config = transformers.AutoConfig.for_model(kind, **{"vocab_size": len(tokenizer), **ids, **settings})
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except ModelError:
        raise
    except Exception as error:  # transformers raises many kinds for sizes that do not fit together
        raise ModelError(f"model.config: cannot build '{kind}': {' '.join(str(error).split())}") from error
    if config.vocab_size < len(tokenizer):
        raise ModelError(
            f"model.config.vocab_size: {config.vocab_size} is less than the vocabulary of {len(tokenizer)}"
        )
    return model, tokenizer


def _open(
    path: str,
    dtype: str = "float32",
    trust_remote_code: bool = False,
    revision: str | None = None,
    trainable: bool = False,
) -> tuple[nn.Module, Any]:
    """Model and tokenizer; a peft model where `path` is an adapter, which is then `trainable` or frozen."""
    folder = _checkpoint_of(path)
    path = str(folder) if folder != Path(path) else path
    if (folder / ADAPTER_CONFIG).exists():
        from peft import PeftModel

        adapter = json.loads((folder / ADAPTER_CONFIG).read_text())
        base = adapter["base_model_name_or_path"]
        model, tokenizer = _open(base, dtype, trust_remote_code, adapter.get("revision"))
        model = PeftModel.from_pretrained(model, path, is_trainable=trainable)
        if (folder / "tokenizer_config.json").exists():
            tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        return model, tokenizer
    arguments = {"trust_remote_code": trust_remote_code, "revision": revision or "main"}
    name = path
    if path.endswith(".gguf"):
        name, arguments = str(folder.parent), {"gguf_file": folder.name}
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, **arguments)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            name, dtype=getattr(torch, dtype), use_safetensors=True, **arguments
        )
    except Exception as error:  # missing, torn, not a model, refused remote code: every library has kinds of its own
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(f"model.path: '{path}' cannot be loaded: {reason}") from error
    if path.endswith(".gguf"):  # the tensors are plain floats now, but the config still calls them quantized
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.hf_quantizer, model.is_quantized = None, False
    model.config._name_or_path = path
    return model, tokenizer


def _checkpoint_of(path: str) -> Path:
    """The folder itself, or the final checkpoint of a run."""
    folder = Path(path)
    if not (folder / "stages").is_dir():
        return folder
    from lmrl.run import final_checkpoint

    return final_checkpoint(folder)


def _with_lora(
    model: nn.Module, lora: Lora, origin: str | None, revision: str | None, reference: bool
) -> tuple[nn.Module, str | None]:
    """Add an adapter, or go on with the one that is there; and say which kind of reference that allows."""
    from peft import LoraConfig, get_peft_model

    if not hasattr(model, "peft_config"):
        config = LoraConfig(
            r=lora.r,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            target_modules=lora.target_modules,
            task_type="CAUSAL_LM",
            revision=revision,
        )
        try:
            return get_peft_model(model, config), "adapter_off"
        except ValueError as error:
            raise ModelError(f"model.lora: {str(error).splitlines()[0]}") from error
    found = model.peft_config["default"]
    if (found.r, found.lora_alpha) != (lora.r, lora.alpha):
        raise ModelError(
            f"model.lora: '{origin}' is an adapter with r={found.r} and alpha={found.lora_alpha}, but the recipe asks for "
            f"r={lora.r} and alpha={lora.alpha}: make them equal"
        )
    if reference:
        model.load_adapter(origin, adapter_name=REFERENCE_ADAPTER, is_trainable=False)
        model.set_adapter("default")
    return model, "adapter"
