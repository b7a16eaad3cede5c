"""Nim with one heap: two players take sticks in turn, and whoever takes the last one wins."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from lmrl.environments.games import Game


class Nim(Game):
    """A player sees how many sticks are left and takes 1 to `most` of them; the winner earns 1, the other -1.

    A text that is not a legal move loses at once (metric `illegal`: 1 if the game ended that way). There are `sticks`
    start states, heaps of 1 to `sticks`. The player to move wins by leaving a multiple of `most` + 1, unless the heap
    is one already.
    """

    players = ("random", "optimal")
    metric_limits = {"return": (-1.0, 1.0)}

    def __init__(self, sticks: int = 10, most: int = 3):
        self.sticks, self.most, self.num_starts = sticks, most, sticks

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> dict[str, Any]:
        super().reset(seed=seed)
        start = (options or {}).get("start")
        self.left = 1 + (int(self.np_random.integers(self.sticks)) if start is None else start)
        return {}

    def observe(self, player: int) -> str:
        return f"{self.left} left"

    def step(self, action: str) -> tuple[Sequence[float], bool, bool, dict[str, Any]]:
        mover, taken = self.to_move, action.strip()
        legal = taken in map(str, range(1, self._largest() + 1))
        self.left -= int(taken) if legal else 0
        self.to_move = 1 - mover
        if legal and self.left:
            return (0.0, 0.0), False, False, {}
        rewards = [1.0, 1.0]
        rewards[self.to_move if legal else mover] = -1.0
        return rewards, True, False, {"metrics": {"illegal": float(not legal)}}

    def act(self, player: str, rng: np.random.Generator) -> str:
        if player == "random" or not self.left % (self.most + 1):
            return str(rng.integers(1, self._largest() + 1))
        return str(self.left % (self.most + 1))

    def allowed_actions(self) -> Sequence[str] | None:
        return [str(number) for number in range(1, self._largest() + 1)]

    def texts(self) -> Iterable[str]:
        return [f"{number} left" for number in range(self.sticks + 1)] + [
            str(number) for number in range(self.most + 1)
        ]

    def _largest(self) -> int:
        return min(self.most, self.left)
