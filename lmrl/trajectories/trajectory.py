"""A trajectory: one episode as it happened, token by token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # workers of rewards import this module, and can do without torch
    from lmrl.trajectories.allowed import AllowedTokens


Messages = list[dict[str, Any]]
"""`role` and `content`, text; of the assistant maybe `tool_calls`, of a tool `tool_call_id` and `name`; in the first one maybe
`tools`, the definitions that the chat template is to show."""

CONTEXT = -1
"""In `Segment.turns`: a token the policy did not choose."""


TOKENS = "tokens"
"""The kind of actions that are tokens of the vocabulary."""


@dataclass
class Segment:
    """A stretch of an episode that the policy saw in one context. All lists have one entry per token.

    `turns` is the action mask that also says whose turn it was: `CONTEXT` for prompt and observation tokens, the number
    of the turn for sampled ones. `logprobs` holds the log-probability of each action under the distribution it was drawn
    from (None where it is unknown), `rewards` what was earned at a token.
    """

    tokens: list[int] = field(default_factory=list)
    turns: list[int] = field(default_factory=list)
    logprobs: list[float | None] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    allowed: dict[int, AllowedTokens] = field(default_factory=dict)
    """By position, the tokens that the action was chosen from; positions that are missing had the whole vocabulary."""
    kind: str = TOKENS
    """What actions are: tokens, or a kind that the policy knows, whose actions stand in `vectors`."""
    vectors: dict[int, tuple[float, ...]] = field(default_factory=dict)
    """By position, the action itself, if its kind is not tokens. The token there is a placeholder."""

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
        """Add the tokens of an action. allowed: what each was chosen from, if that was ever restricted.

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

    def act_vector(self, kind: str, vector: Sequence[float], logprob: float | None, turn: int, token: int = 0) -> None:
        """Add an action that is a vector, which takes the place of one token. token: stands at its place.

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
    """An exchange as text: what was observed (maybe messages), what was done, and what was earned by it."""

    observation: str | Messages
    action: str
    reward: float = 0.0
    message: dict[str, Any] | None = None
    """The assistant's message where it calls tools, of which `action` is the text for people."""


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
    metrics: dict[str, float | None] = field(default_factory=dict)
    """Measurements of the environment."""
    failure: str | None = None
    """Why the episode could not be judged."""
    cut_turns: list[int] = field(default_factory=list)
    """Turns that ran into the token limit before they ended by themselves."""
    group: int = 0
    """Which prompt or start state; episodes with the same group began alike."""
    episode: int = 0
    columns: dict[str, Any] = field(default_factory=dict)
    """The prompt's other columns, for reward functions."""
    messages: Messages | None = None
    """The prompt as messages, where it is a dialogue."""
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
    """Of a game of several players: `player`, whose side this is; `start`, the game's own start state; and `moves`, those of all
    players as [player, action]."""
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


def prompt_text(observation: str | Messages) -> str:
    """A prompt for people: messages are joined by line breaks."""
    return observation if isinstance(observation, str) else "\n".join(str(one["content"]) for one in observation)


def prompt_key(prompt: str | Messages) -> str:
    """Prompts with the same key are the same: of messages only role, content and calls of tools count."""
    if isinstance(prompt, str):
        return prompt
    names = ("role", "content", "tool_calls")
    return str([{name: message[name] for name in names if message.get(name) is not None} for message in prompt])


def transcript(turns: list[Turn]) -> str:
    """The text after the prompt, for people: actions and the observations between them, one a line."""
    lines = [line for turn in turns for line in (prompt_text(turn.observation), turn.action)]
    return "\n".join(lines[1:])


def as_messages(observation: str | Messages) -> Messages:
    return [{"role": "user", "content": observation}] if isinstance(observation, str) else observation
