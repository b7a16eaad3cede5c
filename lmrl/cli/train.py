"""`lmrl train`: run a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lmrl.cli.common import Debug, Overrides
from lmrl.errors import RecipeError
from lmrl.recipe_files import load_recipe
from lmrl.run import RECIPE_FILE, latest_run


def command(
    name: Annotated[
        str | None, typer.Argument(help="A recipe's file or name; with --resume also a run folder, or nothing")
    ] = None,
    overrides: Overrides = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Run folder (default: under runs/)")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where the run stopped")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Try every part on a tiny scale, keep nothing")] = False,
    debug: Debug = False,
) -> None:
    """Train a recipe."""
    if name is not None and "=" in name:
        name, overrides = None, [name, *(overrides or [])]
    folder = _run_to_resume(name, output) if resume else None
    if folder is None and name is None:
        raise RecipeError("name a recipe, for instance: lmrl train random_walks/ppo (lmrl ls shows them all)")
    if dry_run and resume:
        raise RecipeError("--dry-run tries a recipe from its start: leave --resume out")
    is_run = name is not None and (Path(name) / RECIPE_FILE).is_file()
    if is_run and not resume:
        raise RecipeError(f"'{name}' is a run folder: go on with it by --resume")
    recipe = load_recipe(name, overrides or []) if name is not None and not is_run else None
    if recipe is None and overrides:
        raise RecipeError("a resumed run keeps its recipe: leave the overrides out, or name the recipe as well")

    from lmrl import training

    if dry_run:
        training.dry_run(recipe)
        print("dry run passed: nothing was kept")
    elif folder is not None:
        training.resume_run(folder, recipe)
    else:
        training.train(recipe, output=output or training.default_output(name), resume=resume)


def _run_to_resume(name: str | None, output: Path | None) -> Path | None:
    """The run folder that --resume means, or None where there is none yet and the recipe starts over."""
    if name is not None and (Path(name) / RECIPE_FILE).is_file():
        return Path(name)
    if output is not None:
        return output if (output / RECIPE_FILE).is_file() else None
    if name is not None:
        raise RecipeError("--resume needs the run: lmrl train FOLDER --resume, or --output FOLDER beside the recipe")
    return latest_run()
