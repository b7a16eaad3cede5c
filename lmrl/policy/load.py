"""Loading models: a hub name, a folder, a GGUF file, a run of lmrl, a LoRA adapter, or a config built from scratch."""

from __future__ import annotations

import copy
import logging
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from torch import nn

from lmrl.errors import DataError, ModelError, did_you_mean
from lmrl.extras import need
from lmrl.local_names import refuse_missing as refuse_missing_path
from lmrl.policy import quantized
from lmrl.policy.classifier import Classifier
from lmrl.policy.failures import broken_file, load_failure
from lmrl.policy.heads import HeadsSpec
from lmrl.policy.merged import merged_tensors
from lmrl.policy.policy import REFERENCE_ADAPTER, Policy, saved_heads
from lmrl.policy.quantized import is_quantized, plain_copy, saved_quantization
from lmrl.policy.tokenizers import build_tokenizer
from lmrl.recipe import Lora, Model

ADAPTER_CONFIG = "adapter_config.json"
CAUSAL_LM = transformers.AutoModelForCausalLM
CLASSIFIER = transformers.AutoModelForSequenceClassification

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
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
    reference: keep the policy as it is now to measure divergence from: the switched-off adapter where the stage begins
    from a bare base model, a second adapter where it begins from an adapter, a frozen copy otherwise.
    """
    if start is None and options.path is None:
        model, tokenizer = _from_scratch(options, texts, **attention_of(options))
        origin = quantization = None
    else:
        origin = str(start) if start else str(newest_checkpoint(options.path))
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
    kind = None
    if options.lora is not None:
        model, kind = _with_lora(model, options.lora, origin, options.revision, reference)
    elif hasattr(model, "peft_config"):
        model = _merged(model)
    if options.lora is None:
        model.requires_grad_(True)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = aligned(parameter.data.float())
    if reference and kind is None:
        kind = copy.deepcopy(model).requires_grad_(False).eval()
    policy = Policy(model, tokenizer, heads=heads, reference=kind if reference else None)
    policy.quantization = quantization
    _match_arithmetic(policy, options.dtype)
    if start is not None:
        policy.load_heads(start)
    return policy


def attention_of(options: Model) -> dict[str, str]:
    """The attention that transformers is to build a model with; nothing where its own choice is kept."""
    return {} if options.attention in ("auto", "varlen") else {"attn_implementation": options.attention}


def _agreed_quantization(options: Model, origin: str) -> str | None:
    """The quantization of a recipe, which has to be that of the adapter it goes on with."""
    found = saved_quantization(newest_checkpoint(origin))
    if options.lora is not None and found not in (None, options.quantization):
        raise ModelError(
            f"model.quantization: '{origin}' is an adapter of a base in {found}, but the recipe asks for "
            f"{options.quantization}: set model.quantization={found}"
        )
    return options.quantization


def _merged(model: nn.Module) -> nn.Module:
    """The model that an adapter makes of its base, in float32 where that was quantized."""
    lm = model.get_base_model()
    if not any(is_quantized(parameter) for parameter in lm.parameters()):
        return model.merge_and_unload()
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
    if start is None and options.path is None:
        model, tokenizer = _from_scratch(options, texts, CLASSIFIER, num_labels=1)
    else:
        origin = str(start) if start else options.path
        # Read in float32, so that merging an adapter rounds once and not for every matrix twice.
        model, tokenizer = _open(
            origin, "float32", options.trust_remote_code, options.revision, auto=CLASSIFIER, num_labels=1
        )
        if hasattr(model, "peft_config"):
            model = model.merge_and_unload()
        model.to(getattr(torch, options.dtype))
    if options.lora is not None:
        model = _add_adapter(model, options.lora, "SEQ_CLS", options.revision)
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

    Raises ModelError where it cannot be loaded, or is a language model without a classification head.
    """
    model, tokenizer = _open(
        path, dtype, trust_remote_code, revision, auto=CLASSIFIER, key="reward model", complete=True
    )
    if hasattr(model, "peft_config"):
        model = model.merge_and_unload()
    return Classifier(model.requires_grad_(False).eval(), tokenizer, max_tokens)


def _match_arithmetic(policy: Policy, dtype: str) -> None:
    if dtype == "bfloat16":
        policy.autocast_dtype = torch.bfloat16
        _keep_input_dtype(policy.model)


