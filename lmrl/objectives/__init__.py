"""Objectives: what turns trajectories into a batch and a loss. Pure tensor code, one short file each."""

from __future__ import annotations

from typing import Any

from lmrl.errors import PluginError
from lmrl.objectives.base import Loss, Objective
from lmrl.plugins import load_plugin
from lmrl.recipe import CustomObjective

SHIPPED = {
    "likelihood": "lmrl.objectives.likelihood:Likelihood",
    "ppo": "lmrl.objectives.ppo:PPO",
    "ilql": "lmrl.objectives.ilql:ILQL",
    "mc": "lmrl.objectives.mc:MCReturns",
    "q_sft": "lmrl.objectives.q_sft:QSFT",
    "dpo": "lmrl.objectives.dpo:DPO",
    "grpo": "lmrl.objectives.grpo:GRPO",
    "dr_grpo": "lmrl.objectives.dr_grpo:DrGRPO",
    "rloo": "lmrl.objectives.rloo:RLOO",
    "reinforce_pp": "lmrl.objectives.reinforce_pp:ReinforcePP",
}

__all__ = ["SHIPPED", "Loss", "Objective", "load_objective"]


def load_objective(options: Any) -> Objective:
    """The objective of a recipe section; a plug-in gets its further keys as keyword arguments."""
    if not isinstance(options, CustomObjective):
        return load_plugin(SHIPPED[options.name], "objective.name")(options)
    cls = load_plugin(options.name, "objective.name")
    try:
        objective = cls(**options.options)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise PluginError(f"objective: '{options.name}' cannot be made with these options: {reason}") from error
    if not isinstance(objective, Objective):
        raise PluginError(f"objective.name: '{options.name}' is not a lmrl.objectives.Objective")
    return objective
