"""The recipe that a resumed run may continue with: one that computes the same, or more steps of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lmrl.errors import RunError
from lmrl.recipe import MAIN_STAGE, OWN_TASK, Recipe
from lmrl.recipe.document import dotted, read_yaml
from lmrl.recipe.files import stages_of
from lmrl.run_folders import RECIPE_FILE

FREE_TO_CHANGE = (
    ("training", "checkpoint_every"),
    ("training", "keep_checkpoints"),
    ("training", "microbatch_tokens"),
    ("training", "gradient_checkpointing"),
    ("training", "try_worst_case"),
    ("tracking",),
    ("task", "call_timeout"),
)
"""Recipe keys that a resumed run may change, because they do not change the result, or only its rounding."""
STEPS = ("training", "steps")
"""The key of the recipe, or of a stage, that a resumed run may raise."""


def resumed_recipe(folder: Path, own: Recipe, recipe: Recipe) -> Recipe:
    """The recipe that the run in a folder, whose own recipe is `own`, continues with. Raises RunError if it does not compute
    the same."""
    recipe = _as_before(recipe, folder)
    different = _differences(own.model_dump(mode="json"), recipe.model_dump(mode="json"))
    _refuse_fewer_steps(folder, own, recipe)
    if different:
        raise RunError(
            f"{folder} was made with another recipe: '{'.'.join(different[0])}' differs"
            f"{f' (and {len(different) - 1} more)' if len(different) > 1 else ''}; "
            "resume it without overrides, or start a new run with another --output"
        )
    return recipe


def _as_before(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe, evaluated as in that folder's run, which may be older than the evaluation of recipes without a
    suite."""
    written = read_yaml(folder / RECIPE_FILE).data
    if "final" in written.get("training", {}):
        return recipe
    evaluation, before = recipe.evaluation, written.get("evaluation", {})
    suite = before.get("suite") if evaluation.suite == OWN_TASK else evaluation.suite
    every = before.get("every", 0) if evaluation.every is None else evaluation.every
    return recipe.model_copy(update={"evaluation": evaluation.model_copy(update={"suite": suite, "every": every})})


def _refuse_fewer_steps(folder: Path, old: Recipe, new: Recipe) -> None:
    after = stages_of(new)
    for name, stage in stages_of(old).items():
        before, now = stage.training.steps, after[name].training.steps if name in after else stage.training.steps
        if now < before:
            key = dotted(STEPS if name == MAIN_STAGE else ("stages", name, *STEPS))
            raise RunError(
                f"{folder}: {key}={now} is less than the run's {before}: a resumed run may only have more steps"
            )


def _differences(old: Any, new: Any, keys: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    if keys in FREE_TO_CHANGE or old == new or keys == STEPS or keys[:1] == ("stages",) and keys[2:] == STEPS:
        return []
    if keys[:1] == ("stages",) and keys[2:] == STEPS[:1]:  # a stage that inherits all of `training` from the recipe
        old, new = old or {}, new or {}
    if isinstance(old, dict) and isinstance(new, dict):
        names = dict.fromkeys([*old, *new])
        return [found for name in names for found in _differences(old.get(name), new.get(name), (*keys, name))]
    return [keys]