def _keep_input_dtype(model: nn.Module) -> None:
    """Beside bfloat16 base weights, compute adapters in bfloat16 too, although their weights are float32.

    Otherwise peft keeps a float32 copy of every adapter's input for the backward pass.
    """
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

        adapter = get_peft_model_state_dict(policy.model, adapter_name="default", save_embedding_layers=False)
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
    options: Model, texts: Callable[[], Iterable[str]], auto: type = CAUSAL_LM, **more: Any
) -> tuple[nn.Module, Any]:
    """A model of the kind `auto`; more: further settings of its config."""
    tokenizer = build_tokenizer(options.tokenizer, texts())
    settings = dict(options.config)
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
        model = auto.from_config(config, dtype=torch.float32, **attention)
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
    auto: type = CAUSAL_LM,
    key: str = "model.path",
    complete: bool = False,
    quantization: str | None = None,
    **more: Any,
) -> tuple[nn.Module, Any]:
    """Model and tokenizer; a peft model where `path` is an adapter, which is then `trainable` or frozen.

    auto: the kind of model. key: what names it, for messages. complete: refuse a model without weights for its head.
    quantization: of the base's linear layers; an adapter's own goes before it. more: further settings of its config.
    """
    folder = newest_checkpoint(path)
    path = str(folder) if folder != Path(path) else path
    if (folder / ADAPTER_CONFIG).exists():
        quantization = saved_quantization(folder) or quantization
        return _open_adapter(folder, dtype, trust_remote_code, trainable, auto, key, complete, quantization, more)
    arguments = {"trust_remote_code": trust_remote_code, "revision": revision or "main"}
    name = path
    if path.endswith(".gguf"):
        need("gguf", f"{key}: '{path}'", ModelError)
        name, arguments = str(folder.parent), {"gguf_file": folder.name}
    precision = quantized.arguments(quantization, getattr(torch, dtype), key)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, **arguments)
        model, found = auto.from_pretrained(
            name,
            dtype=getattr(torch, dtype),
            use_safetensors=True,
            output_loading_info=True,
            **arguments,
            **precision,
            **more,
        )
    except Exception as error:  # missing, torn, not a model, refused remote code: every library has kinds of its own
        raise ModelError(load_failure(path, key, error)) from error
    if auto is CAUSAL_LM and _is_classifier(model.config):
        raise ModelError(
            f"{key}: '{path}' is a sequence classifier, such as a reward model, and no language model: name it as "
            "`model` under task.rewards"
        )
    refuse_missing(model, found["missing_keys"], auto, key, path)
    refuse_broken(model, tokenizer, key, path)
    if complete and found["missing_keys"]:
        raise ModelError(
            f"{key}: '{path}' has no weights for '{sorted(found['missing_keys'])[0]}', so its scores would be random: "
            "train it first, with objective.name=reward_model"
        )
    if path.endswith(".gguf"):  # the tensors are plain floats now, but the config still calls them quantized
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.hf_quantizer, model.is_quantized = None, False
    model.config._name_or_path = path
    quantized.keep_layout(model)
    return model, tokenizer


def refuse_missing(model: nn.Module, missing: Iterable[str], auto: type, key: str, path: str) -> None:
    """Raise ModelError where weights are missing that a fresh head does not explain: they would be random."""
    trunk = f"{model.base_model_prefix}."
    lost = sorted(name for name in missing if auto is CAUSAL_LM or name.startswith(trunk))
    if lost:
        more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
        raise ModelError(
            f"{key}: '{path}' has no weights for '{lost[0]}'{more}, which would be random: the folder is incomplete, "
            "or its config.json describes another model"
        )


def refuse_broken(model: nn.Module, tokenizer: Any, key: str, path: str) -> None:
    """Raise ModelError for weights that are no numbers, and for tokens that have no embedding."""
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not bool(torch.isfinite(parameter.sum())):
            if not bool(torch.isfinite(parameter).all()):  # a sum may be infinite by itself
                raise ModelError(
                    f"{key}: '{path}' has NaN or infinity in '{name}': the file is damaged, or its training broke down"
                )
    embeddings = model.get_input_embeddings()
    rows, tokens = getattr(embeddings, "num_embeddings", None), len(tokenizer)
    if rows is not None and tokens > rows:
        raise ModelError(
            f"{key}: the tokenizer of '{path}' has {tokens} tokens, but the model embeds {rows}: they do not belong "
            "together"
        )


def _open_adapter(
    folder: Path,
    dtype: str,
    trust_remote_code: bool,
    trainable: bool,
    auto: type,
    key: str,
    complete: bool,
    quantization: str | None,
    more: dict[str, Any],
) -> tuple[nn.Module, Any]:
    from peft import PeftConfig, PeftModel, get_peft_model_state_dict, load_peft_weights

    try:
        config = PeftConfig.from_pretrained(str(folder))
    except Exception as error:  # no JSON, or a type that this version does not know
        raise ModelError(load_failure(str(folder), key, error)) from error
    if auto is CLASSIFIER:
        labels = _labels_of_adapter(folder)
        if complete and labels is None:
            raise ModelError(
                f"{key}: '{folder}' is an adapter without a classification head, so its scores would be random"
            )
        more = {"num_labels": labels or 1} | more
        config.task_type = None  # an adapter of a language model fits the trunk of a classifier
    elif str(config.task_type).endswith("SEQ_CLS"):
        raise ModelError(f"{key}: '{folder}' is an adapter of a sequence classifier, and of no language model")
    base = _base_of(folder, config, key)
    model, tokenizer = _open(
        base, dtype, trust_remote_code, config.revision, auto=auto, key=key, quantization=quantization, **more
    )
    try:
        with quiet_peft():
            model = PeftModel.from_pretrained(model, str(folder), is_trainable=trainable, config=config)
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


