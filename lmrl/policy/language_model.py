"""The parts of a transformers model that a policy reaches: what is below its adapters, trunk, projection and layers.

transformers and peft name these parts per model, so their own types do not know them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, cast

import torch
from torch import nn

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel
    from typing_extensions import TypeIs

AnyModel: TypeAlias = "PreTrainedModel | PeftModel"
"""A transformers model, or a peft model around one."""


class Projection(Protocol):
    """The module that maps hidden states to logits. It may have a `bias`."""

    @property
    def weight(self) -> torch.Tensor: ...

    def __call__(self, hidden: torch.Tensor, /) -> torch.Tensor: ...

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def register_forward_pre_hook(self, hook: Callable[..., Any], /) -> Any: ...


def has_adapters(model: AnyModel) -> TypeIs[PeftModel]:
    """True for a peft model; does not import peft."""
    return hasattr(model, "peft_config")


def without_adapters(model: AnyModel) -> PreTrainedModel:
    """The transformers model itself. Adapters that are part of its layers stay there."""
    return cast("PreTrainedModel", model.get_base_model()) if has_adapters(model) else model


def merged_model(model: PeftModel) -> PreTrainedModel:
    """The model with its adapter added to its weights; the peft model is taken apart for it."""
    merged: PreTrainedModel = model.merge_and_unload()
    return merged


def trunk_of(model: PreTrainedModel) -> PreTrainedModel:
    """The model below its head."""
    trunk: PreTrainedModel = getattr(model, model.base_model_prefix)
    return trunk


def float32(model: PreTrainedModel) -> PreTrainedModel:
    """This model, with its weights made float32."""
    whole: PreTrainedModel = model.float()  # type: ignore[no-untyped-call,unused-ignore]  # typed in some releases of transformers
    return whole


def projection_of(lm: PreTrainedModel) -> Projection:
    """The projection of hidden states to the vocabulary."""
    projection: Projection = lm.get_output_embeddings()  # type: ignore[no-untyped-call,unused-ignore]  # typed in some releases
    return projection


def embeddings_of(lm: PreTrainedModel) -> torch.Tensor:
    """The matrix of token embeddings, (V, D)."""
    matrix = lm.get_input_embeddings().weight
    assert isinstance(matrix, torch.Tensor)
    return matrix


def decoder_layers(module: nn.Module) -> list[nn.Module]:
    """The layers of a module that transformers marks as not to be split."""
    parts = list(module.modules())
    kinds = {kind for part in parts for kind in getattr(part, "_no_split_modules", None) or ()}
    return [part for part in parts if type(part).__name__ in kinds]
