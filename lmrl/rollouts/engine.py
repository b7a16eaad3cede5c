"""What an engine is: token prompts in, sampled tokens with their log-probabilities out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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

    def __init__(self, policy: Policy, check: Callable[[], None] = lambda: None):
        self.policy, self.check = policy, check
        self.stale = True
        """Whether the policy's weights have changed since the last sync: set it after every update."""
        self.syncs = 0

    def generate(self, prompts: Sequence[list[int]], sampling: Sampling, keys: Keys) -> list[Completion]:
        """Complete each prompt with the policy as it is; `keys` name the random stream of each, so that a repeated call
        draws the same."""
        self.refresh()
        return self.sample(prompts, sampling, keys)

    def refresh(self) -> None:
        """Take over the policy's weights where they have changed."""
        if self.stale:
            self.sync()
            self.stale = False
            self.syncs += 1

    def sync(self) -> None:
        """Take over the policy's weights."""

    def sample(self, prompts: Sequence[list[int]], sampling: Sampling, keys: Keys) -> list[Completion]:
        raise NotImplementedError

    def close(self) -> None:
        """Give back what the engine holds: memory, processes."""


def build_engine(
    options: Rollouts, policy: Policy, check: Callable[[], None] = lambda: None, folder: Path | None = None
) -> Engine:
    """The engine that a recipe's `rollouts` section names. folder: the run's, for logs (None: a temporary one)."""
    if options.engine == "vllm-server":
        from lmrl.rollouts.vllm_server import VLLMServerEngine

        return VLLMServerEngine(policy, options.server, folder, check)
    from lmrl.rollouts.hf import HFEngine

    return HFEngine(policy, options.slots, check)
