"""Text environments: gymnasium environments whose observations and actions are strings."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from lmrl import registry
from lmrl.environments.base import TextEnvironment, limits_of, version_of
from lmrl.errors import LmrlError, PluginError
from lmrl.foreign import foreign
from lmrl.secrets import expand

__all__ = ["TextEnvironment", "environment_factory", "limits_of", "version_of"]


def environment_factory(task: Any) -> Callable[[], Any]:
    """A function that makes one environment of a recipe's `task` section."""
    cls = registry.load("environment", task.environment, "task.environment")
    make = partial(_make, cls, task.environment, expand(task.options, "task"))
    try:
        environment = make()
    except LmrlError:
        raise
    except (Exception, SystemExit) as error:
        reason = f"{type(error).__name__}: {error}"
        raise PluginError(
            f"task: environment '{task.environment}' cannot be made with these options: {reason}"
        ) from error
    for method in ("reset", "step"):
        if not callable(getattr(environment, method, None)):
            raise PluginError(
                f"task.environment: '{task.environment}' has no {method}(): it is no gymnasium environment"
            )
    return make


def _make(cls: type, name: str, options: dict[str, Any]) -> Any:
    with foreign(f"environment {name}"):
        return cls(**options)
