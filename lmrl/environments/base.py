"""The environment interface, beyond gymnasium's `reset` and `step`."""

from __future__ import annotations

import hashlib
import operator
import sys
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np

from lmrl.errors import PluginError
from lmrl.plugins.foreign import foreign


class TextEnvironment(gymnasium.Env):
    """A `gymnasium.Env` with text observations and text actions.

    Any gymnasium environment of that kind can be played. What this class adds is optional:

    - `num_starts`: how many distinct start states there are; `reset(options={"start": i})` then begins in the i-th,
      so that rollouts and evaluation go through all of them. None: `reset(seed=...)` draws one.
    - `players`: names of scripted players, with `act` giving their next action. `optimal` is the exact optimum.
    - `allowed_actions()`: the texts that may answer the last observation (None: any). With `task.allowed_actions=true`
      the policy samples one of these, each by its own probability among them.
    - `texts()`: samples of all observations and actions, from which a model built from scratch takes its vocabulary
      (without it: the letters of printable ASCII).
    - `info["metrics"]` of the last step: a dict of numbers (or None: not measured) that evaluation reports along with
      `return`.
    - `version`: text or a number that changes with what the environment does; `lmrl replay` names it.
    - `metric_limits`: the lowest and highest possible value of such metrics and of `return`, by name; 95 % intervals
      stay within. Metrics that are always 0 or 1 need none.
    """

    num_starts: int | None = None
    players: tuple[str, ...] = ()
    version: str | int | None = None
    metric_limits: dict[str, tuple[float, float]] = {}
    observation_space = gymnasium.spaces.Text(max_length=100_000)
    action_space = gymnasium.spaces.Text(max_length=100_000)

    def act(self, player: str, rng: np.random.Generator) -> str:
        """The scripted player's action in the current state."""
        raise NotImplementedError(f"{type(self).__name__} has no player '{player}'")

    def allowed_actions(self) -> Sequence[str] | None:
        """The actions to choose from now; None: any text."""
        return None

    def texts(self) -> Iterable[str]:
        return ()


def limits_of(environment: Any) -> dict[str, tuple[float, float]]:
    """The environment's `metric_limits`, {} if it has none. Raises PluginError for anything but pairs of numbers."""
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


def sample_texts(environment: Any) -> list[str]:
    """The result of the environment's `texts()`, [] if it has none. Raises PluginError for anything but texts."""
    if not hasattr(environment, "texts"):
        return []
    name = f"task.environment: texts() of {type(environment).__name__}"
    try:
        with foreign("the environment"):
            texts = environment.texts()
            listed = list(texts)
    except (Exception, SystemExit) as error:
        raise PluginError(f"{name} raised {type(error).__name__}: {error}") from error
    if isinstance(texts, str) or not all(isinstance(text, str) for text in listed):
        raise PluginError(f"{name} returned {texts!r:.60}: return a list of texts")
    return listed


def check_extras(environment: Any) -> None:
    """Raise PluginError if what an environment says about itself cannot be used."""
    limits_of(environment)
    players, starts = getattr(environment, "players", ()), getattr(environment, "num_starts", None)
    name = f"of {type(environment).__name__} is"
    if not isinstance(players, tuple | list) or not all(isinstance(player, str) for player in players):
        raise PluginError(
            f"task.environment: players {name} {players!r:.60}: list their names, for instance ('random',)"
        )
    try:
        is_count = starts is None or operator.index(starts) > 0
    except TypeError:
        is_count = False
    if not is_count:
        raise PluginError(
            f"task.environment: num_starts {name} {starts!r:.60}: set the number of start states, or None if the seed draws them"
        )


def version_of(environment: Any) -> dict[str, str | None]:
    """`version`: the environment's own, or else its package's; `source`: a hash of the file that defines it. None:
    unknown."""
    inner = getattr(environment, "game", getattr(environment, "unwrapped", environment))
    module = type(inner).__module__
    own = getattr(inner, "version", None)
    if not isinstance(own, str | int | float):
        try:
            own = metadata.version(module.partition(".")[0])
        except metadata.PackageNotFoundError:
            own = None
    file = getattr(sys.modules.get(module), "__file__", None)
    source = hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16] if file and Path(file).is_file() else None
    return {"version": None if own is None else str(own), "source": source}
