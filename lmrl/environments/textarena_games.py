"""Games of TextArena (https://github.com/LeonGuertler/TextArena), for one or several players: `environment:
textarena:TicTacToe-v0`."""

from __future__ import annotations

import random
import re
import string
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib import import_module, metadata
from typing import Any

import numpy as np

from lmrl.environments.base import TextEnvironment
from lmrl.environments.games import Game
from lmrl.errors import PluginError, did_you_mean

MOST_PLAYERS = 15
BRACKETED = re.compile(r"\[[^\[\]\n]{1,40}\]")
"""The format of actions in most of its games."""
SAMPLED_STARTS = 10
"""How many games' beginnings the vocabulary is taken from."""
_generators = threading.RLock()


def make(id: str, players: int | None = None, view: str = "new", **options: Any) -> TextArenaGame | TextArenaSolo:
    """A game of TextArena by its TextArena name.

    players: how many play (None: as few as it allows). view: `new` shows a player what has happened since its last
    turn, for `task.history: all`; `whole` shows what TextArena itself shows, usually everything so far (names that end
    with -train: the current board), for `task.history: 1`. Further keys go to `textarena.make`. TextArena's games draw
    from Python's and numpy's global generators; here each game gets its own generator states, so that games do not
    disturb one another.
    """
    if view not in ("new", "whole"):
        raise PluginError(f"task.view: expected new or whole, got '{view}'")
    try:
        textarena = import_module("textarena")
        known = import_module("textarena.envs.registration").ENV_REGISTRY
    except ImportError as error:
        raise PluginError(
            f"task.environment: textarena cannot be imported ({error}): pip install -e '.[textarena]'"
        ) from error
    if id not in known:
        raise PluginError(f"task.environment: textarena has no game '{id}'{did_you_mean(id, known)}")
    arena = Arena(textarena.make(id, **options), view)
    count = arena.least_players() if players is None else players
    arena.begin(count, 0)
    return TextArenaSolo(arena) if count == 1 else TextArenaGame(arena, count)


