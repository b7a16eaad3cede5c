"""LoRA adapters on a model: new ones, existing ones, and their folders."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from safetensors import safe_open
from torch import nn

from lmrl.errors import DataError, ModelError, did_you_mean
from lmrl.local_names import refuse_missing
from lmrl.policy.language_model import AnyModel, has_adapters
from lmrl.policy.policy import REFERENCE_ADAPTER
from lmrl.recipe import Lora

if TYPE_CHECKING:
    from peft import PeftModel

ADAPTER_CONFIG = "adapter_config.json"
ALL = "all-linear"
"""The default of `model.lora.target_modules`: an adapter that a stage continues may have fewer layers."""
INSIDE = (".base_layer", ".lora_", ".original_module", ".modules_to_save.")
"""Parts of the names of modules inside those that peft puts in a layer's place."""


def with_lora(
    model: AnyModel, lora: Lora, origin: str | None, revision: str | None, reference: bool
) -> tuple[PeftModel, Literal["adapter_off", "adapter"]]:
    """Add an adapter, or continue with the existing one; returns the kind of reference that this allows.

    origin: the adapter's folder.
    """
    if not has_adapters(model):
        return add_adapter(model, lora, "CAUSAL_LM", revision), "adapter_off"
    found: Any = model.peft_config["default"]
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
    if lora.target_modules != ALL and _adapted_layers(model) != _named_layers(model, lora.target_modules):
        raise ModelError(
            f"model.lora.target_modules: '{origin}' is an adapter of {_listed(found.target_modules)}, but the recipe asks for "
            f"{_listed(lora.target_modules)}: make them equal"
        )
    _set_dropout(model, lora.dropout)
    if reference:
        assert origin is not None  # an adapter was read from somewhere
        with quiet_peft():
            model.load_adapter(origin, adapter_name=REFERENCE_ADAPTER, is_trainable=False)
        _tie_copies(model.get_base_model(), REFERENCE_ADAPTER)
        model.set_adapter("default")
    return model, "adapter"


def _adapted_layers(model: PeftModel) -> set[str]:
    """Names of the layers that have an adapter, without those that only have one on a parameter."""
    from peft.tuners.lora import LoraLayer
    from peft.tuners.lora.layer import ParamWrapper

    layers = model.get_base_model().named_modules()
    kinds = ((name, type(layer)) for name, layer in layers)
    return {
        name.replace(".base_layer", "")
        for name, kind in kinds
        if issubclass(kind, LoraLayer) and not issubclass(kind, ParamWrapper)
    }


def _named_layers(model: PeftModel, targets: str | list[str]) -> set[str]:
    """Names of the layers that `target_modules` names, in a model that has adapters."""
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    config = LoraConfig(target_modules=targets)
    names = (name for name, _ in model.get_base_model().named_modules())
    return {
        name for name in names if not any(part in name for part in INSIDE) and check_target_module_exists(config, name)
    }


def _listed(names: Any) -> str:
    return names if isinstance(names, str) else ", ".join(sorted(names or ()))


def _set_dropout(model: PeftModel, share: float) -> None:
    """Give an existing adapter the dropout of the recipe, which is no part of what it computes otherwise."""
    config: Any = model.peft_config["default"]
    config.lora_dropout = share
    for layer in model.modules():
        found: Any = getattr(layer, "lora_dropout", ())
        if "default" in found:
            found["default"] = nn.Dropout(share) if share else nn.Identity()


def add_adapter(model: Any, lora: Lora, task: str, revision: str | None) -> PeftModel:
    from peft import LoraConfig, PeftModel, get_peft_model

    tied = bool(getattr(model.config.get_text_config(), "tie_word_embeddings", False))
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # peft accepts any number
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        target_parameters=lora.target_parameters,
        modules_to_save=lora.modules_to_save,
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        # Otherwise the merged model, which has a single matrix, would differ from the trained one.
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
            adapted = get_peft_model(model, config)
    except (ValueError, TypeError) as error:
        raise ModelError(f"model.lora: {str(error).splitlines()[0]}") from error
    assert isinstance(adapted, PeftModel)  # and no mixed model, which is made on request only
    return adapted


@contextmanager
def quiet_peft() -> Iterator[None]:
    """Silence peft's warnings about what is handled here or by peft itself: tied weights, GPT-2's transposed layers, its own
    patterns for experts, and a name that transformers 5.24 has changed."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "You have requested `ensure_weight_tying`")
        warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys did not match")
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to False")
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        yield


def _tie_copies(lm: Any, adapter: str) -> None:
    """Tie an adapter's copies of embeddings and head if the model's are tied: peft does so only for the first
    adapter."""
    embeddings, head = lm.get_input_embeddings(), lm.get_output_embeddings()
    if not lm.config.get_text_config().tie_word_embeddings or not hasattr(embeddings, "modules_to_save"):
        return
    source = embeddings.modules_to_save[adapter]
    head.update(adapter, tied_module=source)
    head.modules_to_save[adapter].weight = source.weight


def _refuse_unknown_layers(model: nn.Module, lora: Lora) -> None:
    """Raise ModelError for names that match nothing: peft ignores such a name if others match."""
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


def base_of(folder: Path, config: Any, key: str) -> str:
    """The model that an adapter belongs to. Raises ModelError if it is not named, or no longer exists."""
    base = config.base_model_name_or_path
    place = f"base_model_name_or_path in {folder / ADAPTER_CONFIG}"
    if not base:
        raise ModelError(f"{key}: the adapter '{folder}' does not say which model it belongs to: set {place}")
    try:
        refuse_missing(base, key)
    except DataError as error:
        raise ModelError(
            f"{key}: the adapter '{folder}' belongs to the model '{base}', which is not there: put it back, or set {place} "
            "to where it is now"
        ) from error
    return str(base)


def labels_of_adapter(folder: Path) -> int | None:
    """Outputs of the classification head that an adapter includes; None if it has none."""
    if not (folder / "adapter_model.safetensors").is_file():
        raise ModelError(f"'{folder}' holds no adapter_model.safetensors (pickled weights are not read)")
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        heads = [name for name in file.keys() if name.endswith(("score.weight", "classifier.weight"))]
        return file.get_slice(heads[0]).get_shape()[0] if heads else None
