"""The engine interface: token prompts in, sampled tokens with their log-probabilities out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

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
    end: Literal["eos", "stop", "length"]


class Engine:
    """Base of all engines: subclasses implement `sample`, and `sync` and `close` if they hold their own copy of the
    weights.

    policy: whose weights are sampled from. check: called regularly while sampling; may raise to abandon a rollout.
    """

    is_remote = False
    """True if it samples in other processes with its own copy of the weights, so that the policy can train
    meanwhile."""

    def __init__(self, policy: Policy, check: Callable[[], None] = lambda: None):
        self.policy, self.check = policy, check
        self.stale = True
        """True if the policy's weights have changed since the last sync; set it after every update."""
        self.syncs = 0
        """Weight syncs so far: the version of the weights that are sampled from, which trajectories carry."""
        self.weights_pinned = False

    @classmethod
    def build(cls, policy: Policy, options: Rollouts, check: Callable[[], None], folder: Path | None) -> Engine:
        """The engine that a recipe's `rollouts` section describes. One of one's own gets `rollouts.options` as keyword arguments.

        folder: the run's, for logs (None: a temporary one).
        """
        return cls(policy, check, **options.options)

    def generate(self, prompts: Sequence[list[int]], sampling: Sampling, keys: Keys) -> list[Completion]:
        """Complete each prompt with the policy as it is; `keys` name the random stream of each, so that a repeated call
        draws the same."""
        if not self.weights_pinned:
            self.refresh()
        return self.sample(prompts, sampling, keys) if prompts else []

    def refresh(self) -> None:
        """Sync if the policy's weights have changed. With several processes, all must call it."""
        assert not self.weights_pinned, "a rollout would mix two versions of the weights"
        if self.stale:
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
        """How many weight versions lie between a sample with this version and the policy (None, of unknown origin:
        0)."""
        return 0 if version is None else self.syncs + self.stale - version

    def sync(self) -> None:
        """Copy the policy's weights to the engine."""

    def sample(self, prompts: Sequence[list[int]], sampling: Sampling, keys: Keys) -> list[Completion]:
        raise NotImplementedError

    def release_memory(self) -> None:
        """Free memory that can be restored quickly; called before an update, when nothing is sampled for a while."""

    def close(self) -> None:
        """Release the engine's memory and processes."""

    def stopped(self, tokens: Sequence[int], stop: tuple[str, ...]) -> bool:
        """True if the last of these sampled tokens completed a stop string."""
        # A stop string of n bytes spans at most n tokens, and began no earlier than one token before.
        longest = max(len(text.encode()) for text in stop)
        tail = self.policy.tokenizer.decode(list(tokens[-(longest + 1) :]))
        return any(text in tail for text in stop)