class Arena:
    """One game of TextArena, with its own random generators."""

    def __init__(self, env: Any, view: str):
        self.env, self.view = env, view
        self.inner = env
        while hasattr(self.inner, "env"):
            self.inner = self.inner.env
        self.states: tuple[Any, Any] | None = None
        self.seen: dict[int, str] = {}
        self.version = f"textarena {metadata.version('textarena')}"

    @contextmanager
    def own_generators(self) -> Iterator[None]:
        """Inside, the global generators are this game's; afterwards they are what they were."""
        with _generators:
            outer = random.getstate(), np.random.get_state()
            if self.states is not None:
                random.setstate(self.states[0])
                np.random.set_state(self.states[1])
            try:
                yield
            finally:
                self.states = random.getstate(), np.random.get_state()
                random.setstate(outer[0])
                np.random.set_state(outer[1])

    def least_players(self) -> int:
        """The smallest number of players that the game accepts."""
        errors = []
        for count in range(1, MOST_PLAYERS + 1):
            try:
                self.begin(count, 0)
            except Exception as error:
                errors.append(f"{type(error).__name__}: {error}")
            else:
                return count
        raise PluginError(
            f"task.environment: textarena's '{self.inner.env_id}' cannot be started with 1 to {MOST_PLAYERS} players; with one: "
            f"{' '.join(errors[0].split())}"
        )

    def begin(self, players: int, seed: int) -> None:
        self.states = random.Random(seed).getstate(), np.random.RandomState(seed % 2**32).get_state()
        self.seen = {}
        for name in ("full_observations",):  # wrappers keep these from the previous game
            wrapper = self.env
            while wrapper is not self.inner:
                if name in vars(wrapper):
                    getattr(wrapper, name).clear()
                wrapper = wrapper.env
        with self.own_generators():
            self.env.reset(num_players=players, seed=seed)

    @property
    def to_move(self) -> int:
        return int(self.inner.state.current_player_id)

    def observe(self, player: int) -> str:
        """The current observation of a player."""
        with self.own_generators():
            if player == self.to_move:
                source = self.env if self.view == "whole" else self.inner
                _, found = source.get_observation()
            else:
                found = self.inner.state.observations.get(player, [])
        text = found if isinstance(found, str) else self._text(player, found)
        self.seen[player] = text
        return text

    def _text(self, player: int, messages: Iterable[tuple[int, str, Any]]) -> str:
        """Messages as TextArena writes them, without the player's own actions, which it knows."""
        roles = self.inner.state.role_mapping
        shown = [
            f"[{roles.get(sender, 'GAME' if sender < 0 else f'Player {sender}')}] {message}"
            for sender, message, kind in messages
            if not (sender == player and getattr(kind, "name", "") == "PLAYER_ACTION")
        ]
        return "\n".join(shown)

    def step(self, action: str) -> bool:
        """Play for the player to move; True if the game is over."""
        with self.own_generators():
            done, _ = self.env.step(action=action)
        return bool(done)

    def rewards(self, players: int) -> tuple[list[float], dict[str, float]]:
        """Each player's reward in a finished game, and the share of players who ended it by an invalid move."""
        with self.own_generators():
            rewards, info = self.env.close()
        earned = [float((rewards or {}).get(player, 0.0)) for player in range(players)]
        invalid = [bool(info.get(player, {}).get("invalid_move")) for player in range(players)]
        return earned, {"invalid": sum(invalid) / players}

    def act(self, rng: np.random.Generator) -> str:
        """A random one of the bracketed texts that the player to move has just seen; legal moves are often among
        them."""
        found = sorted(set(BRACKETED.findall(self.seen.get(self.to_move, ""))) - {"[GAME]"})
        return str(rng.choice(found)) if found else "[0]"

    def texts(self, players: int) -> list[str]:
        """Samples for a vocabulary: what can be typed, and the beginnings of some games."""
        found = [string.printable]
        for seed in range(SAMPLED_STARTS):
            self.begin(players, seed)
            found.append(self.observe(self.to_move))
        return found


class TextArenaGame(Game):
    """A game of several players, with TextArena's rewards at its end."""

    players = ("random",)

    def __init__(self, arena: Arena, players: int):
        self.arena, self.num_players, self.version = arena, players, arena.version

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> dict[str, Any]:
        super().reset(seed=seed)
        self.arena.begin(self.num_players, int(self.np_random.integers(2**31)))
        self.to_move = self.arena.to_move
        return {}

    def observe(self, player: int) -> str:
        return self.arena.observe(player)

    def step(self, action: str) -> tuple[list[float], bool, bool, dict[str, Any]]:
        over = self.arena.step(action)
        self.to_move = self.arena.to_move
        if not over:
            return [0.0] * self.num_players, False, False, {}
        rewards, metrics = self.arena.rewards(self.num_players)
        return rewards, True, False, {"metrics": metrics}

    def act(self, player: str, rng: np.random.Generator) -> str:
        return self.arena.act(rng)

    def texts(self) -> Iterable[str]:
        return self.arena.texts(self.num_players)


class TextArenaSolo(TextEnvironment):
    """A game of one player; TextArena's reward at its end is its return."""

    players = ("random",)

    def __init__(self, arena: Arena):
        self.arena, self.version = arena, arena.version

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        super().reset(seed=seed)
        self.arena.begin(1, int(self.np_random.integers(2**31)))
        return self.arena.observe(0), {}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        if not self.arena.step(action):
            return self.arena.observe(0), 0.0, False, False, {}
        rewards, metrics = self.arena.rewards(1)
        return "", rewards[0], True, False, {"metrics": metrics}

    def act(self, player: str, rng: np.random.Generator) -> str:
        return self.arena.act(rng)

    def texts(self) -> Iterable[str]:
        return self.arena.texts(1)
