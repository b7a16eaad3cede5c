"""`lmrl ls`: what there is."""

from __future__ import annotations

import ast
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from lmrl.cli.common import Debug
from lmrl.errors import RecipeError, did_you_mean
from lmrl.recipe import ENVIRONMENTS, OBJECTIVES
from lmrl.recipe.files import read_yaml, shipped, shipped_names

KINDS = ("recipes", "environments", "rewards", "objectives", "suites")


def command(
    kind: Annotated[str | None, typer.Argument(help=f"One of {', '.join(KINDS)} (default: all)")] = None,
    debug: Debug = False,
) -> None:
    """List recipes, environments, rewards, objectives and suites."""
    if kind is not None and kind not in KINDS:
        raise RecipeError(f"no kind called '{kind}'{did_you_mean(kind, KINDS)}")
    table = Table(show_header=False, box=None, padding=(0, 3, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column()
    for one in [kind] if kind else KINDS:
        table.add_row(f"[bold]{one}[/bold]", "")
        for name, text in listing(one).items():
            table.add_row(f"  {name}", text)
    Console(highlight=False).print(table)


def listing(kind: str) -> dict[str, str]:
    """Names of that kind, each with one line about it; reads files, imports nothing of the user's."""
    if kind in ("recipes", "suites"):
        folder = "recipes" if kind == "recipes" else "eval"
        return {
            name: str(read_yaml(shipped(folder) / f"{name}.yaml").data.get("description", ""))
            for name in shipped_names(folder)
        }
    if kind == "rewards":
        return dict(sorted(_rewards().items()))
    classes = ENVIRONMENTS if kind == "environments" else OBJECTIVES
    return {name: (cls.__doc__ or "").split("\n")[0] for name, cls in classes.items()}


def _rewards() -> dict[str, str]:
    """Functions that take completions, and classes that can be called, with the first lines of their docstrings."""
    found = {}
    for path in sorted(shipped("reward_models").glob("[!_]*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                is_reward = any(argument.arg == "completions" for argument in node.args.args)
            else:
                is_reward = isinstance(node, ast.ClassDef) and any(
                    getattr(part, "name", "") == "__call__" for part in node.body
                )
            if is_reward:
                text = (ast.get_docstring(node) or "").split("\n")[0]
                found[f"lmrl.reward_models.{path.stem}.{node.name}"] = text
    return found
