"""Running reward functions: `f(prompts, completions, **columns) -> list[float | None]`, plain or async.

A function is called once a batch. It gets every column of the prompts' file by name, or those that its signature
names. None means "not judged". In place of a number stands an object where there is more to record: `{"score": 1.2,
"std": 0.3}`. A failure is data: the sample is left out and counted, and never becomes a zero.
"""

from __future__ import annotations

import asyncio
import inspect
import math
import numbers
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lmrl.errors import EpisodeError, LmrlError, PluginError, RewardError, did_you_mean
from lmrl.plugins import load_plugin
from lmrl.recipe import STAGE_PREFIX, Reward
from lmrl.rewards.scale import Scale
from lmrl.trajectories.trajectory import Trajectory


@dataclass
class RewardFunction:
    """A reward of a recipe, ready to be called. `origin` is `file.py:function`, for messages."""

    label: str
    origin: str
    weight: float
    call: Callable[..., Any]
    scale: Scale = field(default_factory=Scale)


@dataclass
class Scores:
    """One function's verdict on a batch: a number or None for each row, the cause where there is none, and extras."""

    values: list[float | None]
    causes: list[str | None]
    extras: list[dict[str, float]]
    """Further numbers that the function wants recorded, by name."""


def load_rewards(specs: Sequence[Reward]) -> list[RewardFunction]:
    """Import the functions of `task.rewards`, and load its models; a class is instantiated with its `options`."""
    return [_load(spec, f"task.rewards.{index}") for index, spec in enumerate(specs)]


def _load(spec: Reward, key: str) -> RewardFunction:
    scale = Scale(spec.normalize, spec.clip)
    if unknown := [model for model in spec.models if model.startswith(STAGE_PREFIX)]:
        raise RewardError(
            f"{key}.model: '{unknown[0]}' is the reward model of a run that is not at hand here: name its folder"
        )
    if spec.models:
        from lmrl.rewards.model import RewardModel

        model = _make(RewardModel, {"model": spec.model, **spec.options}, "RewardModel", f"{key}.model")
        return RewardFunction(spec.label, spec.label, spec.weight, model, scale)
    key = f"{key}.function"
    found = load_plugin(spec.function, key)
    options = dict(spec.options)
    if inspect.isclass(found):
        found, options = _make(found, options, spec.function, key), {}
    if not callable(found):
        raise PluginError(f"{key}: '{spec.function}' is a {type(found).__name__}, not a function")
    file, colon, name = spec.function.rpartition(":")
    origin = f"{Path(file).name}:{name}" if colon and file.endswith(".py") else spec.function
    parameters = inspect.signature(found).parameters.values()
    takes_all = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)
    names = {parameter.name for parameter in parameters}
    unknown = set() if takes_all else set(options) - names
    if unknown:
        raise PluginError(
            f"{key}: '{spec.function}' takes no option '{sorted(unknown)[0]}' (it takes {', '.join(names)})"
        )

    def call(**arguments: Any) -> Any:
        chosen = {name: value for name, value in arguments.items() if takes_all or name in names}
        result = found(**chosen, **options)
        return asyncio.run(result) if inspect.iscoroutine(result) else result

    return RewardFunction(spec.label, origin, spec.weight, call, scale)


def _make(cls: type, options: dict[str, Any], name: str, key: str) -> Any:
    try:
        parameters = inspect.signature(cls).parameters
        if not any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters.values()):
            for option in set(options) - set(parameters):
                raise PluginError(f"{key}: '{name}' takes no option '{option}'{did_you_mean(option, parameters)}")
        return cls(**options)
    except PluginError:
        raise
    except LmrlError as error:
        raise type(error)(f"{key}: {error}") from error
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise PluginError(f"{key}: '{name}' cannot be made with these options: {reason}") from error


def score(function: RewardFunction, arguments: dict[str, list[Any]]) -> Scores:
    """Call a function on a batch of columns.

    An exception in the batch is narrowed down by calling row by row, so that it costs only the rows that cause it. A
    result of the wrong length or type raises RewardError: that is a mistake in the function, not a hard sample.
    """
    rows = len(arguments["prompts"])
    try:
        result = function.call(**arguments)
    except Exception as error:
        if rows == 1:
            return Scores([None], [f"{function.origin} raised {type(error).__name__}: {error}"], [{}])
        singles = [score(function, {name: [column[row]] for name, column in arguments.items()}) for row in range(rows)]
        parts = [(single.values[0], single.causes[0], single.extras[0]) for single in singles]
        return Scores(*map(list, zip(*parts, strict=True)))
    values, causes, extras = [], [], []
    for row, value in enumerate(_checked_list(function, result, rows)):
        extra = {}
        if isinstance(value, dict) and "score" in value:
            extra = {name: _number(function, row, one) for name, one in value.items() if name != "score"}
            value = value["score"]
        number = _number(function, row, value)
        cause = None
        if number is None:
            cause = f"{function.origin} returned None"
        elif not math.isfinite(number):
            number, cause = None, f"{function.origin} returned {value}"
        values.append(number)
        causes.append(cause)
        extras.append({name: one for name, one in extra.items() if one is not None and math.isfinite(one)})
    return Scores(values, causes, extras)


