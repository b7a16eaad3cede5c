"""`lmrl cp`: copy a recipe or suite to edit."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lmrl.cli.common import Debug
from lmrl.cli.completion import recipes
from lmrl.errors import RecipeError, RunError
from lmrl.recipe.files import find_yaml, is_suite
from lmrl.shipped import shipped


def command(
    name: Annotated[
        str,
        typer.Argument(
            help="A recipe, a suite, or a file of reward_models/ such as sentiment.py", autocompletion=recipes
        ),
    ],
    destination: Annotated[Path, typer.Argument(help="File or folder to write to")] = Path("."),
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing file")] = False,
    debug: Debug = False,
) -> None:
    """Copy a recipe (or a suite, or a reward) to edit."""
    source = _find(name)
    target = destination / source.name if destination.is_dir() or destination.suffix == "" else destination
    if target.exists() and not force:
        raise RunError(f"{target} exists: choose another destination, or overwrite it with --force")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(source.read_text())
    print(target)


def _find(name: str) -> Path:
    if name.endswith(".py"):
        path = shipped("reward_models") / name
        if path.is_file() and path.name != "__init__.py":
            return path
        raise RecipeError(f"no shipped reward file called '{name}'")
    return find_yaml(name, "eval" if is_suite(name) else "recipes")
