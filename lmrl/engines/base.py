"""The engine interface: token prompts in, sampled tokens with their log-probabilities out.

    completion = await engine.generate(tokens, sampling, key)
    logprobs = await engine.score(tokens)

Provisional: names and arguments of the coroutines may still change. Coroutines that wait at the same time are served
together. Synchronous code calls `complete` and `score_all`, which run the same coroutines.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lmrl.coroutines import in_thread, run, watched
from lmrl.engines.token_trie import TokenTrie
from lmrl.errors import EndpointError, ModelError, RecipeError
from lmrl.policy.passes import Guidance
from lmrl.policy.policy import Policy
from lmrl.recipe import Rollouts
from lmrl.trajectories.allowed import AllowedTokens

Key = tuple[int | str, ...]
Keys = Sequence[Key]
SETTLE = 4
"""Event-loop turns that other coroutines get before the waiting requests are batched."""


@dataclass(frozen=True)
class Sampling:
    """How to sample. temperature 0 is greedy; top_p and top_k restrict the distribution, which is then renormalised."""

    max_new_tokens: int = 64
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop: tuple[str, ...] = ()
    beta: float | None = None
    """Weight of Q, and the least behaviour support of a token, for a policy with Q heads (None: as the policy says)."""
    support: float | None = None

    @classmethod
    def of(cls, options: Rollouts) -> Sampling:
        """The sampling that a recipe's or suite's `rollouts` section describes."""
        return cls(
            options.max_new_tokens,
            options.temperature,
            options.top_p,
            options.top_k,
            tuple(options.stop),
            options.beta,
            options.support,
        )


@dataclass
class Completion:
    """A sampled completion. `tokens` are exactly the sampled ones, an end-of-sequence token included."""

    tokens: list[int]
    logprobs: list[float]
    """Under the distribution each token was drawn from."""
    finish_reason: Literal["eos", "stop", "length"]
    version: int | None = field(default=None, compare=False)
    """Weight syncs of the engine when sampling began (see Engine.syncs)."""
    allowed: list[AllowedTokens | None] = field(default_factory=list)
    """The tokens that each was chosen from, if the request restricted them; else empty."""


@dataclass(eq=False)
class Request:
    """A request that a coroutine waits for. sampling: None to score `tokens` instead of completing them."""

    tokens: list[int]
    sampling: Sampling | None = None
    key: Key = ()
    heard: Callable[[int], None] | None = None
    """Called with each token as it is sampled, by engines that sample token by token (hf)."""
    allowed: TokenTrie | None = None
    """The completions to choose from; None: any."""
    future: asyncio.Future[Any] = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    @property
    def generation(self) -> Sampling:
        """How to complete `tokens`. Not for a request of log-probabilities."""
        assert self.sampling is not None, "a request of log-probabilities samples nothing"
        return self.sampling

    def answer(self, result: Any) -> None:
        if not self.future.done():
            self.future.set_result(result)

    def fail(self, error: BaseException) -> None:
        if isinstance(error, asyncio.CancelledError):
            self.future.cancel()
        elif not self.future.done():
            self.future.set_exception(error)


class Engine:
    """Base of all engines. Subclasses implement `sample`, which completes a batch (or `advance`, if requests may join
    while others are being completed), `score_batch` if they can score, and `sync` and `close` if they hold their own
    copy of the weights.

    policy: whose weights are sampled from. check: called regularly while sampling; may raise to abandon a rollout.
    """

    is_remote = False
    """True if it samples in other processes with its own copy of the weights, so that the policy can train
    meanwhile."""
    can_restrict = False
    """True if it takes requests with `allowed` completions."""

    def __init__(self, policy: Policy, check: Callable[[], None] = lambda: None):
        self.policy, self.check = policy, check
        self.stale = True
        """True if the policy's weights have changed since the last sync; set it after every update."""
        self.syncs = 0
        """Weight syncs so far: the version of the weights that are sampled from, which trajectories carry."""
        self.weights_pinned = False
        self.keeps = True
        """True if what was computed for a request is worth keeping for the next turn, whose key differs only in its
        last part."""
        self._waiting: list[Request] = []
        self._driver: asyncio.Task[None] | None = None
        self._held = 0
        self._news = asyncio.Event()
        """Set when there is a new request, and when no coroutine holds the engine any more."""

    @classmethod
    def build(cls, policy: Policy, options: Rollouts, check: Callable[[], None], folder: Path | None) -> Engine:
        """The engine that a recipe's `rollouts` section describes. A custom engine gets `rollouts.options` as keyword
        arguments.

        folder: the run's, for logs (None: a temporary one).
        """
        return cls(policy, check, **options.options)

    # ------------------------------------------------------------------------------------------------------ coroutines
    async def generate(
        self,
        tokens: Sequence[int],
        sampling: Sampling,
        key: Key,
        heard: Callable[[int], None] | None = None,
        allowed: TokenTrie | None = None,
    ) -> Completion:
        """Complete a prompt with the policy as it is. `key` names the random stream, so that a repeated call draws the
        same tokens whatever else is in the batch (rounding aside). heard: called with each token as it comes, if the
        engine can.
        allowed: the completions to choose from; the policy's probabilities are renormalised over them at every token.

        Raises ModelError for a prompt that does not fit, and for `allowed` if the engine cannot restrict what it
        samples.
        """
        if allowed is not None and not self.can_restrict:
            raise ModelError(
                f"engine '{type(self).__name__}' cannot restrict what it samples: set rollouts.engine=hf, or "
                "task.allowed_actions=false"
            )
        completion: Completion = await self._submit(Request(list(tokens), sampling, key, heard, allowed))
        return completion

    async def score(self, tokens: Sequence[int]) -> list[float]:
        """The log-probability (temperature 1, without Q) of each token but the first, given those before it.

        Raises ModelError for tokens that do not fit, and if the engine cannot score.
        """
        return await self._submit(Request(list(tokens))) if len(tokens) > 1 else []

    @contextmanager
    def held(self) -> Iterator[None]:
        """Inside, nothing is computed: a coroutine that is about to send a request uses this to join the waiting
        batch."""
        self._held += 1
        try:
            yield
        finally:
            self._held -= 1
            if not self._held:
                self._news.set()

    # ------------------------------------------------------------------------------------------------ synchronous calls
    def complete(self, prompts: Sequence[Sequence[int]], sampling: Sampling, keys: Keys) -> list[Completion]:
        """`generate` for each prompt, all of them together, from synchronous code."""
        if not self.weights_pinned:
            self.refresh()
        self.forget()
        pairs = list(zip(prompts, keys, strict=True))
        before, self.keeps = self.keeps, False
        try:
            return run(_gathered([self.generate(tokens, sampling, key) for tokens, key in pairs]))
        finally:
            self.keeps = before

    def score_all(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """`score` for each sequence, all of them together, from synchronous code."""
        return run(_gathered([self.score(tokens) for tokens in sequences]))

    # ---------------------------------------------------------------------------------------------------------- weights
    def refresh(self) -> None:
        """Sync if the policy's weights have changed. With several processes, all must call it."""
        assert not self.weights_pinned, "a rollout would mix two versions of the weights"
        if self.stale:
            self.forget()
            self.sync()
            self.stale = False
            self.syncs += 1

    @contextmanager
    def pinned_weights(self, check: Callable[[], None]) -> Iterator[None]:
        """Keep sampling from the current copy of the weights while the policy changes; `check` replaces the engine's
        own."""
        before, self.check, self.weights_pinned = self.check, check, True
        try:
            yield
        finally:
            self.check, self.weights_pinned = before, False

    def staleness(self, version: int | None) -> int:
        """The number of weight versions that a sample is behind the policy (0 for None, a sample of unknown origin)."""
        return 0 if version is None else self.syncs + self.stale - version

    # ------------------------------------------------------------------------------------------ what subclasses implement
    def sync(self) -> None:
        """Copy the policy's weights to the engine."""

    def forget(self) -> None:
        """Drop what is kept of finished requests, such as keys and values of their tokens."""

    def sample(
        self, prompts: Sequence[list[int]], sampling: Sampling, keys: Keys
    ) -> Sequence[Completion | EndpointError]:
        """Complete a batch; an error in place of a completion fails this request alone. Called from a thread if the
        engine is remote."""
        raise NotImplementedError

    def score_batch(self, sequences: Sequence[list[int]]) -> list[list[float]]:
        """`score` for a batch."""
        raise ModelError(
            f"engine '{type(self).__name__}' cannot score given tokens (it has no score_batch): set rollouts.engine=hf"
        )

    def validate(self, request: Request) -> None:
        """Raise ModelError for a request that cannot be served."""

    @property
    def busy(self) -> bool:
        """True if requests that `advance` was given have no answer yet."""
        return False

    async def advance(self, arrived: list[Request]) -> None:
        """Advance the running requests, and those that have arrived since the last call, by a step."""
        for sampling in dict.fromkeys(request.sampling for request in arrived):
            batch = [request for request in arrived if request.sampling == sampling]
            results = await self._served(batch, sampling)
            for request, result in zip(batch, results, strict=True):
                if isinstance(result, EndpointError):
                    request.fail(result)
                else:
                    request.answer(result)

    def idle(self) -> None:
        """Called when all requests have been answered."""

    def abandon(self) -> Sequence[Request]:
        """Drop the requests that `advance` has not answered yet; returns them."""
        return ()

    def release_memory(self) -> None:
        """Free memory that can be restored quickly; called before an update, when nothing is sampled for a while."""

    def close(self) -> None:
        """Release the engine's memory and processes."""

    def stopped(self, tokens: Sequence[int] | np.ndarray, stop: tuple[str, ...]) -> bool:
        """True if the last of these sampled tokens completed a stop string."""
        # A stop string of n bytes spans at most n tokens, and began no earlier than one token before.
        longest = max(len(text.encode()) for text in stop)
        tail = self.policy.tokenizer.decode(list(tokens[-(longest + 1) :]))
        return any(text in tail for text in stop)

    # ---------------------------------------------------------------------------------------------------------- serving
    async def _submit(self, request: Request) -> Any:
        self._waiting.append(request)
        if self._driver is None or self._driver.done():
            self._news = asyncio.Event()
            self._driver = asyncio.get_running_loop().create_task(self._drive())
        self._news.set()
        try:
            return await request.future
        finally:
            del request  # it holds the error, whose traceback holds this frame

    async def _drive(self) -> None:
        """Serve requests until there are none. An error ends all of them."""
        arrived: list[Request] = []
        try:
            while self._waiting or self.busy:
                await self._settled()
                self.check()
                if not self.busy and not self.weights_pinned:
                    self.refresh()
                if not self._refused():
                    arrived, self._waiting = self._waiting, []
                    await self.advance(arrived)
            self.idle()
        except BaseException as error:
            for request in [*arrived, *self._waiting, *self.abandon()]:
                request.fail(error)
            self._waiting, arrived = [], []
            if isinstance(error, KeyboardInterrupt | SystemExit | asyncio.CancelledError):
                raise

    async def _settled(self) -> None:
        """Let the other coroutines run until they wait, and those that hold the engine until they let go."""
        for _ in range(SETTLE):
            await asyncio.sleep(0)
        while self._held:
            self._news.clear()
            await watched(self._news.wait(), self.check)
            await asyncio.sleep(0)

    def _refused(self) -> bool:
        """Answer waiting requests that cannot be served with their error; True if there were any."""
        waiting, self._waiting = self._waiting, []
        refused = False
        for request in waiting:
            if request.future.done():  # its coroutine was cancelled
                continue
            try:
                self.validate(request)
            except ModelError as error:
                request.fail(error)
                refused = True
            else:
                self._waiting.append(request)
        return refused

    async def _served(self, batch: list[Request], sampling: Sampling | None) -> list[Any]:
        """The results of a batch of one kind."""
        tokens, keys = [request.tokens for request in batch], [request.key for request in batch]
        version = self.syncs

        def work() -> list[Any]:
            if sampling is None:
                return self.score_batch(tokens)
            completions = self.sample(tokens, sampling, keys)
            for completion in completions:
                if isinstance(completion, Completion):
                    completion.version = version
            return list(completions)

        return await watched(in_thread(work), self.check) if self.is_remote else work()


async def _gathered(calls: list[Any]) -> list[Any]:
    return list(await asyncio.gather(*calls))


def before_stop(text: str, stop: Sequence[str]) -> str:
    """The text up to the first of these stop strings."""
    cuts = [text.find(one) for one in stop if one in text]
    return text[: min(cuts)] if cuts else text


def check_has_q(policy: Any, name: str) -> None:
    """Raise RecipeError for `--beta` with a policy without Q values. name: the policy's, as the user wrote it."""
    if policy.guidance is None:
        raise RecipeError(
            f"--beta weighs Q values, but '{name}' has no Q heads: leave it out, or train some, for instance maze/ilql"
        )


def guidance_of(policy: Policy, sampling: Sampling) -> Guidance | None:
    """The guidance of this policy by Q: that of the sampling, else the policy's own; None if it has no Q."""
    own = policy.guidance
    if own is None:
        return None
    beta = own.beta if sampling.beta is None else sampling.beta
    support = own.support if sampling.support is None else sampling.support
    return Guidance(beta, support) if beta > 0 or support > 0 else None
