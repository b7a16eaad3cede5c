"""Recipes by method, for the user's model and data: `lmrl train sft model.path=MODEL data.path=FILE`.

Such a recipe lists what it requires under `arguments`: a key of the recipe, or a short name for one, and what is expected there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lmrl.errors import RecipeError


@dataclass(frozen=True)
class Argument:
    """An argument of a recipe: its name, the key it sets, and what is expected."""

    name: str
    key: str
    what: str


def take_arguments(data: dict[str, Any]) -> list[Argument]:
    """Remove the arguments from a recipe's plain data and return them."""
    stated = data.pop("arguments", None) or {}
    return [
        Argument(name, one["key"], one["what"]) if isinstance(one, dict) else Argument(name, name, one)
        for name, one in stated.items()
    ]


def spelled_out(override: str, arguments: Sequence[Argument]) -> str:
    """An override with its short name replaced by the key; also for keys below it (`prompts.chat=true`)."""
    name, equals, value = override.partition("=")
    for one in arguments:
        if name == one.name:
            return f"{one.key}{equals}{value}"
        section, below = one.name.rpartition(".")[0], one.key.rpartition(".")[0]
        if section and section != below and name.startswith(f"{section}."):
            return f"{below}.{name.removeprefix(f'{section}.')}{equals}{value}"
    return override


def check_arguments(data: dict[str, Any], arguments: list[Argument], name: str) -> None:
    """Raise RecipeError if a required argument is missing."""
    missing = [one for one in arguments if _lookup(data, one.key) is None]
    if missing:
        example = " ".join(f"{one.name}=..." for one in arguments)
        needs = "; ".join(f"{one.name}: {one.what}" for one in missing)
        raise RecipeError(f"recipe '{name}' needs {needs}. For instance: lmrl train {name} {example}")


def _lookup(data: Any, key: str) -> Any:
    for part in key.split("."):
        data = data.get(part) if isinstance(data, dict) else None
    return data
