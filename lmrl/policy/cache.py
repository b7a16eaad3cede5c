"""Keys and values of active rows, in buffers that are allocated ahead and written in place.

transformers' DynamicCache copies every key and value to make room for one more token. Here each layer holds a buffer of
(rows, heads, columns, width) of which a block is in use: rows [0, rows) and columns [start, end). All rows end at the same
column, so that one slice takes the next token of all of them, a shorter row is padded on its left, and distances between
columns are distances between positions, which sliding windows need. A row that has ended gives its place to the last
one, and rows that were computed elsewhere join: no other row moves.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache
from transformers.cache_utils import Cache as TransformersCache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

SPARE = 64
"""Columns that are allocated ahead of need."""


def cache_arguments(model: nn.Module, cache: Any) -> dict[str, Any]:
    """Arguments that give a model's forward a cache (None: no cache)."""
    return {_cache_argument(type(model).forward): cache, "use_cache": cache is not None}


@functools.cache
def _cache_argument(forward: Callable[..., Any]) -> str:
    """The keyword for the cache; transformers 5.24 renamed it."""
    return "cache" if "cache" in inspect.signature(forward).parameters else "past_key_values"


class RowsLayer(CacheLayerMixin):  # type: ignore[no-untyped-call,unused-ignore]  # its hook for subclasses has no types
    """Keys and values of one layer, of which [:rows, :, start:end] are in use.

    Layers with a sliding window keep all columns as well: the mask hides those outside of the window.
    """

    is_sliding = False

    def __init__(self, full: bool = True) -> None:
        """full: whether attention reaches all positions."""
        super().__init__()  # type: ignore[no-untyped-call,unused-ignore]  # typed in some releases of transformers
        self.full = full
        self.rows = self.start = self.end = 0
        self.room = 0
        """Rows to allocate for, if more are expected."""

    @property
    def width(self) -> int:
        return self.end - self.start

    # ------------------------------------------------------------------------------------------- what transformers calls
    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.is_initialized, self.dtype, self.device = True, key_states.dtype, key_states.device

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append columns to all rows; returns the keys and values in use, as views."""
        new, device = key_states.shape[-2], key_states.device.type
        if torch.is_autocast_enabled(device):  # attention would cast all of them again for every token
            key_states, value_states = (
                part.to(torch.get_autocast_dtype(device)) for part in (key_states, value_states)
            )
        if self.keys is None:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states, value_states
            self.rows, self.end = len(key_states), new
        else:
            if self.end + new > self.keys.shape[-2]:
                self._allocate(self, max(self.rows, self.room), self.width, max(new, SPARE))
            for buffer, states in zip(self._buffers(), (key_states, value_states), strict=True):
                buffer[: self.rows, :, self.end : self.end + new] = states
            self.end += new
        used = slice(0, self.rows), slice(None), slice(self.start, self.end)
        keys, values = self._buffers()
        return keys[used], values[used]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.width + query_length, 0

    def get_seq_length(self) -> int:
        return self.width

    def get_max_length(self) -> int:
        return -1

    # --------------------------------------------------------------------------------------------- what the engine calls
    def join(self, other: RowsLayer, rows_K: torch.Tensor) -> None:
        """Append copies of these rows of another layer, their last columns under the last columns here."""
        count = self.rows + len(rows_K)
        if self.keys is None or count > len(self.keys) or other.width > self.end:
            self._allocate(other, max(count, self.room), max(self.width, other.width), SPARE)
        first = self.end - other.width
        for own, theirs in zip(self._buffers(), other._buffers(), strict=True):
            own[self.rows : count, :, first : self.end] = theirs[rows_K, :, other.start : other.end]
        self.rows, self.start = count, min(self.start, first)

    def insert(self, other: RowsLayer, first_R: torch.Tensor) -> None:
        """Copy the single row of another layer into every row, from these columns on (counted from the first in use)."""
        columns_RT = self.start + first_R[:, None] + torch.arange(other.width, device=first_R.device)
        rows_R1 = torch.arange(self.rows, device=first_R.device)[:, None]
        for own, theirs in zip(self._buffers(), other._buffers(), strict=True):
            own[rows_R1, :, columns_RT] = theirs[0, :, other.start : other.end].transpose(0, 1)

    def move(self, sources_K: torch.Tensor, places_K: torch.Tensor) -> None:
        """Copy rows into the places of others."""
        if len(sources_K):
            for buffer in self._buffers():
                buffer[places_K, :, self.start : self.end] = buffer[sources_K, :, self.start : self.end]

    def trim(self, rows: int, width: int) -> None:
        """Go on with the first `rows` rows and the last `width` columns alone."""
        self.rows, self.start = rows, self.end - width

    def _buffers(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values, of a layer that holds some."""
        assert self.keys is not None and self.values is not None
        return self.keys, self.values

    def _allocate(self, like: RowsLayer, rows: int, width: int, ahead: int) -> None:
        """Move what is in use into a new buffer, where it ends at column `width`, with columns to spare behind it."""
        first, used = width - self.width, (slice(0, self.rows), slice(None), slice(self.start, self.end))
        for name in ("keys", "values"):  # one after the other, so that no more than one is held twice
            old, shape = getattr(self, name), getattr(like, name).shape
            # Zeros: attention multiplies what it masks by zero, and the rest of an old buffer may not be finite.
            new = getattr(like, name).new_zeros(rows, shape[1], width + ahead, shape[3])
            if self.rows:
                new[: self.rows, :, first:width] = old[used]
            setattr(self, name, new)
            del old
        self.start, self.end, self.is_initialized = first, width, True


