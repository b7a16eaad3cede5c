"""Slots: where each lies in the key and value buffers, those of running sequences first, and which one holds a prompt's
beginning."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from lmrl.engines.base import Key, Request
from lmrl.engines.prefixes import WORTHWHILE, common
from lmrl.engines.token_trie import Node
from lmrl.policy.slots import COLUMNS, SlotCache
from lmrl.seeding import stream
from lmrl.trajectories.allowed import AllowedTokens

if TYPE_CHECKING:
    from lmrl.engines.hf import HFEngine


@dataclass(eq=False)
class Slot:
    """A sequence whose keys and values are held, or about to be."""

    tokens: list[int]
    """Prompt and sampled tokens."""
    prompt: tuple[int, ...]
    name: Key
    """Key without the turn."""
    placed: int | None = None
    """Its index among the slots; before it has one, that of the slot that holds its first tokens, if there is one."""
    computed: int = 0
    """Tokens whose keys and values are held."""
    used: int = 0
    """When it was last used, counted in admissions."""
    pending: Request | None = None
    """The request that it completes. None: finished."""
    uniforms: np.ndarray = field(default_factory=lambda: np.zeros(0))
    logprobs: list[float] = field(default_factory=list)
    node: Node | None = None
    """Its node in the trie of the completions that the request allows (None: it allows all)."""
    allowed: list[AllowedTokens | None] = field(default_factory=list)
    version: int = 0

    @property
    def place(self) -> int:
        assert self.placed is not None, "the slot has no place yet"
        return self.placed

    @property
    def request(self) -> Request:
        assert self.pending is not None, "the slot is finished"
        return self.pending

    @property
    def end(self) -> int:
        """Its maximum length in tokens."""
        return len(self.prompt) + len(self.uniforms)


@dataclass(eq=False)
class Join:
    """A request that joins. source: the slot that holds its first `shared` tokens. goes_on: it
    takes over this slot instead of a copy. twin: another one that joins with the same prompt."""

    request: Request
    slot: Slot
    source: Slot | None = None
    shared: int = 0
    goes_on: bool = False
    twin: Join | None = None


class SlotStore:
    """The slots of an engine, in the order of the buffers, and how to find them."""

    def __init__(self, engine: HFEngine):
        self.engine, self.policy = engine, engine.policy
        self.cache: SlotCache | None = None
        self.slots: list[Slot] = []
        self.running = 0
        """How many slots are being completed; these come first."""
        self.by_name: dict[Key, Slot] = {}
        self.by_prompt: dict[tuple[int, ...], Slot] = {}
        self.beginning: Slot | None = None
        """The slot of the beginning that prompts share."""
        self.admissions = 0

    @property
    def buffers(self) -> SlotCache:
        """The cache: the batch makes one when it begins, and `forget` drops it if nothing is running."""
        assert self.cache is not None, "the batch has no cache yet"
        return self.cache

    def forget(self) -> None:
        """Drop what is kept of finished sequences; all buffers if nothing is running."""
        for slot in self.slots[self.running :]:
            self.drop(slot)
        del self.slots[self.running :]
        self.beginning = None
        if not self.running:
            self.cache = None

    def places(self, next_one: Request | None = None) -> int:
        """Maximum sequences while `next_one` runs: the longest decides, because all slots have the same number of
        columns."""
        ends = [slot.end for slot in self.slots[: self.running]]
        if next_one is not None:
            ends.append(len(next_one.tokens) + next_one.generation.max_new_tokens)
        return self.engine.places(max(ends))

    def find(self, request: Request) -> tuple[Slot | None, int, bool]:
        """The slot that holds the most of a request's first tokens, how many, and whether it may go on as this
        request."""
        tokens, most = request.tokens, len(request.tokens) - 1  # the last one is computed in any case, for its logits
        own = self.by_name.get(request.key[:-1])
        if own is not None and own.pending is None:
            shared = common(own.tokens, tokens, min(own.computed, most))
            if shared == own.computed or shared >= WORTHWHILE:
                return own, shared, True
        twin = self.by_prompt.get(tuple(tokens))
        if twin is not None:
            return twin, most, False
        if self.beginning is not None:
            shared = common(self.beginning.tokens, tokens, min(self.beginning.computed, most))
            if shared >= WORTHWHILE:
                return self.beginning, shared, False
        return None, 0, False

    def new_slot(self, request: Request) -> Slot:
        uniforms = stream(*request.key).random(request.generation.max_new_tokens)
        slot = Slot(list(request.tokens), tuple(request.tokens), request.key[:-1], pending=request, uniforms=uniforms)
        slot.version = self.engine.syncs
        slot.node = None if request.allowed is None else request.allowed.root
        return slot

    def make_room(self, joins: list[Join], places: int) -> None:
        """Place the slots of those that join behind the running ones, and drop kept ones that they leave no room
        for."""
        self.admissions += 1
        for join in joins:
            join.slot.used, join.slot.computed = self.admissions, join.shared
            if join.source is not None:  # what it shares is read from there, even if the source is moved or dropped
                join.slot.placed, join.source.used = join.source.place, self.admissions
                if join.goes_on:
                    self.drop(join.source)
        going_on = {join.source for join in joins if join.goes_on}
        kept = [slot for slot in self.slots[self.running :] if slot not in going_on]
        most = places + (self.beginning is not None)
        dropped = self._drop_excess(kept, self.running + len(joins) + len(kept) - most)
        kept = [slot for slot in kept if slot not in dropped]
        distinct = [join.slot for join in joins if join.twin is None]
        twins = [join.slot for join in joins if join.twin is not None]
        self.arrange(self._order(distinct, twins, kept), most)

    def _order(self, distinct: list[Slot], twins: list[Slot], kept: list[Slot]) -> list[Slot]:
        """All slots: the running ones, those that join, the kept ones. Each stays where it is if it can."""
        first, second = self.running, self.running + len(distinct)
        third = second + len(twins)
        zones = [
            (range(first, second), distinct),
            (range(second, third), twins),
            (range(third, third + len(kept)), kept),
        ]
        order = {place: slot for place, slot in enumerate(self.slots[:first])}
        for zone, slots in zones:
            staying = {slot.place: slot for slot in slots if slot.placed in zone}
            moving = iter([slot for slot in slots if slot not in staying.values()])
            order |= {place: staying[place] if place in staying else next(moving) for place in zone}
        return list(order.values())

    def _drop_excess(self, kept: list[Slot], count: int) -> set[Slot]:
        """Drop the `count` kept slots that were least recently used."""
        candidates = sorted((slot for slot in kept if slot is not self.beginning), key=lambda slot: slot.used)
        dropped = set(candidates[: max(count, 0)])
        for slot in dropped:
            self.drop(slot)
        return dropped

    def part(self, first: int, ended: list[bool]) -> None:
        """Move the running slots, from `first` on, that have ended behind those that go on."""
        if not any(ended):
            return
        section = list(zip(self.slots[first : self.running], ended, strict=True))
        finished = [slot for slot, over in section if over]
        going = len(section) - len(finished)
        # Slots beyond the new end move into the places that became free; all others stay where they are.
        moving = iter([slot for slot, over in section[going:] if not over])
        order = [next(moving) if over else slot for slot, over in section[:going]]
        staying = iter([slot for slot, over in section[:going] if over])
        behind = [slot if over else next(staying) for slot, over in section[going:]]
        for slot in finished:
            slot.pending, slot.uniforms, slot.used = None, slot.uniforms[:0], self.admissions
            if self.engine.keeps:
                self.by_name[slot.name] = slot
            else:
                self.drop(slot)
        kept = self.slots[self.running :]
        self.running = first + going
        behind = behind if self.engine.keeps else []
        self.arrange([*self.slots[:first], *order, *behind, *kept], len(self.slots))

    def drop(self, slot: Slot) -> None:
        """Remove a slot from the indexes."""
        if self.by_name.get(slot.name) is slot:
            del self.by_name[slot.name]
        if self.by_prompt.get(slot.prompt) is slot:
            del self.by_prompt[slot.prompt]

    def arrange(self, order: list[Slot], most: int) -> None:
        """Bring the slots into this order, in buffers that have room for them. most: maximum number of slots.

        A buffer that is too small is doubled, up to the size that can be needed.
        """
        cache, limit = self.buffers, self.engine.cache_tokens
        running = [slot for slot in order if slot.pending is not None]
        needed = max(
            (len(slot.tokens) for slot in order if slot.pending is not None or slot is self.beginning), default=0
        )
        longest = max([needed, *[slot.end for slot in running]])
        slots, columns = cache.extent.slots, cache.extent.columns
        if len(order) > slots:
            slots = max(len(order), min(2 * slots, most))
        if needed > columns:
            columns = min(max(needed + COLUMNS, 2 * columns), longest)
        if limit is not None and slots * columns > limit:
            columns = min(columns, longest)
            kept = [slot for slot in order if slot.pending is None]
            long = [slot for slot in kept if slot.computed > columns and slot is not self.beginning]
            dropped = self._drop_excess(long, len(long))
            dropped |= self._drop_excess([slot for slot in kept if slot not in dropped], len(order) - limit // columns)
            order = [slot for slot in order if slot not in dropped]
            slots = max(len(order), min(slots, limit // columns))
        if slots >= cache.extent.slots:
            cache.resize(slots, columns)
        moves = [
            (slot.place, place, slot.computed) for place, slot in enumerate(order) if slot.placed not in (None, place)
        ]
        self.copy([move for move in moves if move[2]])
        for place, slot in enumerate(order):
            slot.placed = place
        self.slots = order
        cache.resize(slots, columns)

    def copy(self, copies: list[tuple[int, int, int]]) -> None:
        """Copy slots: from, to, tokens. All are read before any is written."""
        if copies:
            sources, targets, columns = zip(*copies, strict=True)
            self.buffers.copy(list(sources), list(targets), max(columns), self.policy.device)
