"""Objects that a caller hands to `lmrl.train` in place of names: as overrides of the recipe, and as what the run keeps of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lmrl import distributed
from lmrl.errors import RecipeError
from lmrl.plugins.objects import Names, find, is_kind, is_object, named_rewards
from lmrl.policy.given import save_given
from lmrl.recipe import Recipe
from lmrl.recipe.base import plain
from lmrl.run import MODEL_FOLDER, Run

EXPECTED = {
    "model": "a transformers model, (model, tokenizer), a folder or a name",
    "rows": "a list of mappings, a datasets.Dataset, a data frame, a file or a name",
    "environment": "a class, a function, an environment or a name",
}


def objects_as_overrides(given: Mapping[str, Any]) -> list[str]:
    """Arguments of `train` as overrides, with names in place of objects."""
    names = Names()
    keys = {
        "model": ("model.path", "model"),
        "prompts": ("task.prompts.path", "rows"),
        "data": ("source.path", "rows"),
        "rewards": ("task.rewards", ""),
        "environment": ("task.environment", "environment"),
    }
    overrides = []
    for name, value in given.items():
        key, kind = keys[name]
        if not kind:
            try:
                value = plain(named_rewards(value, names))
            except ValueError as error:
                raise RecipeError(f"rewards: {error}") from error
        elif is_kind(value, kind):
            value = names(value)
        elif not isinstance(value, str | Path):
            raise RecipeError(f"{name}: expected {EXPECTED[kind]}, got {_described(value)}")
        overrides.append(f"{key}={json.dumps(value, default=str)}")
    return overrides


def _described(value: Any) -> str:
    if not isinstance(value, list):
        return f"a {type(value).__name__}"
    return f"a list with a {type(value[0]).__name__}" if value else "an empty list"


def at_hand(folder: str | Path | None) -> list[str]:
    """Keys whose objects a run folder holds itself: the model, once it is saved."""
    return ["model.path"] if folder is not None and (Path(folder) / MODEL_FOLDER).is_dir() else []


def with_saved_model(run: Run, recipe: Recipe) -> Recipe:
    """A recipe whose model is an object, with the copy of it that the run keeps in MODEL_FOLDER."""
    name = recipe.model.path
    if name is None or not is_object(name):
        return recipe
    folder = run.folder / MODEL_FOLDER
    if not distributed.broadcast(folder.exists()):
        run.write_folder(folder, lambda scratch: save_given(find(name, "model.path"), scratch))
        distributed.barrier()
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"path": str(folder)})})
