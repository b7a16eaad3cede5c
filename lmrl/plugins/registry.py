"""The names that recipes give to code: shipped, of installed packages, and registered in this process.

    @lmrl.register("objective", "tilted")
    class Tilted(lmrl.Objective): ...

A package registers its parts with an entry point of the group `lmrl.objectives` (`lmrl.engines`, ...):

    [options.entry_points]
    lmrl.objectives =
        tilted = my_package:Tilted

Code without a registered name is given by its location, `file.py:Tilted` or `my_package.Tilted`. Nothing is imported
before a run needs it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import metadata
from typing import Any, Literal, TypeVar

from lmrl.errors import PluginError, did_you_mean
from lmrl.plugins.loading import load_plugin
from lmrl.plugins.objects import find, is_object, maker

Kind = Literal["objective", "source", "engine", "environment", "reward", "listener", "suite", "tracker"]
T = TypeVar("T")

SHIPPED: dict[str, dict[str, str]] = {
    "objective": {
        "likelihood": "lmrl.objectives.likelihood:Likelihood",
        "ppo": "lmrl.objectives.ppo:PPO",
        "archer": "lmrl.objectives.archer:ArCHer",
        "ilql": "lmrl.objectives.ilql:ILQL",
        "mc": "lmrl.objectives.mc:MCReturns",
        "q_sft": "lmrl.objectives.q_sft:QSFT",
        "dpo": "lmrl.objectives.dpo:DPO",
        "grpo": "lmrl.objectives.grpo:GRPO",
        "dr_grpo": "lmrl.objectives.dr_grpo:DrGRPO",
        "rloo": "lmrl.objectives.rloo:RLOO",
        "reinforce_pp": "lmrl.objectives.reinforce_pp:ReinforcePP",
    },
    "source": {
        "rollouts": "lmrl.sources.fresh:FreshRollouts",
        "dataset": "lmrl.sources.dataset:Dataset",
        "mixture": "lmrl.sources.mixture:Mixture",
        "blend": "lmrl.sources.blend:Blend",
    },
    "engine": {
        "hf": "lmrl.engines.hf:HFEngine",
        "vllm": "lmrl.engines.vllm:VLLMEngine",
        "vllm-server": "lmrl.engines.vllm_server.engine:VLLMServerEngine",
    },
    "environment": {
        "random_walks": "lmrl.environments.random_walks:RandomWalks",
        "maze": "lmrl.environments.maze:Maze",
        "nim": "lmrl.environments.nim:Nim",
    },
    "reward": {},
    "listener": {},
    "suite": {},
    "tracker": {
        "aim": "accelerate.tracking:AimTracker",
        "clearml": "accelerate.tracking:ClearMLTracker",
        "comet_ml": "accelerate.tracking:CometMLTracker",
        "dvclive": "accelerate.tracking:DVCLiveTracker",
        "mlflow": "accelerate.tracking:MLflowTracker",
        "swanlab": "accelerate.tracking:SwanLabTracker",
        "tensorboard": "accelerate.tracking:TensorBoardTracker",
        "trackio": "accelerate.tracking:TrackioTracker",
        "wandb": "accelerate.tracking:WandBTracker",
    },
}
_registered: dict[str, dict[str, Any]] = {kind: {} for kind in SHIPPED}


def register(kind: Kind, name: str) -> Callable[[T], T]:
    """A decorator that gives a class (for a suite: a file's path) a name in this process. Raises PluginError for a name
    that is taken."""
    if kind not in SHIPPED:
        raise PluginError(f"there is no kind '{kind}'{did_you_mean(kind, SHIPPED)}")
    if name in SHIPPED[kind] or name in installed(kind):
        raise PluginError(f"the {kind} '{name}' is taken: choose another name")

    def keep(thing: T) -> T:
        _registered[kind][name] = thing
        return thing

    return keep


@cache
def _entry_points() -> Any:
    """Entry points of all installed packages (metadata.EntryPoints), read once."""
    return metadata.entry_points()


@cache
def installed(kind: Kind) -> dict[str, metadata.EntryPoint]:
    """The entry points of installed packages, by name. A shipped name cannot be taken."""
    found = _entry_points().select(group=f"lmrl.{kind}s")
    return {point.name: point for point in found if point.name not in SHIPPED[kind]}


def names(kind: Kind) -> list[str]:
    return [*SHIPPED[kind], *installed(kind), *_registered[kind]]


def has_name(kind: Kind, name: Any) -> bool:
    """True if `load` can find the name: a known name, `file.py:Name` or a dotted path."""
    return isinstance(name, str) and (":" in name or "." in name or name in names(kind))


def unknown(kind: Kind, name: Any) -> str:
    """The message about an unknown name."""
    hint = did_you_mean(str(name), names(kind))
    return f"no {kind} is called '{name}'{hint or '; your own code is named file.py:NAME or package.module.NAME'}"


def load(kind: Kind, name: str, key: str) -> Any:
    """The class that a name stands for. key: the recipe's key, for messages. Raises PluginError."""
    if is_object(name):
        found = find(name, key)
        return maker(found) if kind == "environment" else found
    if name in SHIPPED[kind]:
        return load_plugin(SHIPPED[kind][name], key)
    if name in _registered[kind]:
        return _registered[kind][name]
    if name in installed(kind):
        return load_plugin(installed(kind)[name].value, f"{key}={name}")
    if not has_name(kind, name):
        raise PluginError(f"{key}: {unknown(kind, name)}")
    return load_plugin(name, key)
