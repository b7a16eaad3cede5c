"""Keys and values of sequences in slots, which stay when a sequence pauses and are taken up again when it goes on.

Each layer holds a buffer of (slots, heads, columns, width): token t of a slot's sequence lies in column t, so there is no
padding inside of a sequence, positions are columns, and writing a token moves nothing. A pass computes the sequences of
neighbouring slots [first, first + B). What it reads and writes is decided by tensors of positions (`Placement`) and by two numbers,
the rows and the columns in use: for a CUDA graph, both can be rounded up to a few sizes, and nothing else changes in shape.
Buffers grow by doubling.

This takes a model whose attention sees all positions and honours a mask of (batch, 1, queries, keys).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import Cache as TransformersCache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

COLUMNS = 64
"""Columns of the first buffer at least."""


@dataclass
class Placement:
    """Where a pass finds and puts its keys and values. Suffixes: B sequences, T new tokens of each (right-padded), N in all."""

    first: int
    """Slot of the first sequence."""
    count: int
    width: int
    """Columns in use after the pass."""
    slots_N: torch.Tensor
    columns_N: torch.Tensor
    rows_N: torch.Tensor
    """Rows of the pass, from 0."""
    steps_N: torch.Tensor
    """Which of its T tokens."""
    fresh: bool
    """True if nothing precedes the new tokens: attention then needs no buffer, and is plainly causal."""
    steps: int
    """T"""

    @property
    def before(self) -> int:
        return 0 if self.fresh else self.width - self.steps


class SlotLayer(CacheLayerMixin):
    """Keys and values of one layer."""

    is_sliding = False

    def __init__(self, cache: SlotCache) -> None:
        super().__init__()
        self.cache = cache

    # ------------------------------------------------------------------------------------------- what transformers calls
    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.is_initialized, self.dtype, self.device = True, key_states.dtype, key_states.device
        for name, like in (("keys", key_states), ("values", value_states)):
            # Zeros: attention multiplies what it masks by zero, and uninitialised memory may not be finite.
            setattr(self, name, like.new_zeros(self.cache.slots, like.shape[1], self.cache.columns, like.shape[3]))

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the new tokens' keys and values; returns those that attention sees."""
        place, device = self.cache.placement, key_states.device.type
        if torch.is_autocast_enabled(device):  # attention would cast all of them again for every token
            key_states, value_states = (
                part.to(torch.get_autocast_dtype(device)) for part in (key_states, value_states)
            )
        if self.keys is None:
            self.lazy_initialization(key_states, value_states)
        for buffer, new in ((self.keys, key_states), (self.values, value_states)):
            if place.steps == 1:
                buffer[place.slots_N, :, place.columns_N] = new[:, :, 0]
            else:
                buffer[place.slots_N, :, place.columns_N] = new[place.rows_N, :, place.steps_N]
        if place.fresh:
            return key_states, value_states
        used = slice(place.first, place.first + place.count), slice(None), slice(0, place.width)
        return self.keys[used], self.values[used]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cache.placement.before + query_length, 0

    def get_seq_length(self) -> int:
        return self.cache.placement.before

    def get_max_length(self) -> int:
        return -1

    # --------------------------------------------------------------------------------------------- what the engine calls
    def copy(self, sources: torch.Tensor, targets: torch.Tensor, columns: int) -> None:
        """Copy the first columns of slots into others. A slot may be both: all are read before any is written."""
        if self.keys is not None:
            self.keys[targets, :, :columns] = self.keys[sources, :, :columns]
            self.values[targets, :, :columns] = self.values[sources, :, :columns]

    def resize(self) -> None:
        """Move what is held into buffers of the cache's size."""
        if self.keys is None:
            return
        slots, columns = self.cache.slots, self.cache.columns
        for name in ("keys", "values"):  # one after the other, so that no more than one is held twice
            old = getattr(self, name)
            new = old.new_zeros(slots, old.shape[1], columns, old.shape[3])
            rows, width = min(slots, old.shape[0]), min(columns, old.shape[2])
            new[:rows, :, :width] = old[:rows, :, :width]
            setattr(self, name, new)
            del old


class SlotCache:
    """Keys and values for each trunk that decoding runs: `policy`, and `values` where there are two."""

    def __init__(self, config: Any, two: bool):
        self.slots = self.columns = 0
        self.placement: Placement | None = None
        self.policy, self.values = (self._layers(config) if wanted else None for wanted in (True, two))

    def _layers(self, config: Any) -> TransformersCache:
        return TransformersCache(layers=[SlotLayer(self) for _ in DynamicCache(config=config).layers])

    @property
    def layers(self) -> list[SlotLayer]:
        return [layer for cache in (self.policy, self.values) if cache is not None for layer in cache.layers]

    def resize(self, slots: int, columns: int) -> None:
        """Have room for so many slots and columns. What is held beyond them is lost."""
        if (slots, columns) != (self.slots, self.columns):
            self.slots, self.columns = slots, columns
            for layer in self.layers:
                layer.resize()

    def copy(self, sources: list[int], targets: list[int], columns: int, device: torch.device) -> None:
        """Copy the first columns of slots into others. A slot may be both: all are read before any is written."""
        if sources and columns:
            places = torch.tensor(sources, device=device), torch.tensor(targets, device=device)
            for layer in self.layers:
                layer.copy(*places, columns)


def slots_fit(config: Any) -> bool:
    """True if all layers of a model are attention that sees all positions."""
    layers = DynamicCache(config=config).layers
    return bool(layers) and all(type(layer) is DynamicLayer for layer in layers)
