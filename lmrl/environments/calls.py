"""Calls of environments, with what they return checked."""

from __future__ import annotations

import inspect
import math
import numbers
from typing import Any

from lmrl.plugins.foreign import CallTimedOut, foreign
from lmrl.secrets import redact
from lmrl.trajectories.fields import checked_messages
from lmrl.trajectories.trajectory import LARGEST_REWARD, is_reward

NOT_ITS_OWN = ("opponent ", "model ", "endpoint ")
"""Prefixes of failures that are not the environment's, and that do not recur when its episode is played again."""


class EpisodeFailed(Exception):
    """An episode's environment or one of its players failed, and so does the episode. Other errors are the run's."""


def call_player(environment: Any, player: str, rng: Any, limit: float | None = None) -> str:
    """The action of a scripted player, checked."""
    with foreign("the environment", limit):
        action = environment.act(player, rng)
    if not isinstance(action, str):
        raise TypeError(f"act({player!r}, ...) returned {action!r:.60} ({type(action).__name__}); expected text")
    action.encode()  # raises for lone surrogates, which no tokenizer reads
    return action


def begin_episode(
    environment: Any, seed: int | None, start: int | None, limit: float | None = None
) -> tuple[Any, dict[str, Any]]:
    """An environment's first observation, checked, and its info. start: number of the start state (None: the seed
    decides).

    limit: seconds that the call may take.
    """
    arguments = {"seed": seed, "options": None if start is None else {"start": start}}
    try:
        with foreign("the environment", limit):
            result = environment.reset(**arguments)
    except TypeError as error:
        signature = inspect.signature(environment.reset)
        try:
            signature.bind(**arguments)
        except TypeError:
            raise TypeError(
                f"reset{signature} must take gymnasium's arguments: reset(self, *, seed=None, options=None)"
            ) from error
        raise
    observation, info = unpacked("reset", result, ("observation", "info"))
    return check_text(observation), info


def take_step(
    environment: Any, action: str, limit: float | None = None
) -> tuple[Any, float, bool, bool, dict[str, float | None]]:
    """A step of an environment, checked: observation, reward, terminated, truncated, metrics."""
    with foreign("the environment", limit):
        result = environment.step(action)
    observation, reward, terminated, truncated, info = unpacked(
        "step", result, ("observation", "reward", "terminated", "truncated", "info")
    )
    observation, reward = check_text(observation), checked_reward(reward)
    terminated, truncated = checked_flag("terminated", terminated), checked_flag("truncated", truncated)
    return observation, reward, terminated, truncated, checked_metrics(info)


def allowed_actions(environment: Any, limit: float | None = None) -> tuple[str, ...] | None:
    """The actions that an environment allows next (None: any), checked. limit: seconds that the call may take."""
    with foreign("the environment", limit):
        actions = environment.allowed_actions()
    if actions is None:
        return None
    if isinstance(actions, str) or not all(isinstance(text, str) and text for text in actions) or not len(actions):
        raise TypeError(f"allowed_actions() returned {actions!r:.60}; expected a list of texts, or None for any")
    return tuple(dict.fromkeys(actions))


def check_text(observation: Any) -> Any:
    """Observations are text; a prompt may also be a list of messages."""
    if not isinstance(observation, str | list):
        raise TypeError(
            f"the observation is {observation!r:.60} ({type(observation).__name__}), expected text: write it out, or register "
            "the game with gymnasium and name it gymnasium:MODULE:ID"
        )
    messages = checked_messages(observation, "observation") if isinstance(observation, list) else ()
    for text in [message["content"] for message in messages] or [observation]:
        text.encode()  # raises for lone surrogates, which no tokenizer reads
    return observation


def unpacked(method: str, result: Any, names: tuple[str, ...]) -> tuple[Any, ...]:
    """The values that an environment's method returned, checked for their number."""
    if not isinstance(result, tuple | list) or len(result) != len(names):
        count = f"{len(result)} values" if isinstance(result, tuple | list) else f"a {type(result).__name__}"
        old = (
            " (older gym returns four: its `done` is `terminated` here)"
            if method == "step" and len(names) - 1 == _len(result)
            else ""
        )
        raise TypeError(f"{method}() returned {count}; expected {', '.join(names)}{old}")
    if not isinstance(result[-1], dict):
        raise TypeError(f"{method}() returned the info {result[-1]!r:.60}; expected an object")
    return tuple(result)


def _len(result: Any) -> int:
    return len(result) if isinstance(result, tuple | list) else 0


def checked_reward(value: Any) -> float:
    value = _plain(value)
    if not isinstance(value, numbers.Real):
        raise TypeError(f"step() returned the reward {value!r:.60} ({type(value).__name__}); expected a number")
    if not is_reward(float(value)):
        raise ValueError(f"step() returned the reward {value}; expected a finite number up to {LARGEST_REWARD:g}")
    return float(value)


def checked_metrics(info: dict[str, Any]) -> dict[str, float | None]:
    """The metrics of a step's info: finite numbers, or None if there is nothing to measure."""
    metrics = info.get("metrics", {})
    if not isinstance(metrics, dict):
        raise TypeError(f"step() returned info['metrics']={metrics!r:.60}; expected an object of numbers")
    return {name: None if value is None else _metric(name, value) for name, value in metrics.items()}


def _metric(name: str, value: Any) -> float:
    value = _plain(value)
    if not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise TypeError(
            f"step() returned the metric '{name}'={value!r:.60} ({type(value).__name__}); expected a finite number, or None"
        )
    return float(value)


def checked_flag(name: str, value: Any) -> bool:
    value = _plain(value)
    if not isinstance(value, bool | int) or value not in (0, 1):
        raise TypeError(f"step() returned {name}={value!r:.60}; expected true or false")
    return bool(value)


def _plain(value: Any) -> Any:
    """A scalar of numpy or torch as a number of Python."""
    return value.item() if hasattr(value, "item") and getattr(value, "ndim", None) == 0 else value


def failure_text(error: BaseException) -> str:
    if isinstance(error, CallTimedOut):
        return f"environment {error}"
    return redact(f"environment raised {type(error).__name__}: {error}")
