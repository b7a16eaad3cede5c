"""A trajectory: one episode as it happened, token by token."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # reward workers import this module without torch
    from lmrl.trajectories.allowed import AllowedTokens


Messages = list[dict[str, Any]]
"""`role` and `content`, text; an assistant's may have `tool_calls`, a tool's `tool_call_id` and `name`; the first one
may have `tools`, the definitions that the chat template renders."""

CONTEXT = -1
"""In `Segment.turns`: a token the policy did not choose."""


LARGEST_REWARD = 1e30
"""Maximum size of a reward. The squares of much larger ones overflow, and advantages divided by their spread vanish."""


TOKENS = "tokens"
"""The kind of actions that are tokens of the vocabulary."""


@dataclass
class Segment:
    """A part of an episode that the policy saw in one context. All lists have one entry per token.

    `turns` is the action mask: `CONTEXT` for prompt and observation tokens, the number of the turn for sampled
    ones. `logprobs` holds the log-probability of each action under the distribution it was drawn
    from (None if unknown), `rewards` the reward given at each token.
    """

    tokens: list[int] = field(default_factory=list)
    turns: list[int] = field(default_factory=list)
    logprobs: list[float | None] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    allowed: dict[int, AllowedTokens] = field(default_factory=dict)
    """The tokens that each action was chosen from, by position; missing positions had the whole vocabulary."""
    kind: str = TOKENS
    """What actions are: tokens, or a kind that the policy knows, with its actions in `vectors`."""
    vectors: dict[int, tuple[float, ...]] = field(default_factory=dict)
    """The actions by position, if they are not tokens. The token there is a placeholder."""

    def observe(self, tokens: list[int]) -> None:
        self.tokens += tokens
        self.turns += [CONTEXT] * len(tokens)
        self.logprobs += [None] * len(tokens)
        self.rewards += [0.0] * len(tokens)

    def act(
        self,
        tokens: list[int],
        logprobs: list[float] | None,
        turn: int,
        allowed: Sequence[AllowedTokens | None] = (),
    ) -> None:
        """Add the tokens of an action. allowed: what each token was chosen from, if that was restricted.

        Raises ValueError for a token that was not allowed.
        """
        for place, own in enumerate(allowed):
            if own is not None:
                if tokens[place] not in own:
                    raise ValueError(f"token {tokens[place]} was sampled, but not allowed")
                self.allowed[len(self.tokens) + place] = own
        self.tokens += tokens
        self.turns += [turn] * len(tokens)
        self.logprobs += logprobs if logprobs is not None else [None] * len(tokens)
        self.rewards += [0.0] * len(tokens)

    def cut(self, size: int) -> None:
        """Drop the context tokens beyond the first `size` tokens."""
        for column in (self.tokens, self.turns, self.logprobs, self.rewards):
            del column[size:]

    def act_vector(self, kind: str, vector: Sequence[float], logprob: float | None, turn: int, token: int = 0) -> None:
        """Add an action that is a vector, which takes the place of one token. token: the placeholder.

        Raises ValueError if the segment has actions of another kind.
        """
        if self.actions and self.kind != kind:
            raise ValueError(f"a segment has actions of one kind: '{self.kind}', not '{kind}' as well")
        self.kind = kind
        self.vectors[len(self.tokens)] = tuple(vector)
        self.act([token], None if logprob is None else [logprob], turn)

    @property
    def actions(self) -> list[int]:
        """Positions of the action tokens."""
        return [position for position, turn in enumerate(self.turns) if turn != CONTEXT]


@dataclass
class Turn:
    """An exchange as text: the observation (text or messages), the action, and its reward."""

    observation: str | Messages
    action: str
    reward: float = 0.0
    message: dict[str, Any] | None = None
    """The assistant's message if it calls tools; `action` is then its readable text."""