def _checked_list(function: RewardFunction, result: Any, rows: int) -> list[Any]:
    is_list = hasattr(result, "__len__") and hasattr(result, "__iter__") and getattr(result, "ndim", 1) == 1
    if isinstance(result, str | bytes | dict) or not is_list:
        raise RewardError(
            f"reward {function.origin} returned {result!r:.60} ({type(result).__name__}); "
            f"expected a list with one number or None for each of the {rows} rows"
        )
    values = list(result)
    if len(values) != rows:
        where = f"row {len(values)} has no value" if len(values) < rows else f"row {rows} does not exist"
        raise RewardError(
            f"reward {function.origin} returned {len(values)} values for {rows} rows ({where}): {values!r:.80}"
        )
    return values


def _number(function: RewardFunction, row: int, value: Any) -> float | None:
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        value = value.item()  # a numpy or torch scalar
    if value is None:
        return None
    if not isinstance(value, numbers.Real):
        raise RewardError(
            f"reward {function.origin}, row {row}: returned {value!r:.60} ({type(value).__name__}); "
            "expected a number or None"
        )
    return float(value)


def judge(rewards: Sequence[RewardFunction], trajectories: Sequence[Trajectory], learning: bool = False) -> None:
    """Fill `components`, `reward` and `failure` of one-step trajectories and place the reward on their last token.

    The reward is the weighted sum of scores, after their normalisation and clipping; components are the scores as they
    were. A sample that a weighted function did not judge has no reward; a function of weight 0 is only watched.
    learning: these are training samples, which running statistics follow.
    """
    arguments = _arguments(trajectories)
    for trajectory in trajectories:
        trajectory.reward = 0.0
    for function in rewards:
        scores = score(function, arguments)
        scaled = function.scale(scores.values, learning)
        for row, trajectory in enumerate(trajectories):
            trajectory.components[function.label] = scores.values[row]
            trajectory.components |= {f"{function.label}/{name}": one for name, one in scores.extras[row].items()}
            if function.weight == 0:
                continue
            if scaled[row] is None:
                trajectory.reward, trajectory.failure = None, trajectory.failure or scores.causes[row]
            elif trajectory.reward is not None:
                trajectory.reward += function.weight * scaled[row]
    for trajectory in trajectories:
        if trajectory.reward is not None:
            trajectory.place_reward(trajectory.reward)


def _arguments(trajectories: Sequence[Trajectory]) -> dict[str, list[Any]]:
    names = {name: None for trajectory in trajectories for name in trajectory.columns}
    arguments: dict[str, list[Any]] = {
        name: [trajectory.columns.get(name) for trajectory in trajectories] for name in names
    }
    arguments["prompts"] = [trajectory.messages or trajectory.prompt for trajectory in trajectories]
    arguments["completions"] = [
        [{"role": "assistant", "content": trajectory.completion}] if trajectory.messages else trajectory.completion
        for trajectory in trajectories
    ]
    arguments["completion_ids"] = [
        [token for segment in trajectory.segments for token in map(segment.tokens.__getitem__, segment.actions)]
        for trajectory in trajectories
    ]
    return arguments


def drop_failed(trajectories: Sequence[Trajectory], max_failed: float, what: str) -> list[Trajectory]:
    """The judged trajectories. Raises when more than `max_failed` of them, or all, could not be judged."""
    failed = [(row, trajectory) for row, trajectory in enumerate(trajectories) if trajectory.reward is None]
    if len(failed) > max_failed * len(trajectories) or len(failed) == len(trajectories):
        row, first = failed[0]
        error = RewardError if what == "reward" else EpisodeError
        raise error(
            f"{what} failed on {len(failed)} of {len(trajectories)} samples, more than task.max_failed={max_failed} "
            f"allows; first, row {row} ({first.prompt!r:.40} -> {first.completion!r:.40}): {first.failure}"
        )
    return [trajectory for trajectory in trajectories if trajectory.reward is not None]
