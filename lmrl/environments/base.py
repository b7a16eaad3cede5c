"""What lmrl asks of an environment, beyond gymnasium's `reset` and `step`."""

from __future__ import annotations

from collections.abc import Iterable

import gymnasium
import numpy as np


class TextEnvironment(gymnasium.Env):
    """A `gymnasium.Env` with text observations and text actions.

    Any gymnasium environment of that kind can be played. What this class adds is optional:

    - `num_starts`: how many distinct start states there are; `reset(options={"start": i})` then begins in the i-th,
      so that rollouts and evaluation go through all of them. None: `reset(seed=...)` draws one.
    - `players`: names of scripted players, with `act` giving their next action. `optimal` is the exact optimum.
    - `texts()`: samples of all observations and actions, from which a model built from scratch takes its vocabulary.
    - `info["metrics"]` of the last step: a dict of numbers that evaluation reports beside `return`.
    """

    num_starts: int | None = None
    players: tuple[str, ...] = ()
    observation_space = gymnasium.spaces.Text(max_length=100_000)
    action_space = gymnasium.spaces.Text(max_length=100_000)

    def act(self, player: str, rng: np.random.Generator) -> str:
        """The scripted player's action in the current state."""
        raise NotImplementedError(f"{type(self).__name__} has no player '{player}'")

    def texts(self) -> Iterable[str]:
        return ()
