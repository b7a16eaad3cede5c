"""Opening models and tokenizers: of a hub name, a folder, a GGUF file, a run of lmrl, a LoRA adapter, or a config."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
import transformers

from lmrl.accelerators import quieten_deepspeed
from lmrl.errors import ModelError, did_you_mean
from lmrl.extras import need
from lmrl.policy import quantized
from lmrl.policy.adapters import ADAPTER_CONFIG, base_of, labels_of_adapter, quiet_peft
from lmrl.policy.failures import broken_file, load_failure, refuse_broken, refuse_missing_weights
from lmrl.policy.language_model import AnyModel
from lmrl.policy.quantized import saved_quantization
from lmrl.policy.tokenizers import build_tokenizer
from lmrl.recipe import Model

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

AutoModel: TypeAlias = type[transformers.AutoModelForCausalLM] | type[transformers.AutoModelForSequenceClassification]
CAUSAL_LM = transformers.AutoModelForCausalLM
CLASSIFIER = transformers.AutoModelForSequenceClassification

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
quieten_deepspeed()
transformers.utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call,unused-ignore]  # typed in some releases
transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call,unused-ignore]  # likewise
logging.getLogger("transformers").setLevel(logging.ERROR)


def build_model(
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


def open_model(
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
    below, tokenizer = open_model(
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
