"""What an engine is: token prompts in, sampled tokens with their log-probabilities out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from lmrl.recipe import Rollouts


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


class Engine(Protocol):
    def generate(
        self, prompts: Sequence[list[int]], sampling: Sampling, keys: Sequence[tuple[int | str, ...]]
    ) -> list[Completion]:
        """Complete each prompt; `keys` name the random stream of each, so that a repeated call draws the same."""
        ...
