"""Games of several players: the interface of a game, and a game as an environment for one player."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from gymnasium.utils import seeding

from lmrl.environments.base import TextEnvironment
from lmrl.environments.calls import check_text, checked_flag, checked_metrics, checked_reward, unpacked
from lmrl.errors import PluginError
from lmrl.plugins.foreign import foreign

Move = tuple[int, str]
"""The player, and its action."""


class Game:
    """A game in which players take turns; subclass it.

    - `num_players`, and `to_move`: the player whose turn it is, from 0, which `reset` and `step` set.
    - `reset(seed=..., options=...)` begins a game and returns info; `options["start"]` is the number of the start
      state.
    - `observe(player)`: what is new to that player since its last look. It is called before each of the player's turns,
      and once more if a limit ends the game.
    - `step(action)`: the turn of the player to move. Returns rewards (one per player), terminated, truncated, and info.

    `num_starts`, `players` with `act`, `texts()`, `version`, `metric_limits` and `info["metrics"]` are those of a
    TextEnvironment; `act` plays for the player to move, and `return` is that of one player.
    """

    num_players = 2
    to_move = 0
    num_starts: int | None = None
    players: tuple[str, ...] = ()
    version: str | int | None = None
    metric_limits: dict[str, tuple[float, float]] = {}
    np_random: np.random.Generator

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> dict[str, Any]:
        """Begin a game; a subclass calls this first, which seeds `self.np_random`."""
        self.np_random, _ = seeding.np_random(seed)
        self.to_move = 0
        return {}

    def observe(self, player: int) -> str:
        raise NotImplementedError

    def step(self, action: str) -> tuple[Sequence[float], bool, bool, dict[str, Any]]:
        raise NotImplementedError

    def act(self, player: str, rng: np.random.Generator) -> str:
        """The scripted player's action for the player to move."""
        raise NotImplementedError(f"{type(self).__name__} has no player '{player}'")

    def texts(self) -> Iterable[str]:
        return ()

    def allowed_actions(self) -> Sequence[str] | None:
        """The actions that the player to move may choose from, for `task.allowed_actions` (None: any)."""
        return None


class Referee:
    """Runs a game: calls it, checks what it returns, and records the moves and what each player earned."""

    def __init__(self, game: Game):
        self.game = game
        self.moves: list[Move] = []
        self.totals = [0.0] * game.num_players
        self.metrics: dict[str, float | None] = {}
        self.terminated = self.truncated = False

    @property
    def over(self) -> bool:
        return self.terminated or self.truncated

    @property
    def to_move(self) -> int:
        player = self.game.to_move
        if isinstance(player, bool) or player not in range(self.game.num_players):
            raise ValueError(f"to_move is {player!r:.60}; expected a player from 0 to {self.game.num_players - 1}")
        return int(player)

    def begin(self, seed: int, start: int | None, limit: float | None = None) -> dict[str, Any]:
        """Begin a game; its info. limit: seconds that the call may take."""
        with foreign("the environment", limit):
            info = self.game.reset(seed=seed, options=None if start is None else {"start": start})
        if not isinstance(info, dict):
            raise TypeError(f"reset() of a game returned {info!r:.60}; expected the info, an object")
        self.moves, self.totals, self.metrics = [], [0.0] * self.game.num_players, {}
        self.terminated = self.truncated = False
        return info

    def observe(self, player: int, limit: float | None = None) -> Any:
        with foreign("the environment", limit):
            observation = self.game.observe(player)
        return check_text(observation)

    def step(self, action: str, limit: float | None = None) -> list[float]:
        """The move of the player to move; what each player earned by it."""
        self.moves.append((self.to_move, action))  # also a move that fails
        with foreign("the environment", limit):
            result = self.game.step(action)
        given, terminated, truncated, info = unpacked("step", result, ("rewards", "terminated", "truncated", "info"))
        if not hasattr(given, "__len__") or isinstance(given, str | dict) or len(given) != self.game.num_players:
            raise TypeError(
                f"step() returned the rewards {given!r:.60}; expected one for each of {self.game.num_players} players"
            )
        rewards = [checked_reward(reward) for reward in given]
        self.terminated, self.truncated = checked_flag("terminated", terminated), checked_flag("truncated", truncated)
        self.metrics = checked_metrics(info)
        self.totals = [total + reward for total, reward in zip(self.totals, rewards, strict=True)]
        return rewards

    def metrics_of(self, player: int) -> dict[str, float | None]:
        """The game's own metrics, and `won`: 1 if this player earned more than every other."""
        others = [total for other, total in enumerate(self.totals) if other != player]
        return self.metrics | {"won": float(bool(others) and self.totals[player] > max(others))}


