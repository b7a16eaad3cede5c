"""Continuous batching over slots: sequences join and leave the running batch, and keep their keys and values between
turns.

Slots [0, running) hold the sequences that are being completed; behind them lie finished ones, which may go on: a
request whose key differs from an earlier one's in its last part alone (the turn) resumes its slot, and only the new
tokens are computed. A prompt that is held already (other samples of a group) is copied, and so is a beginning that
prompts share. What was least recently used is dropped first.

The order of everything depends on prompts, sampling, keys, and on which requests wait at the same time, never on the
clock.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from lmrl.engines.base import Completion, Request, Sampling, guidance_of
from lmrl.engines.sample_token import restrict, sample_token
from lmrl.engines.slot_store import Join, Slot, SlotStore
from lmrl.policy.slots import SlotCache, slot_logits
from lmrl.seeding import stream

if TYPE_CHECKING:
    from lmrl.engines.hf import HFEngine

REFILL = 8
"""Waiting requests join once there is one per this many running ones, or once one has waited for this many passes: a
pass for several costs less than a pass for each."""
WORTHWHILE = 16
"""Minimum tokens of a shared beginning for it to be computed once, or copied from a sequence that continues
differently."""


@dataclass(eq=False)
class Waiting:
    request: Request
    kind: Sampling
    rank: tuple[Any, ...]
    since: int
    """Passes made before it arrived."""


class SlotBatch(SlotStore):
    """The running batch of an engine: which requests join, and what is sampled for them."""

    def __init__(self, engine: HFEngine):
        super().__init__(engine)
        self.joining: list[Request] = []
        self.waiting: list[Waiting] = []
        self.kind = kind_of(Sampling())
        self.passes = 0
        self.computed_tokens = 0
        """Prompt tokens that went through the model, without padding."""

    @property
    def busy(self) -> bool:
        return bool(self.running or self.waiting)

    def add(self, requests: Iterable[Request]) -> None:
        for request in requests:
            kind = kind_of(request.generation)
            _, shared, goes_on = self._source(request)
            new = len(request.tokens) - (shared if goes_on else 0)
            order = tuple((isinstance(part, str), part) for part in request.key)
            rank = not goes_on, -new, request.tokens, order
            self.waiting.append(Waiting(request, kind, rank, self.passes))
        # Dialogues that go on come first, so that new ones do not take their slots. Then the longest prompts: those
        # that are computed together have similar lengths, equal ones are neighbours, and a lack of memory shows at
        # once.
        self.waiting.sort(key=lambda one: one.rank)

    def advance(self) -> None:
        """One pass: of prompts that join, or of the latest token of each running sequence."""
        self.waiting = [one for one in self.waiting if not one.request.future.done()]
        gone = [slot.request.future.done() for slot in self.slots[: self.running]]
        if any(gone):
            self._part(0, gone)
        if not self.running and self.waiting:
            self._begin(self.waiting[0].kind)
        if self._due():
            self._admit()
        elif self.running:
            self._decode()
        self.passes += 1

    @property
    def requests(self) -> list[Request]:
        """Those that have no answer yet."""
        # Not by place: if memory runs out while slots are moved, places and states may disagree.
        running = [slot.pending for slot in self.slots if slot.pending is not None]
        return running + self.joining + [one.request for one in self.waiting]

    def abandon(self) -> list[Request]:
        left = self.requests
        self.running, self.joining, self.waiting = 0, [], []
        self.forget()
        return left

    # -------------------------------------------------------------------------------------------------------- admission
    def _begin(self, kind: Sampling) -> None:
        """Complete requests of this kind from now on: all tokens of a pass are sampled with the same settings."""
        self.kind, self.guidance = kind, guidance_of(self.policy, kind)
        self.eos = self.policy.eos_ids
        two = self.guidance is not None and self.policy.values.trunk is not None
        if self.cache is None or two != (self.cache.values is not None):
            self.forget()
            self.cache = SlotCache(self.policy.causal_lm.config, two)

    def _due(self) -> bool:
        """True if waiting requests should join now: enough of them find a place, or one has waited for long."""
        if not self.waiting:
            return False
        mine = [one for one in self.waiting if one.kind is self.kind]
        if not mine or not self.running:
            return bool(mine)
        joining = min(len(mine), self._places(mine[0].request) - self.running)
        late = self.passes - min(one.since for one in mine) >= REFILL
        return joining >= max(1, 1 if late else self.running // REFILL)

    def _places(self, next_one: Request | None = None) -> int:
        """Maximum sequences while `next_one` runs: the longest decides, because all slots have the same number of
        columns."""
        ends = [slot.end for slot in self.slots[: self.running]]
        if next_one is not None:
            ends.append(len(next_one.tokens) + next_one.generation.max_new_tokens)
        return self.engine.places(max(ends))

    def _source(self, request: Request) -> tuple[Slot | None, int, bool]:
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

    def _admit(self) -> None:
        """Compute the next waiting prompts and sample their first tokens; those that have not ended keep running."""
        self._compute_beginning()
        joins, places = self._choose()
        self.joining = [join.request for join in joins]
        self.admissions += 1
        self._make_room(joins, places)
        joins.sort(key=lambda join: join.slot.place)
        distinct = [join for join in joins if join.twin is None]
        self._copy(
            [
                (join.source.place, join.slot.place, join.shared)
                for join in distinct
                if join.source is not None and not join.goes_on
            ]
        )
        logits_UV = self._pass([join.slot for join in distinct])
        self._copy(
            [(join.twin.slot.place, join.slot.place, len(join.slot.tokens)) for join in joins if join.twin is not None]
        )
        for join in joins:
            join.slot.computed = len(join.slot.tokens)
            self.by_prompt[join.slot.prompt] = join.slot
        rows = {join: row for row, join in enumerate(distinct)}
        source_R = [rows[join.twin or join] for join in joins]
        if len(distinct) < len(joins):
            logits_UV = logits_UV[torch.tensor(source_R, device=logits_UV.device)]
        first, self.running, self.joining = self.running, self.running + len(joins), []
        self._part(first, self._take([join.slot for join in joins], logits_UV))

    def _choose(self) -> tuple[list[Join], int]:
        """The requests that join in the next pass, whose slots are not placed yet: distinct prompts first, then their
        twins."""
        found: dict[tuple[int, ...], Join] = {}
        twins: list[Join] = []
        left: list[Waiting] = []
        claimed: set[Slot] = set()
        width = total = places = 0
        full = False
        for one in self.waiting:
            request = one.request
            if full or one.kind is not self.kind:
                left.append(one)
                continue
            places = places or self._places(request)
            prompt = tuple(request.tokens)
            if self.running + len(found) + len(twins) >= places:
                full = True
            elif prompt in found:
                twins.append(Join(request, self._new_slot(request, prompt), twin=found[prompt]))
                continue
            else:
                source, shared, goes_on = self._source(request)
                if goes_on and source in claimed:
                    source, shared, goes_on = None, 0, False
                new = len(prompt) - shared
                rows, wide = len(found) + 1, max(width, new)
                fits = rows * wide <= self.policy.microbatch_tokens and rows * wide <= 2 * (total + new)
                alike = (shared == 0) == all(join.shared == 0 for join in found.values())
                if not found or (fits and alike):
                    found[prompt] = Join(request, self._new_slot(request, prompt), source, shared, goes_on)
                    if goes_on and source is not None:
                        claimed.add(source)
                    width, total = wide, total + new
                    continue
                full = True
            left.append(one)
        self.waiting = left
        return [*found.values(), *twins], places

    def _new_slot(self, request: Request, prompt: tuple[int, ...]) -> Slot:
        uniforms = stream(*request.key).random(request.generation.max_new_tokens)
        slot = Slot(list(prompt), prompt, request.key[:-1], pending=request, uniforms=uniforms)
        slot.version = self.engine.syncs
        slot.node = None if request.allowed is None else request.allowed.root
        return slot

    def _compute_beginning(self) -> None:
        """Compute the beginning that the waiting prompts share, if no slot holds it and it is worth a pass."""
        mine = [one.request for one in self.waiting if one.kind is self.kind]
        if self.beginning is None and shared_beginning([request.tokens for request in mine]) < WORTHWHILE:
            return
        fresh = [request.tokens for request in mine if self._source(request)[0] is None]
        shared = shared_beginning(fresh) if fresh else 0
        if shared < WORTHWHILE:
            return
        others = [slot for slot in self.slots if slot is not self.beginning]
        self.beginning = Slot(fresh[0][:shared], (), ())
        self._arrange([*others, self.beginning], len(others) + 1)
        self._pass([self.beginning])
        self.beginning.computed = shared

    # ----------------------------------------------------------------------------------------------------------- passes
    def _decode(self) -> None:
        """One more token for each running sequence."""
        slots = self.slots[: self.running]
        if max(len(slot.tokens) for slot in slots) > self.buffers.extent.columns:
            self._arrange(list(self.slots), len(self.slots))
        logits_RV = self._pass(slots)
        for slot in slots:
            slot.computed += 1
        self._part(0, self._take(slots, logits_RV))

    def _pass(self, slots: list[Slot]) -> torch.Tensor:
        """Compute the tokens of neighbouring slots that are not computed yet; the logits (B, V) after the last of
        each."""
        new = [slot.tokens[slot.computed :] for slot in slots]
        if not slots[0].logprobs:
            self.computed_tokens += sum(map(len, new))
        starts = [slot.computed for slot in slots]
        return slot_logits(self.policy, self.buffers, self.guidance, slots[0].place, starts, new)

    def _take(self, slots: list[Slot], logits_RV: torch.Tensor) -> list[bool]:
        """Draw a token for each of these slots, and answer the requests that have ended; returns which have."""
        if logits_RV.device.type == "mps":  # has no float64, which sampling needs
            logits_RV = logits_RV.cpu()
        uniforms_R = np.array([slot.uniforms[len(slot.logprobs)] for slot in slots])
        allowed = [None if slot.node is None else slot.node.allowed for slot in slots]
        logits_RV = restrict(logits_RV.float(), allowed)
        tokens, logprobs = (part.tolist() for part in sample_token(logits_RV, self.kind, uniforms_R))
        ended = []
        for slot, token, logprob in zip(slots, tokens, logprobs, strict=True):
            slot.tokens.append(token)
            slot.logprobs.append(logprob)
            if slot.node is not None:
                slot.allowed.append(slot.node.allowed)
                slot.node = slot.node.children[token]
            if slot.request.heard is not None:
                slot.request.heard(token)
            reason = self._reason(slot, token)
            ended.append(reason is not None)
            if reason is not None:
                sampled = slot.tokens[-len(slot.logprobs) :]
                slot.request.answer(Completion(sampled, slot.logprobs, reason, slot.version, slot.allowed))
        if self.engine.heard is not None:
            self.engine.heard(tokens)
        return ended

    def _reason(self, slot: Slot, token: int) -> Literal["eos", "stop", "length"] | None:
        """Why a sequence ends with this token; None: it goes on."""
        count, stop = len(slot.logprobs), slot.request.generation.stop
        if slot.node is not None:
            return "eos" if slot.node.complete else None
        if token in self.eos:
            return "eos"
        if stop and self.engine.stopped(slot.tokens[-count:], stop):
            return "stop"
        return "length" if count == len(slot.uniforms) else None

    def _part(self, first: int, ended: list[bool]) -> None:
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
                self._drop(slot)
        kept = self.slots[self.running :]
        self.running = first + going
        behind = behind if self.engine.keeps else []
        self._arrange([*self.slots[:first], *order, *behind, *kept], len(self.slots))


@functools.cache
def kind_of(sampling: Sampling) -> Sampling:
    """The part of a sampling that all sequences of a pass have in common; the same object for equal ones."""
    return _same(replace(sampling, max_new_tokens=1, stop=()))


@functools.cache
def _same(sampling: Sampling) -> Sampling:
    return sampling


def common(one: Sequence[int], other: Sequence[int], most: int) -> int:
    """Length of the common prefix of two sequences, at most `most`."""
    if one[:most] == other[:most]:
        return most
    return next(place for place in range(most) if one[place] != other[place])


def shared_beginning(prompts: Sequence[list[int]]) -> int:
    """Length of the common prefix of distinct prompts, shorter than each of them; 0 if all are equal."""
    first, last = min(prompts), max(prompts)  # all others lie between them, and share what these two do
    if first == last:
        return 0
    return common(first, last, min(map(len, prompts)) - 1)
