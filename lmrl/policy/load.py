"""Loading models: a hub name, a folder, a GGUF file, a run of lmrl, a LoRA adapter, or a config built from scratch."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
import transformers
from torch import nn

from lmrl.errors import ModelError, did_you_mean
from lmrl.extras import need
from lmrl.policy import quantized
from lmrl.policy.adapters import ADAPTER_CONFIG, add_adapter, base_of, labels_of_adapter, quiet_peft, with_lora
from lmrl.policy.classifier import Classifier
from lmrl.policy.failures import broken_file, load_failure, refuse_broken, refuse_missing_weights
from lmrl.policy.heads import HeadsSpec
from lmrl.policy.heads_files import saved_heads
from lmrl.policy.language_model import AnyModel, has_adapters, merged_model, without_adapters
from lmrl.policy.merged import merged_tensors
from lmrl.policy.policy import Policy, Reference
from lmrl.policy.quantized import is_quantized, plain_copy, saved_quantization
from lmrl.policy.tokenizers import build_tokenizer
from lmrl.recipe import Model

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

AutoModel: TypeAlias = type[transformers.AutoModelForCausalLM] | type[transformers.AutoModelForSequenceClassification]
CAUSAL_LM = transformers.AutoModelForCausalLM
CLASSIFIER = transformers.AutoModelForSequenceClassification

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
transformers.utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call,unused-ignore]  # typed in some releases
transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call,unused-ignore]  # likewise
logging.getLogger("transformers").setLevel(logging.ERROR)

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
        model, tokenizer = _from_scratch(options, texts, **attention_of(options))
        quantization = None
    else:
        model, tokenizer = _open(
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
        policy.load_heads(start)
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
    model, tokenizer = _open(path, dtype, trust_remote_code, key="policy")
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
        model, tokenizer = _from_scratch(options, texts, CLASSIFIER, num_labels=1)
    else:
        # Read in float32, so that merging an adapter rounds once and not for every matrix twice.
        model, tokenizer = _open(
            origin, "float32", options.trust_remote_code, options.revision, auto=CLASSIFIER, num_labels=1
        )
        if has_adapters(model):
            model = merged_model(model)
        model.to(getattr(torch, options.dtype))
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
    model, tokenizer = _open(
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
        saved, _ = _open(str(folder), trust_remote_code=trust_remote_code, key="checkpoint")
        for parameter, other in zip(policy.model.parameters(), saved.parameters(), strict=True):
            put(parameter, other)
    policy.load_heads(folder, put)


# ---------------------------------------------------------------------------------------------------------------- origins
def _from_scratch(
    options: Model, texts: Callable[[], Iterable[str]], auto: AutoModel = CAUSAL_LM, **more: Any
) -> tuple[PreTrainedModel, Any]:
    """A model of the kind `auto`; more: further settings of its config."""
    tokenizer = build_tokenizer(options.tokenizer, texts())
    settings = dict(options.config or {})
    attention = {name: more.pop(name) for name in ("attn_implementation",) if name in more}
    kind = settings.pop("model_type", None)
    if kind is None:
        raise ModelError("model.config: needs a `model_type` of transformers, for instance llama or gpt2")
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    try:
        known = transformers.AutoConfig.for_model(kind)
        names = {*known.to_dict(), *known.attribute_map}
        for name in set(settings) - names:  # transformers would keep an unknown setting and ignore it
            raise ModelError(f"model.config: '{kind}' has no setting '{name}'{did_you_mean(name, names)}")
        config = transformers.AutoConfig.for_model(kind, **{"vocab_size": len(tokenizer), **ids, **settings, **more})
        if "initializer_range" not in settings:
            spread_by_width(config)
        model: PreTrainedModel = auto.from_config(config, dtype=torch.float32, **attention)  # type: ignore[no-untyped-call,unused-ignore]  # typed in some releases
    except ModelError:
        raise
    except Exception as error:  # transformers raises many kinds for sizes that do not fit together
        raise ModelError(f"model.config: cannot build '{kind}': {' '.join(str(error).split())}") from error
    if config.vocab_size < len(tokenizer):
        raise ModelError(
            f"model.config.vocab_size: {config.vocab_size} is less than the vocabulary of {len(tokenizer)}"
        )
    return model, tokenizer


def spread_by_width(config: transformers.PretrainedConfig) -> None:
    """Draw initial weights with a deviation of 1 / sqrt(width), so that layers keep the size of what they read (LeCun et al.,
    "Efficient BackProp", 1998, section 4.6).

    Transformers' 0.02 is that of a width of 2,500. At a width of 64 queries and keys then hardly differ, and what attention
    reads is learned late or, within the steps of a run, not at all.
    """
    usual, width = getattr(config, "initializer_range", None), getattr(config, "hidden_size", None)
    if usual is not None and width:
        config.initializer_range = max(usual, width**-0.5)


def _open(
    path: str,
    dtype: str = "float32",
    trust_remote_code: bool = False,
    revision: str | None = None,
    trainable: bool = False,
    auto: AutoModel = CAUSAL_LM,
    key: str = "model.path",
    complete: bool = False,
    quantization: str | None = None,
    **more: Any,
) -> tuple[AnyModel, Any]:
    """Model and tokenizer; a peft model if `path` is an adapter, which is then `trainable` or frozen.

    auto: the kind of model. key: what names it, for messages. complete: refuse a model without weights for its head.
    quantization: of the base's linear layers; an adapter's own goes before it. more: further settings of its config.
    """
    folder = newest_checkpoint(path)
    path = str(folder) if folder != Path(path) else path
    if (folder / ADAPTER_CONFIG).exists():
        quantization = saved_quantization(folder) or quantization
        return _open_adapter(folder, dtype, trust_remote_code, trainable, auto, key, complete, quantization, more)
    arguments: dict[str, Any] = {"trust_remote_code": trust_remote_code, "revision": revision or "main"}
    name = path
    if path.endswith(".gguf"):
        need("gguf", f"{key}: '{path}'", ModelError)
        name, arguments = str(folder.parent), {"gguf_file": folder.name}
    precision = quantized.arguments(quantization, getattr(torch, dtype), key)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, **arguments)
        loaded: Any = auto.from_pretrained(  # a pair, for `output_loading_info`
            name,
            dtype=getattr(torch, dtype),
            use_safetensors=True,
            output_loading_info=True,
            **arguments,
            **precision,
            **more,
        )
    except Exception as error:  # missing, torn, not a model, refused remote code: every library raises its own kinds
        raise ModelError(load_failure(path, key, error)) from error
    model: PreTrainedModel = loaded[0]
    found: dict[str, Any] = loaded[1]
    if auto is CAUSAL_LM and _is_classifier(model.config):
        raise ModelError(
            f"{key}: '{path}' is a sequence classifier, such as a reward model, and no language model: name it as "
            "`model` under task.rewards"
        )
    refuse_missing_weights(model, found["missing_keys"], auto is CAUSAL_LM, key, path)
    refuse_broken(model, tokenizer, key, path)
    if complete and found["missing_keys"]:
        raise ModelError(
            f"{key}: '{path}' has no weights for '{sorted(found['missing_keys'])[0]}', so its scores would be random: "
            "train it first, with objective.name=reward_model"
        )
    if path.endswith(".gguf"):
        _forget_quantization(model)
    model.config._name_or_path = path
    quantized.keep_layout(model)
    return model, tokenizer


def _forget_quantization(model: Any) -> None:
    """Of a model read from a GGUF file: its tensors are plain floats, but transformers still calls them quantized."""
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer, model.is_quantized = None, False


def _open_adapter(
    folder: Path,
    dtype: str,
    trust_remote_code: bool,
    trainable: bool,
    auto: AutoModel,
    key: str,
    complete: bool,
    quantization: str | None,
    more: dict[str, Any],
) -> tuple[PeftModel, Any]:
    from peft import PeftConfig, PeftModel, get_peft_model_state_dict, load_peft_weights

    try:
        config = PeftConfig.from_pretrained(str(folder))
    except Exception as error:  # no JSON, or a type that this version does not know
        raise ModelError(load_failure(str(folder), key, error)) from error
    if auto is CLASSIFIER:
        labels = labels_of_adapter(folder)
        if complete and labels is None:
            raise ModelError(
                f"{key}: '{folder}' is an adapter without a classification head, so its scores would be random"
            )
        more = {"num_labels": labels or 1} | more
        config.task_type = None  # an adapter of a language model fits the trunk of a classifier
    elif str(config.task_type).endswith("SEQ_CLS"):
        raise ModelError(f"{key}: '{folder}' is an adapter of a sequence classifier, and of no language model")
    base = base_of(folder, config, key)
    below, tokenizer = _open(
        base, dtype, trust_remote_code, config.revision, auto=auto, key=key, quantization=quantization, **more
    )
    try:
        with quiet_peft():
            model = PeftModel.from_pretrained(below, str(folder), is_trainable=trainable, config=config)
    except Exception as error:  # torn weights, layers or sizes that the base does not have
        if broken_file(folder) is None:
            raise ModelError(
                f"{key}: the adapter '{folder}' does not fit its base '{base}', which may have been replaced: "
                f"{str(error).strip().splitlines()[0]}"
            ) from error
        raise ModelError(load_failure(str(folder), key, error)) from error
    present = set(load_peft_weights(str(folder), device="cpu"))
    expected = get_peft_model_state_dict(model, save_embedding_layers=False)
    if lost := sorted(set(expected) - present):
        raise ModelError(f"{key}: the adapter '{folder}' has no weights for '{lost[0]}', which would be random")
    if (folder / "tokenizer_config.json").exists():
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder))
    return model, tokenizer


def _is_classifier(config: Any) -> bool:
    return any(name.endswith("ForSequenceClassification") for name in config.architectures or ())


def newest_checkpoint(path: str) -> Path:
    """The folder itself, or the final checkpoint of a run."""
    folder = Path(path)
    if not (folder / "stages").is_dir():
        return folder
    from lmrl.run_folders import final_checkpoint

    return final_checkpoint(folder)