@dataclass
class Trajectory:
    """One episode: its segments, how it ended, its rewards, and its readable text."""

    segments: list[Segment]
    prompt: str
    completion: str
    terminated: bool = True
    """False: truncated by a limit, so the value of its last state must be bootstrapped. A truncated episode ends with
    the observation that would have come next."""
    reward: float | None = 0.0
    """Return of the episode, undiscounted; None: not judged."""
    components: dict[str, float | None] = field(default_factory=dict)
    """Rewards by function, before weighting."""
    metrics: dict[str, float | None] = field(default_factory=dict)
    """Measurements by the environment."""
    failure: str | None = None
    """Why the episode could not be judged."""
    cut_turns: list[int] = field(default_factory=list)
    """Turns that ran into the token limit before the policy ended them."""
    group: int = 0
    """Index of the prompt or start state; episodes of a group have the same start."""
    episode: int = 0
    columns: dict[str, Any] = field(default_factory=dict)
    """The prompt's other columns, for reward functions."""
    messages: Messages | None = None
    """The prompt as messages, if it is a dialogue."""
    turns: list[Turn] = field(default_factory=list)
    """The episode as text."""
    final_observation: str | Messages | None = None
    """The observation that would have come next, in a truncated episode."""
    player: str | None = None
    """The player: a policy or a scripted player, if known."""
    seed: int | None = field(default=None, compare=False)
    start: int | None = field(default=None, compare=False)
    """Arguments of the environment's `reset`, if known: the seed, and `options["start"]` (None: drawn by the seed)."""
    game: dict[str, Any] | None = field(default=None, compare=False)
    """In a game of several players: `player`, the side of this episode; `start`, the game's own start state; and
    `moves`, those of all players as [player, action]."""
    steady: float | None = field(default=None, compare=False)
    """The reward on a scale that stays the same throughout a run, where that of `reward` follows running statistics."""
    version: int | None = field(default=None, compare=False)
    """Version of the weights that played: the number of the engine's weight sync (None: not played by this process)."""

    @property
    def num_actions(self) -> int:
        return sum(len(segment.actions) for segment in self.segments)

    def place_reward(self, reward: float, turn: int | None = None) -> None:
        """Add a reward at the last token of a turn (None: of the episode)."""
        for segment in reversed(self.segments):
            for position in range(len(segment.tokens) - 1, -1, -1):
                if segment.turns[position] != CONTEXT and turn in (None, segment.turns[position]):
                    segment.rewards[position] += reward
                    if self.turns:
                        self.turns[segment.turns[position]].reward += reward
                    return
        raise ValueError(f"turn {turn} has no token to hold a reward")


def is_reward(value: float) -> bool:
    """True if a number can be a reward: it is finite, and no larger than LARGEST_REWARD."""
    return abs(value) <= LARGEST_REWARD


def same_reward(one: float, other: float) -> bool:
    """True if two sums of rewards are equal but for rounding: .7 + .2 + .1 is less than 1, and depends on the order."""
    return math.isclose(one, other, rel_tol=1e-6, abs_tol=1e-6)


def prompt_text(observation: str | Messages) -> str:
    """A prompt as readable text: messages are joined by line breaks."""
    return observation if isinstance(observation, str) else "\n".join(str(one["content"]) for one in observation)


def prompt_key(prompt: str | Messages) -> str:
    """Prompts with the same key are the same: for messages, only role, content and tool calls count."""
    if isinstance(prompt, str):
        return prompt
    names = ("role", "content", "tool_calls")
    return str([{name: message[name] for name in names if message.get(name) is not None} for message in prompt])


def start_key(trajectory: Trajectory, group: Any = None) -> tuple[Any, ...]:
    """The key that comparable episodes share: the first prompt, the start state, and the side of a game. group: stands
    for a start state without a number."""
    start = str(group) if trajectory.start is None else trajectory.start
    return prompt_key(trajectory.turns[0].observation), start, (trajectory.game or {}).get("player")


def transcript(turns: list[Turn]) -> str:
    """The readable text after the prompt: actions and the observations between them, one per line."""
    lines = [line for turn in turns for line in (prompt_text(turn.observation), turn.action)]
    return "\n".join(lines[1:])


def as_messages(observation: str | Messages) -> Messages:
    return [{"role": "user", "content": observation}] if isinstance(observation, str) else observation
