"""Turning a recipe's reward section into a callable on batches."""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import Callable, Collection, Coroutine, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lmrl.coroutines import is_async
from lmrl.errors import LmrlError, PluginError, RewardError, did_you_mean
from lmrl.plugins import registry
from lmrl.plugins.foreign import CallTimedOut, foreign
from lmrl.recipe import STAGE_PREFIX, Reward, SpecialTokens
from lmrl.rewards.rewards import RewardFunction
from lmrl.rewards.scale import Scale
from lmrl.rewards.workers import TimedOut, pool_of
from lmrl.secrets import expand, plain_url, remember_named


def load_rewards(
    specs: Sequence[Reward], special_tokens: SpecialTokens = "text", limit: float | None = None
) -> list[RewardFunction]:
    """The rewards of `task.rewards`, in this process or in their own workers.

    special_tokens: the task's, for reward models that do not set it in their options. limit: `task.call_timeout`.
    """
    own = [
        spec.model_copy(update={"options": {"special_tokens": special_tokens} | spec.options}) if spec.models else spec
        for spec in specs
    ]
    return [load_reward(spec, f"task.rewards.{index}", limit) for index, spec in enumerate(own)]


LIMITS_ITSELF = "limits_itself"
"""Attribute of a callable that limits its own run time."""
NEEDS = "needs"
"""Attribute of a callable with the names of the columns that it cannot be called without."""


def load_reward(spec: Reward, key: str, limit: float | None = None) -> RewardFunction:
    """One reward. Raises PluginError if it cannot be loaded, here or in a worker.

    limit: seconds that a call may take if the reward has no `timeout`, wherever it runs.
    """
    if spec.timeout is not None or spec.kind != "function" or spec.what.startswith("lmrl."):
        limit = None  # lmrl's own rewards limit each request, or compute for as long as a batch takes
    if unknown := [model for model in spec.models if model.startswith(STAGE_PREFIX)]:
        raise RewardError(
            f"{key}.model: '{unknown[0]}' is a run's reward model, but no run is given here: name its folder"
        )
    remember_named({"url": spec.url, "options": spec.options})
    workers = spec.workers
    if spec.kind == "model" and spec.timeout is not None:
        workers = max(workers, 1)  # without a copy of its weights in this process
    if workers == 0:
        call = local_call(spec, key, limit)
        if spec.timeout is not None and not getattr(call, LIMITS_ITSELF):
            workers = 1  # only a worker can be stopped if the function hangs
    if workers > 0:
        call = pool_of(spec.model_dump(mode="json"), key, workers, spec.timeout or limit)
    return RewardFunction(
        label=spec.label,
        origin=origin_of(spec),
        weight=spec.weight,
        call=call,
        parallel=max(workers, 1),
        timeout=spec.timeout,
        retries=spec.retries,
        scale=Scale(spec.normalize, spec.clip),
        is_remote=workers > 0 or spec.kind == "url",
        needs=getattr(call, NEEDS),
    )


def local_call(spec: Reward, key: str, limit: float | None = None) -> Callable[..., Any]:
    """The function, to be called with columns by name in this process.

    A class is instantiated with its `options`; a function gets them with every call. limit: see load_reward.
    """
    name, options = spec.target()
    options = expand(options, f"{key}.options")
    key = f"{key}.{spec.kind}"
    found = registry.load("reward", name, key)
    if inspect.isclass(found):
        found, options = make_instance(found, options, spec.what, key), {}
    if not callable(found):
        raise PluginError(f"{key}: '{spec.what}' is a {type(found).__name__}, not a function")
    parameters = inspect.signature(found).parameters.values()
    takes_all = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)
    names = {parameter.name for parameter in parameters}
    unknown = set() if takes_all else set(options) - names
    if unknown:
        raise PluginError(f"{key}: '{spec.what}' takes no option '{sorted(unknown)[0]}' (it takes {', '.join(names)})")
    timeout = spec.timeout if is_async(found) else None
    call = partial(_call, found, None if takes_all else names, options, timeout, limit, origin_of(spec))
    setattr(call, LIMITS_ITSELF, is_async(found) or spec.kind == "url")
    setattr(call, NEEDS, needs_of(found, options))
    return call


def needs_of(function: Any, options: Collection[str]) -> list[str]:
    """Parameters that a reward cannot be called without. options: those that the recipe sets, which a class does not
    get with its calls."""
    if not callable(function):
        return []
    is_class = inspect.isclass(function)
    parameters = inspect.signature(function.__call__ if is_class else function).parameters.values()
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [
        one.name
        for one in list(parameters)[is_class:]
        if one.kind in by_name and one.default is one.empty and (is_class or one.name not in options)
    ]


def reward_object(spec: Reward) -> Any:
    """The object that the reward names: a function, or an instance of a class, constructed with the options."""
    call = local_call(spec, "reward")
    assert isinstance(call, partial)
    return call.args[0]


def make_instance(cls: type, options: dict[str, Any], name: str, key: str) -> Any:
    """An instance of a class, constructed with options. name, key: for messages. Raises PluginError."""
    try:
        parameters = inspect.signature(cls).parameters
        if not any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters.values()):
            for option in set(options) - set(parameters):
                raise PluginError(f"{key}: '{name}' takes no option '{option}'{did_you_mean(option, parameters)}")
        with foreign(f"reward {name}"):
            return cls(**options)
    except PluginError:
        raise
    except LmrlError as error:
        raise type(error)(f"{key}: {error}") from error
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise PluginError(f"{key}: '{name}' cannot be made with these options: {reason}") from error


def _call(
    function: Callable[..., Any],
    names: set[str] | None,
    options: dict[str, Any],
    timeout: float | None,
    limit: float | None,
    origin: str,
    /,
    **columns: Any,
) -> Any:
    """Call a function with the columns it takes; an async one is awaited for at most `timeout` seconds."""
    chosen = {name: value for name, value in columns.items() if names is None or name in names}
    try:
        with foreign(f"reward {origin}", limit):
            result = function(**chosen | options)
            return _await(result, timeout) if inspect.iscoroutine(result) else result
    except CallTimedOut as error:
        raise TimedOut(str(error)) from error


def _await(coroutine: Coroutine[Any, Any, Any], timeout: float | None) -> Any:
    """Wait for a coroutine, even if this thread has a running event loop, as in a notebook."""

    async def limited() -> Any:
        try:
            return await asyncio.wait_for(coroutine, timeout)
        except TimeoutError as error:
            if timeout is None:
                raise
            raise TimedOut(f"timed out after {timeout:g} s") from error

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(limited())
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.extend((True, asyncio.run(limited())))
        except BaseException as error:
            outcome.extend((False, error))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    finished, value = outcome
    if not finished:
        raise value
    return value


def origin_of(spec: Reward) -> str:
    """A reward's name in messages: `file.py:function`, a dotted path, an address, or a model's name."""
    if spec.models:
        return spec.label
    if spec.kind == "url":
        return plain_url(spec.what) if "://" in spec.what else spec.what
    file, colon, name = spec.what.rpartition(":")
    return f"{Path(file).name}:{name}" if colon and file.endswith(".py") else spec.what
