"""Decoder layers that run another way in some passes: checkpointed in updates, compiled except for single tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from lmrl.errors import ModelError
from lmrl.policy.language_model import decoder_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Layers:
    """The layers of a policy's trunks. At first they run as transformers has them."""

    def __init__(self) -> None:
        self._checkpointed: list[GradientCheckpointingLayer] = []
        self._compiled: dict[nn.Module, Callable[..., Any]] = {}

    def checkpoint(self, trunks: Iterable[PreTrainedModel], asked: bool) -> None:
        """Make the layers of these trunks recompute their activations in updates. asked: refuse trunks that cannot."""
        for trunk in trunks:
            if not trunk.supports_gradient_checkpointing:
                if not asked:
                    continue
                kind = type(trunk).__name__
                raise ModelError(f"training.gradient_checkpointing: {kind} does not support it; leave it out")
            trunk.gradient_checkpointing_enable()  # type: ignore[no-untyped-call,unused-ignore]  # typed in some releases
            layers = (module for module in trunk.modules() if isinstance(module, GradientCheckpointingLayer))
            self._checkpointed += [layer for layer in layers if layer.gradient_checkpointing]

    def compile(self, trunks: Iterable[PreTrainedModel]) -> None:
        """Run the layers of these trunks compiled from now on."""
        layers = [layer for trunk in trunks for layer in decoder_layers(trunk)]
        self._compiled = {layer: torch.compile(layer.forward, dynamic=True) for layer in layers}
        self.run_compiled(True)

    def run_checkpointed(self, wanted: bool) -> None:
        """Checkpointed layers look at their mode: in training they keep no activations and take no cache."""
        for layer in self._checkpointed:
            layer.training = wanted

    def run_compiled(self, wanted: bool) -> None:
        """False for passes of single tokens: layers are compiled for whole sequences."""
        for layer, compiled in self._compiled.items():
            if wanted:
                layer.forward = compiled
            else:
                del layer.forward
