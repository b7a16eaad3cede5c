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

ADAPTERS = {
    "gymnasium": "lmrl.environments.gymnasium_text:GymnasiumText",
    "reasoning_gym": "lmrl.environments.reasoning:ReasoningGym",
}
"""Adapters for environments of other libraries, by the name before the colon."""

__all__ = ["TextEnvironment", "environment_factory", "limits_of", "version_of"]


def environment_factory(task: Any) -> Callable[[], Any]:
    """A function that makes one environment of a recipe's `task` section."""
    name, options = adapted(task.environment, expand(task.options, "task"))
    cls = registry.load("environment", name, "task.environment")
    make = partial(_make, cls, task.environment, options)
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


def adapted(name: str, options: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The class that plays an environment of another library, named LIBRARY:ID, and its options; others as they are."""
    library, colon, id = name.partition(":")
    return (ADAPTERS[library], options | {"id": id}) if colon and library in ADAPTERS else (name, options)


def _make(cls: type, name: str, options: dict[str, Any]) -> Any:
    with foreign(f"environment {name}"):
        return cls(**options)
