"""The engine that a recipe names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from lmrl.engines.base import Engine
from lmrl.errors import LmrlError, PluginError
from lmrl.plugins import registry
from lmrl.policy.policy import Policy
from lmrl.recipe import Rollouts


def build_engine(
    options: Rollouts, policy: Policy, check: Callable[[], None] = lambda: None, folder: Path | None = None
) -> Engine:
    """The engine that a recipe's `rollouts` section names. folder: the run's, for logs (None: a temporary one)."""
    cls = registry.load("engine", options.engine, "rollouts.engine")
    if not (isinstance(cls, type) and issubclass(cls, Engine)):
        raise PluginError(f"rollouts.engine: '{options.engine}' is not an lmrl.Engine")
    try:
        return cls.build(policy, options, check, folder)
    except (LmrlError, MemoryError):
        raise
    except Exception as error:
        if options.engine in registry.SHIPPED["engine"]:
            raise
        reason = f"{type(error).__name__}: {error}"
        raise PluginError(
            f"rollouts.engine: '{options.engine}' cannot be made with rollouts.options: {reason}"
        ) from error
