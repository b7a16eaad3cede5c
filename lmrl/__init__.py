"""lmrl: fine-tune language models with reinforcement learning, online and from logged data.

recipe = lmrl.load_recipe("random_walks/ppo", ["training.steps=50"])
result = lmrl.train(recipe, output="runs/mine")
report = lmrl.evaluate(result.folder, suite="random_walks")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = [
    "Engine",
    "Game",
    "Listener",
    "Objective",
    "ObjectiveOptions",
    "Recipe",
    "Source",
    "SourceOptions",
    "TemporaryError",
    "TextEnvironment",
    "compare",
    "evaluate",
    "frontier",
    "load_eval",
    "load_recipe",
    "load_run",
    "plots",
    "provide",
    "register",
    "train",
]

if TYPE_CHECKING:
    from lmrl import plots
    from lmrl.engines.base import Engine
    from lmrl.environments import TextEnvironment
    from lmrl.environments.games import Game
    from lmrl.errors import TemporaryError
    from lmrl.evaluation.api import evaluate
    from lmrl.evaluation.compare import compare
    from lmrl.evaluation.frames import load_eval, load_run
    from lmrl.evaluation.frontier import frontier
    from lmrl.objectives import Objective
    from lmrl.plugins.objects import provide
    from lmrl.plugins.registry import register
    from lmrl.recipe import ObjectiveOptions, Recipe, SourceOptions
    from lmrl.recipe.files import load_recipe
    from lmrl.sources.base import Source
    from lmrl.training.listeners import Listener
    from lmrl.training.train import train

_HOMES = {
    "Engine": "lmrl.engines.base",
    "Game": "lmrl.environments.games",
    "Listener": "lmrl.training.listeners",
    "Objective": "lmrl.objectives",
    "ObjectiveOptions": "lmrl.recipe",
    "Recipe": "lmrl.recipe",
    "Source": "lmrl.sources.base",
    "SourceOptions": "lmrl.recipe",
    "TemporaryError": "lmrl.errors",
    "TextEnvironment": "lmrl.environments",
    "compare": "lmrl.evaluation",
    "evaluate": "lmrl.evaluation",
    "frontier": "lmrl.evaluation",
    "load_eval": "lmrl.evaluation",
    "load_recipe": "lmrl.recipe.files",
    "load_run": "lmrl.evaluation",
    "provide": "lmrl.plugins.objects",
    "register": "lmrl.plugins.registry",
    "train": "lmrl.training",
}


def __getattr__(name: str) -> Any:
    """Import on first use, so that `import lmrl` and the command line start without torch."""
    if name not in (*_HOMES, "plots"):
        raise AttributeError(f"module 'lmrl' has no attribute '{name}'")
    import importlib

    if name == "plots":
        return importlib.import_module("lmrl.plots")
    return getattr(importlib.import_module(_HOMES[name]), name)
