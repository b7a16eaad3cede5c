"""Games of gymnasium whose actions are few and whose observations are small, as text: `environment: gymnasium:FrozenLake-v1`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from lmrl.environments.base import TextEnvironment
from lmrl.errors import PluginError

ACTIONS = {
    "FrozenLake": ["left", "down", "right", "up"],
    "CliffWalking": ["up", "right", "down", "left"],
    "Taxi": ["south", "north", "east", "west", "pickup", "dropoff"],
    "Blackjack": ["stick", "hit"],
    "CartPole": ["left", "right"],
    "MountainCar": ["left", "wait", "right"],
    "Acrobot": ["left", "wait", "right"],
}
"""Words for actions, by the name of the game without its version."""
LARGEST_BOX = 32
"""Numbers of an observation that are written out."""
SAMPLED_EPISODES, SAMPLED_STEPS = 100, 20
"""Beginnings of random play from which a vocabulary is taken."""


def _game_of(id: str) -> str:
    """The name of a game, without its package, size (FrozenLake8x8) and version."""
    return id.rpartition("/")[2].partition("-v")[0].removesuffix("8x8")


def _cell(state: Any, columns: int) -> str:
    return f"row {int(state) // columns} column {int(state) % columns}"


def _taxi(state: Any) -> str:
    state, destination = divmod(int(state), 4)
    state, passenger = divmod(state, 5)
    row, column = divmod(state, 5)
    stands = ("red", "green", "yellow", "blue")
    where = "in the taxi" if passenger == 4 else f"at {stands[passenger]}"
    return f"taxi at row {row} column {column} passenger {where} destination {stands[destination]}"


def _blackjack(observation: Any) -> str:
    own, dealer, ace = (int(part) for part in observation)
    return f"you have {own} {'with' if ace else 'without'} a usable ace dealer shows {dealer}"


DESCRIPTIONS: dict[str, Callable[[Any], str]] = {
    "CliffWalking": partial(_cell, columns=12),
    "Taxi": _taxi,
    "Blackjack": _blackjack,
}


class GymnasiumText(TextEnvironment):
    """A gymnasium environment with discrete actions; observations of few numbers become text.

    id: gymnasium's name for it. actions: a word for each (default: known ones, else numbers). template: the observation's text,
    in which {observation} stands for its values. illegal_reward: of a text that is no action, which takes a turn and changes
    nothing. Further keys go to `gymnasium.make`. The metric `illegal` counts such texts, beside the game's own
    `info["metrics"]`. A game that says in `info["action_mask"]`
    which actions change something (Taxi) allows these; others allow all.
    """

    players = ("random",)

    def __init__(
        self,
        id: str,
        actions: list[str] | None = None,
        template: str = "{observation}",
        illegal_reward: float = -1.0,
        **options: Any,
    ):
        try:
            self.env: gymnasium.Env[Any, Any] = gymnasium.make(id, **options)
        except gymnasium.error.Error as error:
            raise PluginError(f"task.environment: gymnasium has no '{id}': {' '.join(str(error).split())}") from error
        choices = self.env.action_space
        if not isinstance(choices, spaces.Discrete):
            raise PluginError(f"task.environment: actions of '{id}' are {choices}; expected a Discrete space")
        known = ACTIONS.get(_game_of(id))
        count, self.first = int(choices.n), int(choices.start)
        self.words = actions or (known if known and len(known) == count else [str(number) for number in range(count)])
        for word in self.words:
            if not isinstance(word, str) or word != " ".join(word.split()) or not word:
                raise PluginError(
                    f"task.actions: {word!r} is no text that an answer can be: write words with single spaces between them, and "
                    "numbers, yes, no, on and off in quotes"
                )
        if len(self.words) != count or len(set(self.words)) != count:
            raise PluginError(
                f"task.actions: '{id}' has {count} actions; expected as many different words, got {len(self.words)}"
            )
        if "{observation}" not in template:
            raise PluginError("task.template: expected text with {observation} in it")
        self.template, self.illegal_reward = template, illegal_reward
        self.describe = self._describe_of(_game_of(id))
        _writable(self.env.observation_space, id)
        specification = self.env.spec
        self.version = specification.id if specification else id

    def _describe_of(self, game: str) -> Callable[[Any], str]:
        if game == "FrozenLake":
            lake: Any = self.env.unwrapped
            return partial(_cell, columns=lake.ncol)
        return DESCRIPTIONS.get(game, as_text)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        super().reset(seed=seed)
        observation, info = self.env.reset(seed=seed)
        self.mask = info.get("action_mask")
        self.metrics: dict[str, Any] = {}
        self.illegal, self.shown = 0, self._text(observation)
        return self.shown, {}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        word = " ".join(action.split())
        if word not in self.words:
            self.illegal += 1
            return self.shown, self.illegal_reward, False, False, self._measured()
        number = self.words.index(word) + self.first
        observation, reward, terminated, truncated, info = self.env.step(number)
        self.mask, self.metrics = info.get("action_mask"), info.get("metrics", {})
        self.shown = self._text(observation)
        return self.shown, float(reward), bool(terminated), bool(truncated), self._measured()

    def act(self, player: str, rng: np.random.Generator) -> str:
        return str(rng.choice(self.words))

    def allowed_actions(self) -> list[str]:
        if self.mask is None or not any(self.mask):
            return self.words
        return [word for word, possible in zip(self.words, self.mask, strict=True) if possible]

    def texts(self) -> Iterable[str]:
        rng, seen = np.random.default_rng(0), {*self.words, *"0123456789.-"}
        for episode in range(SAMPLED_EPISODES):
            seen.add(self.reset(seed=episode)[0])
            for _ in range(SAMPLED_STEPS):
                observation, _, terminated, truncated, _ = self.step(self.act("random", rng))
                seen.add(observation)
                if terminated or truncated:
                    break
        return sorted(seen)

    def close(self) -> None:
        self.env.close()

    def _measured(self) -> dict[str, Any]:
        return {"metrics": {**self.metrics, "illegal": self.illegal}}

    def _text(self, observation: Any) -> str:
        return self.template.replace("{observation}", self.describe(observation))


def _writable(space: spaces.Space[Any], id: str) -> None:
    """Raise PluginError for observations that are too large for text."""
    if isinstance(space, spaces.Tuple | spaces.Dict):
        for part in space.spaces.values() if isinstance(space, spaces.Dict) else space.spaces:
            _writable(part, id)
    elif isinstance(space, spaces.Box) and int(np.prod(space.shape)) > LARGEST_BOX:
        raise PluginError(
            f"task.environment: an observation of '{id}' has {int(np.prod(space.shape))} numbers, more than the {LARGEST_BOX} that "
            "are written out: wrap it in an environment of your own that says what matters"
        )


def as_text(observation: Any) -> str:
    """Whole numbers as they are, others with two digits; parts one after the other."""
    if isinstance(observation, dict):
        return " ".join(f"{name} {as_text(value)}" for name, value in observation.items())
    if isinstance(observation, str):
        return observation
    if isinstance(observation, tuple | list):
        return " ".join(as_text(part) for part in observation)
    values = np.asarray(observation).reshape(-1)
    if np.issubdtype(values.dtype, np.floating):
        return " ".join(f"{value:.2f}" for value in values)
    return " ".join(str(int(value)) for value in values)
