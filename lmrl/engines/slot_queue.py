"""Requests that wait for a slot: in which order they join the running batch, when, and which of them together."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from lmrl.engines.base import Request, Sampling
from lmrl.engines.slot_store import Join, Slot, SlotStore

REFILL = 8
"""Waiting requests join once there is one per this many running ones, or once one has waited for this many passes: a
pass for several costs less than a pass for each."""


@dataclass(eq=False)
class Waiting:
    request: Request
    kind: Sampling
    rank: tuple[Any, ...]
    since: int
    """Passes made before it arrived."""


class SlotQueue:
    """The requests that have no slot yet, in the order in which they join."""

    def __init__(self, store: SlotStore):
        self.store = store
        self.waiting: list[Waiting] = []

    @property
    def requests(self) -> list[Request]:
        return [one.request for one in self.waiting]

    def of_kind(self, kind: Sampling) -> list[Request]:
        return [one.request for one in self.waiting if one.kind is kind]

    def add(self, requests: Iterable[Request], passes: int) -> None:
        """passes: their number so far."""
        for request in requests:
            _, shared, goes_on = self.store.find(request)
            new = len(request.tokens) - (shared if goes_on else 0)
            order = tuple((isinstance(part, str), part) for part in request.key)
            rank = not goes_on, -new, request.tokens, order
            self.waiting.append(Waiting(request, kind_of(request.generation), rank, passes))
        # Dialogues that go on come first, so that new ones do not take their slots. Then the longest prompts: those
        # that are computed together have similar lengths, equal ones are neighbours, and a lack of memory shows at
        # once.
        self.waiting.sort(key=lambda one: one.rank)

    def discard_answered(self) -> None:
        """Forget requests that nobody waits for any more."""
        self.waiting = [one for one in self.waiting if not one.request.future.done()]

    def is_due(self, kind: Sampling, passes: int) -> bool:
        """True if waiting requests should join now: enough of them find a place, or one has waited for long."""
        mine = [one for one in self.waiting if one.kind is kind]
        if not mine or not self.store.running:
            return bool(mine)
        joining = min(len(mine), self.store.places(mine[0].request) - self.store.running)
        late = passes - min(one.since for one in mine) >= REFILL
        return joining >= max(1, 1 if late else self.store.running // REFILL)

    def choose(self, kind: Sampling) -> tuple[list[Join], int]:
        """Take the requests that join in the next pass, with slots that are not placed yet: distinct prompts first, then
        their twins. Also returns how many sequences may be held with them."""
        store = self.store
        found: dict[tuple[int, ...], Join] = {}
        twins: list[Join] = []
        left: list[Waiting] = []
        claimed: set[Slot] = set()
        width = total = places = 0
        full = False
        for one in self.waiting:
            request = one.request
            if full or one.kind is not kind:
                left.append(one)
                continue
            places = places or store.places(request)
            prompt = tuple(request.tokens)
            if store.running + len(found) + len(twins) >= places:
                full = True
            elif prompt in found:
                twins.append(Join(request, store.new_slot(request), twin=found[prompt]))
                continue
            else:
                source, shared, goes_on = store.find(request)
                if goes_on and source in claimed:
                    source, shared, goes_on = None, 0, False
                new = len(prompt) - shared
                rows, wide = len(found) + 1, max(width, new)
                fits = rows * wide <= store.policy.microbatch_tokens and rows * wide <= 2 * (total + new)
                alike = (shared == 0) == all(join.shared == 0 for join in found.values())
                if not found or (fits and alike):
                    found[prompt] = Join(request, store.new_slot(request), source, shared, goes_on)
                    if goes_on and source is not None:
                        claimed.add(source)
                    width, total = wide, total + new
                    continue
                full = True
            left.append(one)
        self.waiting = left
        return [*found.values(), *twins], places


@functools.cache
def kind_of(sampling: Sampling) -> Sampling:
    """The part of a sampling that all sequences of a pass have in common; the same object for equal ones."""
    return _same(replace(sampling, max_new_tokens=1, stop=()))


@functools.cache
def _same(sampling: Sampling) -> Sampling:
    return sampling
