"""Overrides of a recipe's keys: `a.b.c=value`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import yaml

from lmrl.errors import RecipeError, did_you_mean
from lmrl.recipe import CHOICES, MAIN_STAGE, EnvironmentTask
from lmrl.recipe.document import Document, Keys, Loader, check_size, dotted
from lmrl.recipe.methods import Argument, spelled_out

OVERRIDE = "override "
"""How the place of a key begins that an override has set."""


def listed(texts: Sequence[str], name: str = "overrides", example: str = "training.steps=50") -> list[str]:
    """Overrides, or other texts, as a list. Raises RecipeError for anything else, such as a single text, whose letters
    would be taken one by one. name, example: for messages."""
    if isinstance(texts, list | tuple) and all(isinstance(one, str) for one in texts):
        return list(texts)
    raise RecipeError(f"{name}: expected a list of texts, for instance ['{example}'], got {texts!r:.200}")


def apply_overrides(document: Document, overrides: Sequence[str], arguments: Sequence[Argument] = ()) -> None:
    """Apply each `a.b.c=value`, which is read as YAML. Items of a list have an index: `task.rewards.0.weight=2`.
    arguments: those of the recipe, whose short names may stand for keys."""
    for override in listed(overrides):
        _apply(document, spelled_out(override, arguments))


def _apply(document: Document, override: str) -> None:
    name, equals, text = override.partition("=")
    if not equals or not name:
        raise RecipeError(f"override '{override}' is not of the form key=value, for instance training.steps=50")
    try:
        check_size(yaml.compose(text, Loader=Loader), f"override '{override[:60]}'")
        value = yaml.load(text, Loader=Loader)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise RecipeError(f"override '{override[:200]}': the value is not valid YAML") from error
    keys: Keys = tuple(int(part) if part.isdigit() else part for part in name.split("."))
    _check_stage(document.data, keys, override)
    target: Any = document.data
    for depth, key in enumerate(keys[:-1]):
        target = _child(target, key, keys[: depth + 1], override)
    last = keys[-1]
    section = keys[-2] if len(keys) > 1 else None
    if section in CHOICES and last == CHOICES[section][0] and target.get(last) != value:
        _keep_shared(document, keys[:-1], target, override)
    _put(target, last, value, keys, override)
    document.places[keys] = OVERRIDE + override


def _check_stage(data: dict[str, Any], keys: Keys, override: str) -> None:
    """Refuse an override of a stage that does not exist; a new stage is written as a whole: `stages.NAME={...}`."""
    stages = data.get("stages") or {}
    if keys[0] != "stages" or len(keys) < 3 or not isinstance(stages, dict) or str(keys[1]) in map(str, stages):
        return
    if keys[1] == MAIN_STAGE:
        raise RecipeError(
            f"override '{override}': stages.{MAIN_STAGE} is what the top-level keys describe: set {dotted(keys[2:])}"
        )
    raise RecipeError(
        f"override '{override}': the recipe has no stage '{keys[1]}'{did_you_mean(str(keys[1]), map(str, stages))}"
        f"{' ' if stages else '; '}a new one is written as a whole: stages.{keys[1]}={{...}}"
    )


def _keep_shared(document: Document, keys: Keys, given: dict[str, Any], override: str) -> None:
    """Remove keys that another task, source or objective cannot have, and note which; keys common to all tasks stay, and
    those of overrides."""
    section = str(keys[-1])
    choice = CHOICES[section][0]
    shared = EnvironmentTask.model_fields if section == "task" and "environment" in given else ()
    below = {known: place for known, place in document.places.items() if known[: len(keys)] == keys != known}
    overridden = {known[len(keys)] for known, place in below.items() if place.startswith(OVERRIDE)}
    lost = [key for key in given if key not in {*shared, *overridden, choice}]
    for key in [*lost, choice]:
        given.pop(key, None)
    if lost:
        left = ", ".join(f"{section}.{key}" for key in lost)
        document.notes.append(f"override {override} leaves out {left} of the recipe, which may not fit it")


def _child(target: Any, key: str | int, keys: Keys, override: str) -> Any:
    if isinstance(target, list):
        if not isinstance(key, int) or key >= len(target):
            raise RecipeError(f"override '{override}': the list has no item '{dotted(keys)}' (it has {len(target)})")
    elif target.get(key) is None:
        target[key] = {}
    if not isinstance(target[key], dict | list):
        raise RecipeError(f"override '{override}': '{dotted(keys)}' is a single value and has no keys below it")
    return target[key]


def _put(target: Any, key: str | int, value: Any, keys: Keys, override: str) -> None:
    if not isinstance(target, list):
        target[key] = value
    elif isinstance(key, int) and key < len(target):
        target[key] = value
    else:
        raise RecipeError(f"override '{override}': the list has no item '{dotted(keys)}' (it has {len(target)})")
