"""A trajectory: one episode as it happened, token by token."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

CONTEXT = -1
"""In `Segment.turns`: a token the policy did not choose."""


@dataclass
class Segment:
    """A stretch of an episode that the policy saw in one context. All lists have one entry a token.

    `turns` is the action mask that also says whose turn it was: `CONTEXT` for prompt and observation tokens, the number
    of the turn for sampled ones. `logprobs` holds the log-probability of each sampled token under the distribution it
    was drawn from (None where it is unknown), `rewards` what was earned at a token.
    """

    tokens: list[int] = field(default_factory=list)
    turns: list[int] = field(default_factory=list)
    logprobs: list[float | None] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)

    def observe(self, tokens: list[int]) -> None:
        self.tokens += tokens
        self.turns += [CONTEXT] * len(tokens)
        self.logprobs += [None] * len(tokens)
        self.rewards += [0.0] * len(tokens)

    def act(self, tokens: list[int], logprobs: list[float] | None, turn: int) -> None:
        self.tokens += tokens
        self.turns += [turn] * len(tokens)
        self.logprobs += logprobs if logprobs is not None else [None] * len(tokens)
        self.rewards += [0.0] * len(tokens)

    @property
    def actions(self) -> list[int]:
        """Positions of the action tokens."""
        return [position for position, turn in enumerate(self.turns) if turn != CONTEXT]


@dataclass
class Trajectory:
    """One episode: its segments, how it ended, what it earned, and its text for people."""

    segments: list[Segment]
    prompt: str
    completion: str
    terminated: bool = True
    """False: truncated by a limit, so its value goes on and has to be bootstrapped. A truncated episode ends with the
    observation that would have come next."""
    reward: float | None = 0.0
    """Return of the episode, undiscounted; None: not judged."""
    components: dict[str, float | None] = field(default_factory=dict)
    """Rewards by function, before weighting."""
    metrics: dict[str, float] = field(default_factory=dict)
    """What the environment measured."""
    failure: str | None = None
    """Why the episode could not be judged."""
    cut_turns: list[int] = field(default_factory=list)
    """Turns that ran into the token limit before they ended by themselves."""
    group: int = 0
    """Which prompt or start state; episodes with the same group began alike."""
    episode: int = 0
    columns: dict[str, Any] = field(default_factory=dict)
    """The prompt's other columns, for reward functions."""
    messages: list[dict[str, str]] | None = None
    """The prompt as messages, where it is a dialogue."""

    @property
    def num_actions(self) -> int:
        return sum(len(segment.actions) for segment in self.segments)

    def place_reward(self, reward: float, turn: int | None = None) -> None:
        """Add a reward at the last token of a turn (None: of the episode)."""
        for segment in reversed(self.segments):
            for position in range(len(segment.tokens) - 1, -1, -1):
                if segment.turns[position] != CONTEXT and turn in (None, segment.turns[position]):
                    segment.rewards[position] += reward
                    return
        raise ValueError(f"turn {turn} has no token to hold a reward")
