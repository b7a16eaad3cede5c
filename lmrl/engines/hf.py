"""The `hf` engine: sampling with the policy's own transformers model, on any device.

Continuous batching (Yu et al., "Orca", OSDI 2022): sequences are decoded together, one token each at a time; one that
has ended leaves at once, waiting ones take the free places, and what has been computed of a prompt already (earlier
turns, other samples of its group, a beginning that all share) is not computed again: see slot_batch.py. Models that do
not support this are served by waves.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lmrl.engines.base import Engine, Request, Sampling, guidance_of
from lmrl.engines.slot_batch import SlotBatch
from lmrl.engines.token_trie import TokenTrie
from lmrl.engines.waves import Wave
from lmrl.errors import ModelError
from lmrl.policy.cache import SPARE
from lmrl.policy.memory import FailedPass, or_advice
from lmrl.policy.packed_weights import pack_weights, unpack_weights
from lmrl.policy.policy import Policy
from lmrl.policy.slots import slots_fit
from lmrl.recipe import Rollouts
from lmrl.trajectories.batch import Batch, Sequence, contexts_batch

ADVICE = "sampling does not fit into memory: set rollouts.cache_tokens (keys and values held at a time), or lower rollouts.slots"


class HFEngine(Engine):
    """Samples from the policy in place: weights are always the current ones."""

    can_restrict = True

    def __init__(
        self,
        policy: Policy,
        slots: int = 256,
        cache_tokens: int | None = None,
        check: Callable[[], None] = lambda: None,
    ):
        """slots: maximum sequences held at a time, including those kept between two turns. cache_tokens: maximum tokens
        whose keys and values are held. check: called between tokens; may raise to abandon the rollout."""
        super().__init__(policy, check)
        self.slots, self.cache_tokens = slots, cache_tokens
        self.heard: Callable[[list[int]], None] | None = None
        """Called with the tokens just sampled, one for each running sequence."""
        # Determined now, while all ranks are here, because it takes a forward pass.
        fits = slots_fit(policy.causal_lm.config) and policy.holds_slots
        self.batch = SlotBatch(self) if fits else None
        """None: every turn is computed anew (see waves.py)."""
        self._has_begun = False
        """True from the first pass of a batch on until it is idle."""
        self._packed: list[nn.Linear] | None = None
        """Layers that multiply by packed copies of their weights; None before the first pass with these weights."""

    @classmethod
    def build(cls, policy: Policy, options: Rollouts, check: Callable[[], None], folder: Path | None) -> HFEngine:
        return cls(policy, options.slots, options.cache_tokens, check)

    # --------------------------------------------------------------------------------------------------------- sampling
    @property
    def busy(self) -> bool:
        return self.batch is not None and self.batch.busy

    async def advance(self, arrived: list[Request]) -> None:
        scored = [request for request in arrived if request.sampling is None]
        if scored:
            self._restore()
            for request, logprobs in zip(scored, self.score_batch([one.tokens for one in scored]), strict=True):
                request.answer(logprobs)
        arrived = [request for request in arrived if request.sampling is not None]
        batch = self.batch
        if batch is None:
            for sampling in dict.fromkeys(request.generation for request in arrived):
                self._complete_wave([request for request in arrived if request.sampling == sampling], sampling)
            return
        batch.add(arrived)
        if batch.busy:
            with or_advice(ADVICE, lambda: self._failed(batch.requests)), self._decoding():
                batch.advance()

    def _complete_wave(self, requests: list[Request], sampling: Sampling) -> None:
        prompts, keys = [one.tokens for one in requests], [one.key for one in requests]
        with or_advice(ADVICE, lambda: self._failed(requests)), self.policy.decoding():
            self._pack()
            completions = Wave(self, prompts, sampling, keys, [one.allowed for one in requests]).run()
        for request, completion in zip(requests, completions, strict=True):
            completion.version = self.syncs
            request.answer(completion)

    @contextmanager
    def _decoding(self) -> Iterator[None]:
        """Inside, one pass is made. Between passes other code runs, to which neither no_grad nor autocast may apply; what
        is costly to switch off and on stays until `idle`."""
        self._pack()
        if not self._has_begun:
            self.policy.begin_decoding()
            self._has_begun = True
        with torch.no_grad(), self.policy.autocast():
            yield

    def _restore(self) -> None:
        if self._has_begun:
            self.policy.end_decoding()
            self._has_begun = False

    def idle(self) -> None:
        self._restore()

    def abandon(self) -> list[Request]:
        self._restore()
        return self.batch.abandon() if self.batch is not None else []

    def _pack(self) -> None:
        if self._packed is None:
            self._packed = pack_weights(self.policy.causal_lm, self.policy.autocast_dtype)

    def _unpack(self) -> None:
        unpack_weights(self._packed or [])
        self._packed = None

    def sync(self) -> None:
        self._unpack()  # the copies are of the weights before

    def forget(self) -> None:
        if self.batch is not None:
            self.batch.forget()

    def release_memory(self) -> None:
        self.forget()
        self._unpack()

    def close(self) -> None:
        self._unpack()

    def places(self, tokens: int) -> int:
        """The number of sequences of this many tokens that are decoded at a time."""
        if self.cache_tokens is None:
            return self.slots
        return min(self.slots, self.cache_tokens // (tokens + SPARE))

    def validate(self, request: Request) -> None:
        longest, limit = len(request.tokens), self.policy.max_length
        if request.sampling is None:
            if limit is not None and longest > limit:
                raise ModelError(f"{longest} tokens cannot be scored: the model has {limit} positions")
            return
        new = request.sampling.max_new_tokens
        if request.allowed is not None:
            self._validate_restricted(request.allowed, request.sampling)
        needed = longest + new
        context = f"a context of {longest} tokens and max_new_tokens={new} need"
        advice = "lower rollouts.max_new_tokens, or shorten the context (task.prompts.max_tokens, task.history)"
        if limit is not None and needed > limit:
            raise ModelError(f"{context} {needed} positions, but the model has {limit}: {advice}")
        if not self.places(needed):
            raise ModelError(
                f"{context} keys and values for {needed + SPARE} tokens, but rollouts.cache_tokens={self.cache_tokens}: "
                f"raise it, or {advice}"
            )

    def _validate_restricted(self, allowed: TokenTrie, sampling: Sampling) -> None:
        if allowed.longest > sampling.max_new_tokens:
            raise ModelError(
                f"task.allowed_actions: an action has {allowed.longest} tokens, more than rollouts.max_new_tokens="
                f"{sampling.max_new_tokens}: raise that"
            )
        guidance = guidance_of(self.policy, sampling)
        if guidance is not None and guidance.support > 0:
            raise ModelError(
                f"task.allowed_actions: rollouts.support={guidance.support} may leave none of the allowed actions: set it to 0"
            )

    def _failed(self, requests: list[Request]) -> FailedPass | None:
        """The work that ran out of memory; None if all requests have their answers."""
        if not requests:
            return None
        first = requests[0].generation
        options: dict[str, Any] = {"sampling": asdict(first), "keys": [list(request.key) for request in requests]}
        options |= {"slots": self.slots, "cache_tokens": self.cache_tokens}
        prompts = [request.tokens for request in requests]
        shape = (len(prompts), max(map(len, prompts)) + first.max_new_tokens)
        return FailedPass("generate", contexts_batch(prompts), self.policy.microbatch_tokens, shape, options)

    # ---------------------------------------------------------------------------------------------------------- scoring
    def score_batch(self, sequences: Iterable[list[int]]) -> list[list[float]]:
        batch = Batch([_scored(tokens) for tokens in sequences])
        with self.policy.at_temperature(1.0):
            return [part.tolist() for part in self.policy.score(batch)["logprobs"]]


def _scored(tokens: list[int]) -> Sequence:
    """A sequence of which every token but the first is scored."""
    every = torch.tensor(tokens, dtype=torch.long)
    return Sequence(every, torch.arange(len(tokens) - 1), every[1:])