Answer = Callable[[Game, Any], str]
"""Gives the other side's action, from the game (for scripted players) and that side's observation."""


class GameEnvironment(TextEnvironment):
    """A game as an environment. With an opponent, the policy plays one side and the opponent all others; without one,
    the policy plays all sides in turn, and the reward is the first player's.

    The side is drawn by the seed; with numbered start states each is played from every side: start i is the game's
    start i // players, as player i % players.
    """

    def __init__(self, game: Game, new_opponent: Callable[[int, int], Answer] | None = None):
        """new_opponent: makes the other side of a new game, from the player's number and the seed."""
        self.game, self.new_opponent = game, new_opponent
        count = game.num_starts
        self.num_starts = count if count is None or new_opponent is None else count * game.num_players
        self.players, self.version, self.metric_limits = tuple(game.players), game.version, dict(game.metric_limits)
        self.referee = Referee(game)
        self.seat, self.waiting = 0, 0.0
        self.others: dict[int, Answer] = {}

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        seed = int(self.np_random.integers(2**31)) if seed is None else seed
        start, self.seat = (options or {}).get("start"), 0
        if self.new_opponent is not None:
            start, self.seat = split_start(self.game, start, seed)
        info = self._begin(seed, start)
        if self.referee.over:  # before this player had a turn: it plays the side that moves first instead
            self.referee.begin(seed, start)
            self.seat = self.referee.to_move
            info = self._begin(seed, start)
        return self._observation(), info

    def step(self, action: str) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        reward, self.waiting = self.waiting, 0.0
        reward += self.referee.step(action)[self.seat]
        reward += self._others_move()
        over = self.referee.over
        observation = "" if over else self._observation()
        metrics = self.referee.metrics_of(self.seat) if over else {}
        return observation, reward, self.referee.terminated, self.referee.truncated, {"metrics": metrics}

    def act(self, player: str, rng: np.random.Generator) -> str:
        return self.game.act(player, rng)

    def texts(self) -> Iterable[str]:
        return self.game.texts()

    def allowed_actions(self) -> Sequence[str] | None:
        return self.game.allowed_actions()

    def _begin(self, seed: int, start: int | None) -> dict[str, Any]:
        info = self.referee.begin(seed, start)
        sides = range(self.game.num_players) if self.new_opponent else ()
        self.others = {side: self.new_opponent(side, seed) for side in sides if side != self.seat and self.new_opponent}
        self.waiting = self._others_move()
        return info

    def _others_move(self) -> float:
        """Let the other sides move until it is the player's turn; returns what the player earned meanwhile."""
        earned = 0.0
        while not self.referee.over and (other := self.others.get(self.referee.to_move)) is not None:
            observation = self.referee.observe(self.referee.to_move)
            earned += self.referee.step(other(self.game, observation))[self.seat]
        return earned

    def _observation(self) -> Any:
        return "" if self.referee.over else self.referee.observe(self.referee.to_move)


def split_start(game: Game, start: int | None, number: int) -> tuple[int | None, int]:
    """The game's start state, and the player whose side is played. number: of the episode, which chooses the side if
    there are no numbered starts."""
    if start is None:
        return None, number % game.num_players
    return start // game.num_players, start % game.num_players


def inner(environment: Any) -> Any:
    """The user's own object: the game of a GameEnvironment, or the environment itself."""
    return environment.game if isinstance(environment, GameEnvironment) else environment


def lists_actions(environment: Any) -> bool:
    """True if an environment declares which actions are allowed."""
    method = getattr(type(inner(environment)), "allowed_actions", None)
    return method not in (None, TextEnvironment.allowed_actions, Game.allowed_actions)


def check_says_what_is_allowed(environment: Any, name: str) -> None:
    """Raise PluginError for an environment that does not declare which actions are allowed."""
    if not lists_actions(environment):
        raise PluginError(
            f"task.allowed_actions: environment '{name}' has no method allowed_actions(): add it, or leave the key out"
        )


def check_game(game: Any, name: str) -> None:
    """Raise PluginError for anything that cannot be played as a game of several players."""
    count = game.num_players
    if isinstance(count, bool) or not isinstance(count, int) or count < 2:
        raise PluginError(f"task.environment: num_players of '{name}' is {count!r:.40}; expected 2 or more")
    if type(game).observe is Game.observe or type(game).step is Game.step:
        raise PluginError(f"task.environment: '{name}' is a game without observe() and step(): see lmrl.Game")
