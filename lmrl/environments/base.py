"""What lmrl asks of an environment, beyond gymnasium's `reset` and `step`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import gymnasium
import numpy as np

from lmrl.errors import PluginError


class TextEnvironment(gymnasium.Env):
    """A `gymnasium.Env` with text observations and text actions.

    Any gymnasium environment of that kind can be played. What this class adds is optional:

    - `num_starts`: how many distinct start states there are; `reset(options={"start": i})` then begins in the i-th,
      so that rollouts and evaluation go through all of them. None: `reset(seed=...)` draws one.
    - `players`: names of scripted players, with `act` giving their next action. `optimal` is the exact optimum.
    - `texts()`: samples of all observations and actions, from which a model built from scratch takes its vocabulary.
    - `info["metrics"]` of the last step: a dict of numbers that evaluation reports beside `return`.
    - `metric_limits`: of such metrics and of `return`, by name, the lowest and highest value that is possible;
      95 % intervals stay within. Metrics that are always 0 or 1 need none.
    """

    num_starts: int | None = None
    players: tuple[str, ...] = ()
    metric_limits: dict[str, tuple[float, float]] = {}
    observation_space = gymnasium.spaces.Text(max_length=100_000)
    action_space = gymnasium.spaces.Text(max_length=100_000)

    def act(self, player: str, rng: np.random.Generator) -> str:
        """The scripted player's action in the current state."""
        raise NotImplementedError(f"{type(self).__name__} has no player '{player}'")

    def texts(self) -> Iterable[str]:
        return ()


def limits_of(environment: Any) -> dict[str, tuple[float, float]]:
    """The environment's `metric_limits`, {} where it has none. Raises PluginError for what are not pairs of numbers."""
    limits = getattr(environment, "metric_limits", {})
    try:
        pairs = {str(name): (float(low), float(high)) for name, (low, high) in limits.items()}
        if all(low < high for low, high in pairs.values()):
            return pairs
    except (AttributeError, TypeError, ValueError):
        pass
    raise PluginError(
        f"task.environment: metric_limits of {type(environment).__name__} is {limits!r}: map names of metrics to "
        "(LOWEST, HIGHEST), for instance {'return': (0, 1)}"
    )
