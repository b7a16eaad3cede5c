"""`lmrl train`: run a recipe."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from lmrl.cli.common import Debug, Overrides
from lmrl.cli.completion import recipes
from lmrl.errors import COLLAPSED, RecipeError, RunError, counted
from lmrl.recipe import MAIN_STAGE, DatasetOptions, Recipe
from lmrl.recipe.files import find_launch, load_recipe, shipped_names, stages_of
from lmrl.run import is_blank
from lmrl.run_folders import RECIPE_FILE, latest_run


def command(
    name: Annotated[
        str | None,
        typer.Argument(
            help="A recipe's file or name; with --resume also a run folder, or nothing", autocompletion=recipes
        ),
    ] = None,
    overrides: Overrides = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Run folder (default: under runs/)")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where the run stopped")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Try every part on a tiny scale, keep nothing")] = False,
    skip_bad_rows: Annotated[
        bool, typer.Option("--skip-bad-rows", help="Leave malformed rows of logged data out, and keep them aside")
    ] = False,
    over: Annotated[
        list[str] | None,
        typer.Option(
            "--over", metavar="KEY=VALUE,...", help="Run every combination of these keys' values (repeatable)"
        ),
    ] = None,
    jobs: Annotated[
        int, typer.Option("--jobs", help="With --over: runs at a time, which share out the accelerators")
    ] = 1,
    processes: Annotated[
        int | None, typer.Option("--processes", min=1, help="Train in so many processes on this machine")
    ] = None,
    accelerate: Annotated[
        str | None,
        typer.Option(
            "--accelerate",
            help="How they share the work: a configuration file of accelerate, or ddp, fsdp2, zero2, zero3",
        ),
    ] = None,
    debug: Debug = False,
) -> None:
    """Train a recipe."""
    if name is not None and "=" in name:
        overrides = [name, *(overrides or [])]
        name = None
    if processes or accelerate:
        if over:
            raise RecipeError("--over makes several runs, and --processes is for one: leave one of them out")
        _launch(processes, accelerate)
    if dry_run and resume:
        raise RecipeError("--dry-run tries a recipe from its start: leave --resume out")
    if over:
        if skip_bad_rows:
            raise RecipeError("--skip-bad-rows does not go with --over: set source.skip_bad_rows=true")
        _sweep(name, overrides or [], over, output, resume, dry_run, jobs)
        return
    if jobs != 1:
        raise RecipeError("--jobs goes with --over, which makes several runs")
    folder = _run_to_resume(name, output) if resume else None
    if folder is None and name is None:
        raise RecipeError("name a recipe, for instance: lmrl train random_walks/ppo (lmrl ls shows them all)")
    is_run = name is not None and (Path(name) / RECIPE_FILE).is_file()
    if is_run and not resume:
        raise RecipeError(f"'{name}' is a run folder: continue it with --resume")
    recipe = None
    if name is not None and not is_run:
        recipe = load_recipe(name, overrides or [])
    elif folder is not None and overrides:  # of the run's own recipe, such as more steps
        recipe = load_recipe(folder / RECIPE_FILE, overrides)

    if skip_bad_rows:
        _skip_bad_rows(recipe)

    from lmrl import training

    if folder is not None:
        result = training.resume_run(folder, recipe)
    else:
        assert recipe is not None and name is not None  # else there is a run to resume
        if dry_run:
            training.dry_run(recipe)
            print("dry run passed: nothing was kept")
            return
        result = training.train(recipe, output=output or training.default_output(name), resume=resume)
    if result.ended:
        raise typer.Exit(COLLAPSED)


def _launch(processes: int | None, accelerate: str | None) -> None:
    """Start this very command in several processes, each of which comes past here without these two options."""
    from lmrl.launch import launch

    config = find_launch(accelerate) if accelerate else None
    arguments = without_options(sys.argv[1:], ("--processes", "--accelerate"))
    raise typer.Exit(launch(arguments, processes, config))


def without_options(arguments: list[str], names: tuple[str, ...]) -> list[str]:
    """A command line without these options and their values."""
    kept, skip = [], False
    for argument in arguments:
        if skip or argument.partition("=")[0] in names:
            skip = not skip and "=" not in argument
            continue
        kept.append(argument)
    return kept


def _skip_bad_rows(recipe: Recipe | None) -> None:
    """Set `skip_bad_rows` wherever a recipe reads logged data."""
    if recipe is None:
        raise RecipeError("a resumed run keeps its recipe: leave --skip-bad-rows out")
    reading = [name for name, stage in stages_of(recipe).items() if isinstance(stage.source, DatasetOptions)]
    if not reading:
        raise RecipeError("--skip-bad-rows: the recipe reads no logged data")
    if isinstance(recipe.source, DatasetOptions):
        recipe.source.skip_bad_rows = True
    for name in reading:
        if name != MAIN_STAGE:
            recipe.stages[name].setdefault("source", {})["skip_bad_rows"] = True


def _sweep(
    name: str | None, overrides: list[str], over: list[str], output: Path | None, resume: bool, dry: bool, jobs: int
) -> None:
    """Train a recipe over values; --dry-run checks every combination's recipe and tries the first."""
    if name is None:
        raise RecipeError("--over needs a recipe, for instance: lmrl train random_walks/ppo --over training.seed=0,1,2")
    if (Path(name) / RECIPE_FILE).is_file():
        raise RecipeError(f"'{name}' is a run folder: --over goes with a recipe")
    if resume and output is None:
        raise RecipeError("--resume needs the sweep's folder: --output FOLDER beside the recipe")

    from lmrl import training
    from lmrl.training.sweep import combinations, sweep

    if dry:
        first, *others = combinations(name, overrides, over)
        training.dry_run(first.recipe)
        print(
            f"dry run of {first.name} passed, and so did the checks of {counted(len(others), 'more recipe')}: nothing was kept"
        )
    else:
        sweep(name, overrides, over, output, jobs, resume)


def _run_to_resume(name: str | None, output: Path | None) -> Path | None:
    """The run folder that --resume means, or None if there is none yet and the recipe starts over."""
    if name is not None and (Path(name) / RECIPE_FILE).is_file():
        if output is not None:
            raise RunError(f"'{name}' is a run folder, and continues there: leave --output out")
        return Path(name)
    folder = output if output is not None else Path(name) if name is not None and Path(name).is_dir() else None
    if folder is not None and folder.is_dir() and not (folder / RECIPE_FILE).is_file() and not is_blank(folder):
        raise RunError(
            f"{folder} holds no {RECIPE_FILE}, by which a run is resumed: put it back, or start a new run with another "
            "--output"
        )
    if output is not None:
        if name is None and not (output / RECIPE_FILE).is_file():
            raise RecipeError(f"there is no run in {output} to resume: name a recipe to start one there")
        return output if (output / RECIPE_FILE).is_file() else None
    if name is not None:
        if name not in shipped_names("recipes") and not Path(name).is_file():
            raise RunError(f"there is no run folder '{name}' to resume")
        raise RecipeError("--resume needs the run: lmrl train FOLDER --resume, or --output FOLDER beside the recipe")
    return latest_run()