class Cache:
    """Keys and values of active rows, for each trunk that decoding runs: `policy`, and `values` if there are two."""

    def __init__(self, config: Any, two: bool):
        self.config, self.two = config, two
        self.policy, self.values = (new_cache(config) if wanted else None for wanted in (True, two))

    @property
    def caches(self) -> list[TransformersCache]:
        return [cache for cache in (self.policy, self.values) if cache is not None]

    @property
    def takes_rows(self) -> bool:
        """True if rows can join and leave; else all rows of a cache begin and end together."""
        return all(isinstance(layer, RowsLayer) for cache in self.caches for layer in cache.layers)

    @property
    def takes_gaps(self) -> bool:
        """True if masked columns may lie inside a row, which a window measured in columns rules out."""
        return self.takes_rows and all(layer.full for layer in self._layers())

    def expect(self, rows: int) -> None:
        """Allocate for this many rows from now on, if rows can join."""
        if self.takes_rows:
            for layer in self._layers():
                layer.room = rows

    def join(self, other: Cache, rows_K: torch.Tensor) -> None:
        """Append copies of these rows of another cache. Raises TypeError unless `takes_rows`."""
        for mine, theirs in zip(self._layers(), other._layers(), strict=True):
            mine.join(theirs, rows_K)

    def insert(self, other: Cache, first_R: torch.Tensor) -> None:
        """Copy the single row of another cache into every row, from these columns on."""
        for mine, theirs in zip(self._layers(), other._layers(), strict=True):
            mine.insert(theirs, first_R)

    def move(self, sources_K: torch.Tensor, places_K: torch.Tensor) -> None:
        """Copy rows into the places of others."""
        for layer in self._layers():
            layer.move(sources_K, places_K)

    def trim(self, rows: int, width: int) -> None:
        """Go on with the first `rows` rows and the last `width` columns alone."""
        for layer in self._layers():
            layer.trim(rows, width)

    def _layers(self) -> list[RowsLayer]:
        layers = []
        for layer in (layer for cache in self.caches for layer in cache.layers):
            if not isinstance(layer, RowsLayer):
                raise TypeError(f"rows can neither join nor leave a layer of the kind {type(layer).__name__}")
            layers.append(layer)
        return layers


def new_cache(config: Any) -> TransformersCache:
    """A cache of RowsLayers if all layers are attention, else transformers' own."""
    own = DynamicCache(config=config)
    if not own.layers or any(type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) for layer in own.layers):
        return own
    return TransformersCache(layers=[RowsLayer(type(layer) is DynamicLayer) for layer in own.layers])
