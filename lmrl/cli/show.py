"""`lmrl show`: the resolved recipe, its batch arithmetic, and an estimate of memory; or a suite."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.padding import Padding
from rich.text import Text

from lmrl.cli.common import Debug, Overrides
from lmrl.cli.completion import recipes
from lmrl.recipe.estimates import arithmetic_line, evaluation_line, memory_lines, rate_line
from lmrl.recipe.files import is_suite, load_recipe, stages_of, to_yaml
from lmrl.visible import plain_console


def command(
    name: Annotated[str, typer.Argument(help="The file or name of a recipe or a suite", autocompletion=recipes)],
    overrides: Overrides = None,
    debug: Debug = False,
) -> None:
    """Show a recipe with all defaults, what a step does, and how much memory it takes; or a suite with all defaults."""
    console = plain_console()
    if is_suite(name):
        from lmrl.evaluation.suites import load_suite

        console.print(to_yaml(load_suite(name, overrides or [])), soft_wrap=True)
        return
    recipe = load_recipe(name, overrides or [])
    console.print(to_yaml(recipe), soft_wrap=True)
    for stage, resolved in stages_of(recipe).items():
        console.print(Text.assemble((f"stage {stage}", "bold"), f" ({resolved.objective.name})"))
        for line in [
            arithmetic_line(resolved),
            rate_line(resolved),
            evaluation_line(resolved),
            *memory_lines(resolved),
        ]:
            if console.is_terminal:
                console.print(Padding(Text(line), (0, 0, 0, 2)))
            else:
                console.print(f"  {line}", soft_wrap=True)
