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

from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from lmrl.engines.base import Completion, Request, Sampling, guidance_of
from lmrl.engines.prefixes import WORTHWHILE, shared_beginning
from lmrl.engines.sample_token import restrict, sample_token
from lmrl.engines.slot_queue import SlotQueue, kind_of
from lmrl.engines.slot_store import Slot, SlotStore
from lmrl.policy.slots import SlotCache, slot_logits

if TYPE_CHECKING:
    from lmrl.engines.hf import HFEngine


class SlotBatch:
    """The running batch of an engine: requests join it from its queue, and get slots of its store."""

    def __init__(self, engine: HFEngine):
        self.engine, self.policy = engine, engine.policy
        self.store = SlotStore(engine)
        self.queue = SlotQueue(self.store)
        self.joining: list[Request] = []
        self.kind = kind_of(Sampling())
        self.passes = 0
        self.computed_tokens = 0
        """Prompt tokens that went through the model, without padding."""

    @property
    def busy(self) -> bool:
        return bool(self.store.running or self.queue.waiting)

    @property
    def running(self) -> list[Slot]:
        return self.store.slots[: self.store.running]

    def add(self, requests: Iterable[Request]) -> None:
        self.queue.add(requests, self.passes)

    def advance(self) -> None:
        """One pass: of prompts that join, or of the latest token of each running sequence."""
        self.queue.discard_answered()
        self.store.part(0, [slot.request.future.done() for slot in self.running])
        if not self.store.running and self.queue.waiting:
            self._begin(self.queue.waiting[0].kind)
        if self.queue.is_due(self.kind, self.passes):
            self._admit()
        elif self.store.running:
            self._decode()
        self.passes += 1

    @property
    def requests(self) -> list[Request]:
        """Those that have no answer yet."""
        # Not by place: if memory runs out while slots are moved, places and states may disagree.
        running = [slot.pending for slot in self.store.slots if slot.pending is not None]
        return running + self.joining + self.queue.requests

    def abandon(self) -> list[Request]:
        left = self.requests
        self.store.running, self.joining, self.queue.waiting = 0, [], []
        self.forget()
        return left

    def forget(self) -> None:
        """Drop what is kept of finished sequences; all buffers if nothing is running."""
        self.store.forget()

    # -------------------------------------------------------------------------------------------------------- admission
    def _begin(self, kind: Sampling) -> None:
        """Complete requests of this kind from now on: all tokens of a pass are sampled with the same settings."""
        self.kind, self.guidance = kind, guidance_of(self.policy, kind)
        self.eos = self.policy.eos_ids
        two = self.guidance is not None and self.policy.values.trunk is not None
        store = self.store
        if store.cache is None or two != (store.cache.values is not None):
            store.forget()
            store.cache = SlotCache(self.policy.causal_lm.config, two)

    def _admit(self) -> None:
        """Compute the next waiting prompts and sample their first tokens; those that have not ended keep running."""
        self._compute_beginning()
        store = self.store
        joins, places = self.queue.choose(self.kind)
        self.joining = [join.request for join in joins]
        store.make_room(joins, places)
        joins.sort(key=lambda join: join.slot.place)
        distinct = [join for join in joins if join.twin is None]
        logits_UV = self._pass([join.slot for join in distinct])
        store.copy(
            [(join.twin.slot.place, join.slot.place, len(join.slot.tokens)) for join in joins if join.twin is not None]
        )
        for join in joins:
            join.slot.computed = len(join.slot.tokens)
            store.by_prompt[join.slot.prompt] = join.slot
        rows = {join: row for row, join in enumerate(distinct)}
        source_R = [rows[join.twin or join] for join in joins]
        if len(distinct) < len(joins):
            logits_UV = logits_UV[torch.tensor(source_R, device=logits_UV.device)]
        first, store.running, self.joining = store.running, store.running + len(joins), []
        store.part(first, self._take([join.slot for join in joins], logits_UV))

    def _compute_beginning(self) -> None:
        """Compute the beginning that the waiting prompts share, if no slot holds it and it is worth a pass."""
        store, mine = self.store, self.queue.of_kind(self.kind)
        if store.beginning is None and shared_beginning([request.tokens for request in mine]) < WORTHWHILE:
            return
        fresh = [request.tokens for request in mine if store.find(request)[0] is None]
        shared = shared_beginning(fresh) if fresh else 0
        if shared < WORTHWHILE:
            return
        others = [slot for slot in store.slots if slot is not store.beginning]
        beginning = store.beginning = Slot(fresh[0][:shared], (), ())
        store.arrange([*others, beginning], len(others) + 1)
        self._pass([beginning])
        beginning.computed = shared

    # ----------------------------------------------------------------------------------------------------------- passes
    def _decode(self) -> None:
        """One more token for each running sequence."""
        slots, store = self.running, self.store
        if max(len(slot.tokens) for slot in slots) > store.buffers.extent.columns:
            store.arrange(list(store.slots), len(store.slots))
        logits_RV = self._pass(slots)
        for slot in slots:
            slot.computed += 1
        store.part(0, self._take(slots, logits_RV))

    def _pass(self, slots: list[Slot]) -> torch.Tensor:
        """Compute the tokens of neighbouring slots that are not computed yet; the logits (B, V) after the last of
        each."""
        new = [slot.tokens[slot.computed :] for slot in slots]
        if not slots[0].logprobs:
            self.computed_tokens += sum(map(len, new))
        starts = [slot.computed for slot in slots]
        return slot_logits(self.policy, self.store.buffers, self.guidance, slots[0].place, starts, new)

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
