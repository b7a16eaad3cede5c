"""Keys and values of sequences in slots, which are kept when a sequence pauses and reused when it continues.

Each layer holds a buffer of (slots, heads, columns, width): token t of a slot's sequence lies in column t, so there is
no padding inside a sequence, positions are columns, and writing a token moves nothing. A pass computes the sequences of
neighbouring slots [first, first + B). Tensors of positions (`Placement`) and two numbers, the rows and the columns in
use, decide what it reads and writes: for a CUDA graph, both numbers can be rounded up to a few sizes, and nothing else
changes in shape. Buffers grow by doubling.

It requires a model whose attention sees all positions and takes a mask of shape (batch, 1, queries, keys).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import DynamicCache
from transformers.cache_utils import Cache as TransformersCache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from lmrl.accelerators import to_device
from lmrl.policy.attention import ATTENTION
from lmrl.policy.passes import Guidance

if TYPE_CHECKING:
    from lmrl.policy.policy import Policy

COLUMNS = 64
"""Minimum columns of the first buffer."""


@dataclass
class Placement:
    """Where a pass reads and writes its keys and values. Suffixes: B sequences, T new tokens of each (right-padded), N
    in all."""

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
    """Index of each token among the sequence's T new tokens."""
    fresh: bool
    """True if nothing precedes the new tokens: attention is then plain causal attention, without a buffer."""
    steps: int
    """T"""

    @property
    def before(self) -> int:
        return 0 if self.fresh else self.width - self.steps


@dataclass
class Extent:
    """What all layers share: the size of their buffers, and the placement of the current or latest pass."""

    slots: int = 0
    columns: int = 0
    placement: Placement = field(init=False)


class SlotLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """Keys and values of one layer."""

    is_sliding = False
    keys: torch.Tensor
    """Like `values`, set once `is_initialized`."""
    values: torch.Tensor

    def __init__(self, extent: Extent) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        # Not the cache: in a cycle of references, buffers would stay in memory until the garbage collector comes.
        self.extent = extent

    # ------------------------------------------------------------------------------------------- methods that transformers calls
    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        for name, like in (("keys", key_states), ("values", value_states)):
            # Zeros: attention multiplies what it masks by zero, and uninitialised memory may not be finite.
            setattr(self, name, like.new_zeros(self.extent.slots, like.shape[1], self.extent.columns, like.shape[3]))
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the new tokens' keys and values; returns those that attention sees."""
        place, device = self.extent.placement, key_states.device.type
        if torch.is_autocast_enabled(device):  # otherwise attention would cast all of them again for every token
            key_states, value_states = (
                part.to(torch.get_autocast_dtype(device)) for part in (key_states, value_states)
            )
        if not self.is_initialized:
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
        return self.extent.placement.before + query_length, 0

    def get_seq_length(self) -> int:
        return self.extent.placement.before

    def get_max_length(self) -> int:
        return -1

    # --------------------------------------------------------------------------------------------- methods that the engine calls
    def copy(self, sources: torch.Tensor, targets: torch.Tensor, columns: int) -> None:
        """Copy the first columns of slots into others. A slot may be both: all are read before any is written."""
        if self.is_initialized:
            self.keys[targets, :, :columns] = self.keys[sources, :, :columns]
            self.values[targets, :, :columns] = self.values[sources, :, :columns]

    def resize(self) -> None:
        """Move the contents into buffers of the cache's size."""
        if not self.is_initialized:
            return
        slots, columns = self.extent.slots, self.extent.columns
        for name in ("keys", "values"):  # one after the other, so that no more than one is held twice
            old = getattr(self, name)
            new = old.new_zeros(slots, old.shape[1], columns, old.shape[3])
            rows, width = min(slots, old.shape[0]), min(columns, old.shape[2])
            new[:rows, :, :width] = old[:rows, :, :width]
            setattr(self, name, new)
            del old


class SlotCache:
    """Keys and values for each trunk that decoding runs: `policy`, and `values` if there are two."""

    def __init__(self, config: Any, two: bool):
        self.extent = Extent()
        self.policy, self.values = (self._layers(config) if wanted else None for wanted in (True, two))

    def _layers(self, config: Any) -> TransformersCache:
        return TransformersCache(layers=[SlotLayer(self.extent) for _ in DynamicCache(config=config).layers])

    @property
    def layers(self) -> list[SlotLayer]:
        caches = [cache for cache in (self.policy, self.values) if cache is not None]
        return [layer for cache in caches for layer in cache.layers if isinstance(layer, SlotLayer)]

    def resize(self, slots: int, columns: int) -> None:
        """Resize to this many slots and columns. What is held beyond them is lost."""
        if (slots, columns) != (self.extent.slots, self.extent.columns):
            self.extent.slots, self.extent.columns = slots, columns
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


def slot_logits(
    policy: Policy, cache: SlotCache, guidance: Guidance | None, first: int, starts: list[int], new: list[list[int]]
) -> torch.Tensor:
    """Compute new tokens of the slots from `first` on, behind the `starts` tokens that each holds; the logits (B, V)
    after the last of each."""
    device, count = policy.device, len(new)
    start_B, new_B = np.array(starts), np.array([len(tokens) for tokens in new])
    steps, width = int(new_B.max()), int((start_B + new_B).max())
    row_N = np.repeat(np.arange(count), new_B)
    step_N = np.zeros(count, dtype=np.int64) if steps == 1 else np.concatenate([np.arange(length) for length in new_B])
    token_BT = np.full((count, steps), policy.pad_id)
    token_BT[row_N, step_N] = [token for tokens in new for token in tokens]
    # Padding repeats the last position: there may be no embeddings for later ones.
    position_BT = start_B[:, None] + np.minimum(np.arange(steps), new_B[:, None] - 1)
    fresh = not start_B.any()

    def tensors(*parts: np.ndarray) -> torch.Tensor:
        return to_device(torch.from_numpy(np.stack(parts)), device)

    slots_N, columns_N, rows_N, steps_N = tensors(row_N + first, start_B[row_N] + step_N, row_N, step_N)
    tokens_BT, positions_BT = tensors(token_BT, position_BT)
    cache.extent.placement = Placement(first, count, width, slots_N, columns_N, rows_N, steps_N, fresh, steps)
    return policy.next_token_logits(
        cache,
        guidance,
        None if steps == 1 else tensors(new_B - 1)[0],
        input_ids=tokens_BT,
        attention_mask=None if fresh else _mask(policy, positions_BT, width),
        position_ids=positions_BT,
    )


def _mask(policy: Policy, position_BT: torch.Tensor, width: int) -> torch.Tensor:
    """The columns that each token sees, those up to its own, (B, 1, T, width)."""
    seen_B1TW = (torch.arange(width, device=position_BT.device) <= position_BT[:, :, None])[:, None]
    lm: Any = policy.causal_lm
    if lm.config._attn_implementation in ("sdpa", ATTENTION):
        return seen_B1TW
    dtype = policy.autocast_dtype or lm.dtype  # eager attention adds its mask to the scores
    return torch.zeros_like(seen_B1TW, dtype=dtype).masked_fill(~seen_B1TW, torch.finfo(dtype).min)
