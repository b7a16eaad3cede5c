"""Objectives turn trajectories into a batch, and a batch into a loss. Pure tensor code, one short file each."""

from __future__ import annotations

from lmrl.errors import PluginError
from lmrl.objectives.base import Loss, Objective
from lmrl.plugins import registry
from lmrl.recipe import CustomObjective, ObjectiveOptions
from lmrl.secrets import expand

__all__ = ["Loss", "Objective", "load_objective"]


def load_objective(options: ObjectiveOptions) -> Objective:
    """The objective of a recipe section. A custom objective without `Options` gets the section's further keys as
    keyword arguments."""
    cls = registry.load("objective", options.name, "objective.name")
    own = expand(options.options, "objective") if isinstance(options, CustomObjective) else None
    try:
        objective = cls(options) if own is None else cls(**own)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise PluginError(f"objective: '{options.name}' cannot be made with these options: {reason}") from error
    if not isinstance(objective, Objective):
        raise PluginError(f"objective.name: '{options.name}' is not an lmrl.Objective")
    return objective
