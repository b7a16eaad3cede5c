"""What an engine is: token prompts in, sampled tokens with their log-probabilities out."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lmrl import distributed
from lmrl.errors import RunError
from lmrl.policy.policy import Policy
from lmrl.recipe import Rollouts

Keys = Sequence[tuple[int | str, ...]]


@dataclass(frozen=True)
class Sampling:
    """How to sample. temperature 0 is greedy; top_p and top_k restrict the distribution, which is then renormalised."""

    max_new_tokens: int = 64
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop: tuple[str, ...] = ()
    beta: float | None = None
    """Of a policy with Q heads: weight of Q, and the least behaviour support of a token (None: as the policy says)."""
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
    """What an engine sampled. `tokens` are exactly the sampled ones, an end-of-sequence token included."""

    tokens: list[int]
    logprobs: list[float]
    """Under the distribution each token was drawn from."""
    end: Literal["eos", "stop", "length"]


class Engine:
    """Base of all engines: subclasses implement `sample`, and `sync` and `close` where they hold weights of their own.

    policy: whose weights are sampled from. check: called between pieces of work; may raise to abandon a rollout.
    """

    is_remote = False
    """Whether it samples in other processes, with weights of its own, and so can while the policy is trained."""

    def __init__(self, policy: Policy, check: Callable[[], None] = lambda: None):
        self.policy, self.check = policy, check
        self.stale = True
        """Whether the policy's weights have changed since the last sync: set it after every update."""
        self.syncs = 0
        """Weight syncs so far: the version of the weights that are sampled from, which trajectories carry."""
        self.weights_pinned = False

    def generate(self, prompts: Sequence[list[int]], sampling: Sampling, keys: Keys) -> list[Completion]:
        """Complete each prompt with the policy as it is; `keys` name the random stream of each, so that a repeated call
        draws the same."""
        if not self.weights_pinned:
            self.refresh()
        return self.sample(prompts, sampling, keys) if prompts else []

    def refresh(self) -> None:
        """Take over the policy's weights where they have changed. Of several processes, all have to call it."""
        assert not self.weights_pinned, "what is being sampled would come from two versions of the weights"
        if self.stale:
            self.sync()
            self.stale = False
            self.syncs += 1

    @contextmanager
    def pinned_weights(self, check: Callable[[], None]) -> Iterator[None]:
        """Sample with the weights that it has, whatever becomes of the policy's; `check` is called in place of its own."""
        before, self.check, self.weights_pinned = self.check, check, True
        try:
            yield
        finally:
            self.check, self.weights_pinned = before, False

    def staleness(self, version: int | None) -> int:
        """Versions by which the policy is ahead of what was sampled with this one (None, of unknown origin: 0)."""
        return 0 if version is None else self.syncs + self.stale - version

    def sync(self) -> None:
        """Take over the policy's weights."""

    def sample(self, prompts: Sequence[list[int]], sampling: Sampling, keys: Keys) -> list[Completion]:
        raise NotImplementedError

    def release_memory(self) -> None:
        """Called when nothing will be sampled for a while: give back what can be had again quickly."""

    def close(self) -> None:
        """Give back what the engine holds: memory, processes."""

    def stopped(self, tokens: Sequence[int], stop: tuple[str, ...]) -> bool:
        """Whether the last of these sampled tokens has completed a stop string."""
        # A stop string of n bytes spans at most n tokens, and began no earlier than one token before.
        longest = max(len(text.encode()) for text in stop)
        tail = self.policy.tokenizer.decode(list(tokens[-(longest + 1) :]))
        return any(text in tail for text in stop)


def build_engine(
    options: Rollouts, policy: Policy, check: Callable[[], None] = lambda: None, folder: Path | None = None
) -> Engine:
    """The engine that a recipe's `rollouts` section names. folder: the run's, for logs (None: a temporary one)."""
    if options.engine == "vllm" and distributed.size() > 1:
        raise RunError(
            f"rollouts.engine=vllm lives in one process, but this is a launch of {distributed.size()}: set "
            "rollouts.engine=vllm-server, whose servers all of them share"
        )
    if options.engine == "vllm":
        from lmrl.rollouts.vllm import VLLMEngine

        return VLLMEngine(policy, options, check)
    if options.engine == "vllm-server":
        from lmrl.rollouts.vllm_server import VLLMServerEngine

        if not options.server.urls and distributed.size() > int(os.environ.get("LOCAL_WORLD_SIZE", distributed.size())):
            raise RunError(
                "rollouts.engine=vllm-server: servers that a run starts are reached from their own machine alone, and this "
                "launch has several: start them by hand, and name them in rollouts.server.urls (docs/rollouts_server.md)"
            )
        if distributed.is_main():
            engine = VLLMServerEngine(policy, options.server, folder, check)
            distributed.broadcast(engine.shared)
            return engine
        return VLLMServerEngine(policy, options.server, folder, check, shared=distributed.broadcast(None))
    from lmrl.rollouts.hf import HFEngine

    return HFEngine(policy, options.slots, options.cache_tokens, check)