def _base_of(folder: Path, config: Any, key: str) -> str:
    """The model that an adapter belongs to. Raises ModelError where it is not named, or no longer there."""
    base = config.base_model_name_or_path
    place = f"base_model_name_or_path in {folder / ADAPTER_CONFIG}"
    if not base:
        raise ModelError(f"{key}: the adapter '{folder}' does not say which model it belongs to: set {place}")
    try:
        refuse_missing_path(base, key)
    except DataError as error:
        raise ModelError(
            f"{key}: the adapter '{folder}' belongs to the model '{base}', which is not there: put it back, or set {place} "
            "to where it is now"
        ) from error
    return base


def _labels_of_adapter(folder: Path) -> int | None:
    """Outputs of the classification head that an adapter brings along; None where it brings none."""
    if not (folder / "adapter_model.safetensors").is_file():
        raise ModelError(f"'{folder}' holds no adapter_model.safetensors (pickled weights are not read)")
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        heads = [name for name in file.keys() if name.endswith(("score.weight", "classifier.weight"))]
        return file.get_slice(heads[0]).get_shape()[0] if heads else None


def _is_classifier(config: Any) -> bool:
    return any(name.endswith("ForSequenceClassification") for name in config.architectures or ())


def newest_checkpoint(path: str) -> Path:
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
    if not hasattr(model, "peft_config"):
        return _add_adapter(model, lora, "CAUSAL_LM", revision), "adapter_off"
    found = model.peft_config["default"]
    if (found.r, found.lora_alpha) != (lora.r, lora.alpha):
        raise ModelError(
            f"model.lora: '{origin}' is an adapter with r={found.r} and alpha={found.lora_alpha}, but the recipe asks for "
            f"r={lora.r} and alpha={lora.alpha}: make them equal"
        )
    for name in ("use_rslora", "use_dora", "modules_to_save", "target_parameters"):
        own, asked = getattr(found, name), getattr(lora, name)
        # peft itself adds parameters to those that were named.
        if own != asked if isinstance(asked, bool) else not set(asked or ()) <= set(own or ()):
            raise ModelError(
                f"model.lora.{name}: '{origin}' is an adapter with {name}={own}, but the recipe asks for {asked}: make them equal"
            )
    if reference:
        with quiet_peft():
            model.load_adapter(origin, adapter_name=REFERENCE_ADAPTER, is_trainable=False)
        _tie_copies(model.get_base_model(), REFERENCE_ADAPTER)
        model.set_adapter("default")
    return model, "adapter"


def _add_adapter(model: nn.Module, lora: Lora, task: str, revision: str | None) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    tied = bool(getattr(model.config.get_text_config(), "tie_word_embeddings", False))
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        target_parameters=lora.target_parameters,
        modules_to_save=lora.modules_to_save,
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        # Else the merged model, which has one matrix, would not be what was trained.
        ensure_weight_tying=tied and lora.modules_to_save is not None,
        task_type=task,
        revision=revision,
    )
    _refuse_unknown_layers(model, lora)
    named = [lora.target_modules] if isinstance(lora.target_modules, str) else lora.target_modules
    targets = {name.rpartition(".")[2] for name in named}
    if tied and targets & {"embed_tokens", "lm_head"}:
        raise ModelError(
            "model.lora.target_modules: the model's embeddings and its head are one matrix, to which peft cannot add one "
            "adapter: name embed_tokens under model.lora.modules_to_save"
        )
    try:
        with quiet_peft():
            return get_peft_model(model, config)
    except (ValueError, TypeError) as error:
        raise ModelError(f"model.lora: {str(error).splitlines()[0]}") from error


@contextmanager
def quiet_peft() -> Iterator[None]:
    """Inside, peft does not warn about tied weights, which are seen to here, nor about patterns of its own for experts."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "You have requested `ensure_weight_tying`")
        warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys did not match")
        yield


def _tie_copies(lm: nn.Module, adapter: str) -> None:
    """Let an adapter's copies of embeddings and head share their weights, where the model's do: peft ties the first adapter's
    alone."""
    embeddings, head = lm.get_input_embeddings(), lm.get_output_embeddings()
    if not lm.config.get_text_config().tie_word_embeddings or not hasattr(embeddings, "modules_to_save"):
        return
    source = embeddings.modules_to_save[adapter]
    head.update(adapter, tied_module=source)
    head.modules_to_save[adapter].weight = source.weight


def _refuse_unknown_layers(model: nn.Module, lora: Lora) -> None:
    """Raise ModelError for names that fit nothing: peft would ignore one beside others that fit."""
    layers = [name for name, _ in model.named_modules()]
    parameters = [name for name, _ in model.named_parameters()]
    for key, wanted, names in (
        ("modules_to_save", lora.modules_to_save, layers),
        ("target_parameters", lora.target_parameters, parameters),
    ):
        for name in wanted or ():
            if not any(f".{one}".endswith(f".{name}") for one in names):
                raise ModelError(
                    f"model.lora.{key}: the model has no '{name}'"
                    f"{did_you_mean(name, {one.rpartition('.')[2] for one in names})}"
                )
