"""The double-T maze: walk to the goal, one move per turn, seeing where the walls are.

The maze of LMRL-Gym (Abdulhai et al., arXiv 2311.18232), with its texts and its rewards: -1 per step, walking into a
wall included, 0 for the step that reaches the goal, -4 for text that is not a move. The return of an episode that
arrives by legal moves is therefore 1 minus its steps. Positions are (row, column), counted from the top left corner, 0.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from typing import Any, Literal

import numpy as np

from lmrl.environments.base import TextEnvironment
from lmrl.errors import RecipeError

Position = tuple[int, int]

WALLS = """\
1111111111111
1000001000001
1110111110111
1110111110111
1110111110111
1110000000111
1111110111111
1111110111111
1111110111111
1111111111111""".splitlines()
GOAL: Position = (8, 6)
STARTS = [
    (row, column)
    for row, line in enumerate(WALLS)
    for column, cell in enumerate(line)
    if cell == "0" and (row, column) != GOAL
]
MOVES = {"move right": (0, 1), "move left": (0, -1), "move up": (-1, 0), "move down": (1, 0)}
SIDES = dict(zip(("to your right", "to your left", "above you", "below you"), MOVES.values(), strict=True))
STEP, ARRIVAL, ILLEGAL = -1.0, 0.0, -4.0


class Maze(TextEnvironment):
    """An episode ends at the goal; how many turns it may take is the task's `max_turns`.

    observed: `fully` names the position in every observation, `partially` only the walls around it, so that several
    positions look the same. Raises RecipeError for anything else.
    """

    num_starts = len(STARTS)
    players = ("random", "optimal")
    metric_limits = {"return": (-math.inf, 0.0), "reached": (0.0, 1.0), "steps": (1.0, math.inf)}

    def __init__(self, observed: Literal["fully", "partially"] = "fully"):
        if observed not in ("fully", "partially"):
            raise RecipeError(f"task.observed: the maze can be observed 'fully' or 'partially', not '{observed}'")
        self.observed = observed
        self.distance = _distances_to_goal()

    # ------------------------------------------------------------------------------------------------------ gymnasium
    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        super().reset(seed=seed)
        index = (options or {}).get("start")
        self.position = STARTS[self.np_random.integers(self.num_starts) if index is None else index]
        self.steps = 0
        return self._describe(self.position), {}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        move = MOVES.get(action.strip())
        if move is not None:
            self.position = _after(self.position, move)
        self.steps += 1
        reached = self.position == GOAL
        reward = ILLEGAL if move is None else ARRIVAL if reached else STEP
        # At every step, because the environment does not know which step is the last if the episode is truncated.
        metrics = {"reached": float(reached), "steps": self.steps}
        return "" if reached else self._describe(self.position), reward, reached, False, {"metrics": metrics}

    def _describe(self, position: Position) -> str:
        sentences = [f"The goal is at position {GOAL[0]}, {GOAL[1]}."]
        if self.observed == "fully":
            sentences.append(f"Your current position is at position {position[0]}, {position[1]}.")
        walls = [side for side, move in SIDES.items() if _after(position, move) == position]
        if not walls:
            sentences.append("There are no walls near you.")
        else:
            sentences.append(f"There {'is a wall' if len(walls) == 1 else 'are walls'} {', '.join(walls)}.")
        return " ".join(sentences) + "\n"

    # ---------------------------------------------------------------------------------------------------------- extras
    def act(self, player: str, rng: np.random.Generator) -> str:
        """random: each of the four moves with equal probability. optimal: the first move, in their order, on a shortest
        path."""
        if player == "random":
            return str(rng.choice(list(MOVES)))
        return min(MOVES, key=lambda text: self.distance[_after(self.position, MOVES[text])])

    def allowed_actions(self) -> list[str]:
        return list(MOVES)

    def texts(self) -> Iterable[str]:
        return [*(self._describe(start) for start in STARTS), *MOVES]


def _after(position: Position, move: tuple[int, int]) -> Position:
    """The position after a move; unchanged if a wall is in the way."""
    row, column = position[0] + move[0], position[1] + move[1]
    return position if WALLS[row][column] == "1" else (row, column)


def _distances_to_goal() -> dict[Position, int]:
    """Moves on the shortest way to the goal from every open cell, by breadth-first search (moves can be undone)."""
    distance, queue = {GOAL: 0}, deque([GOAL])
    while queue:
        position = queue.popleft()
        for move in MOVES.values():
            neighbour = _after(position, move)
            if neighbour not in distance:
                distance[neighbour] = distance[position] + 1
                queue.append(neighbour)
    return distance
