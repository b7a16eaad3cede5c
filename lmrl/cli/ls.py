"""`lmrl ls`: what there is."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lmrl import registry
from lmrl.cli.common import Debug
from lmrl.errors import RecipeError, did_you_mean
from lmrl.recipe import ENVIRONMENTS, OBJECTIVES, SOURCES
from lmrl.recipe.files import read_yaml, shipped, shipped_file, shipped_names

KINDS = {
    "recipes": None,
    "environments": "environment",
    "rewards": "reward",
    "objectives": "objective",
    "sources": "source",
    "engines": "engine",
    "listeners": "listener",
    "trackers": "tracker",
    "suites": "suite",
}
"""What can be listed, and the kind of its names."""
ENGINES = {
    "hf": "The policy's own transformers model.",
    "vllm": "A copy of the weights in vLLM, in the same process.",
    "vllm-server": "Copies in one or several vLLM servers.",
}


def command(
    kind: Annotated[str | None, typer.Argument(help=f"One of {', '.join(KINDS)} (default: all)")] = None,
    name: Annotated[str | None, typer.Argument(help="One of that kind: what it is, and its keys in a recipe")] = None,
    debug: Debug = False,
) -> None:
    """List recipes, environments, rewards, objectives, suites and more, of lmrl and of installed packages."""
    if kind is not None and kind not in KINDS:
        raise RecipeError(f"no kind called '{kind}'{did_you_mean(kind, KINDS)}")
    if name is not None:
        console = Console(highlight=False)
        for line in details(kind, name, console.width):
            console.print(line, markup=False)
        return
    table = Table(show_header=False, box=None, padding=(0, 3, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column()
    for one in [kind] if kind else KINDS:
        found = listing(one)
        if not found and kind is None:
            continue
        table.add_row(f"[bold]{one}[/bold]", "")
        for name, text in found.items():
            table.add_row(f"  {name}", Text(text))  # brackets in it are no markup
    Console(highlight=False).print(table)


def listing(kind: str) -> dict[str, str]:
    """Names of that kind, each with one line about it; reads files, imports nothing of the user's."""
    own = KINDS[kind]
    extra = {} if own is None else {name: _origin(point) for name, point in registry.installed(own).items()}
    if kind in ("recipes", "suites"):
        folder = "recipes" if kind == "recipes" else "eval"
        return {
            name: str(read_yaml(shipped_file(folder, name)).data.get("description", ""))
            for name in shipped_names(folder)
        } | extra
    if kind == "rewards":
        return dict(sorted(_rewards().items())) | extra
    if kind == "engines":
        return ENGINES | extra
    classes = {"environments": ENVIRONMENTS, "objectives": OBJECTIVES, "sources": SOURCES}.get(kind, {})
    return {name: (cls.__doc__ or "").split("\n")[0] for name, cls in classes.items()} | extra


def details(kind: str, name: str, width: int) -> Iterator[str]:
    """One thing of a kind: its docstring and its keys; imports it where an installed package has it."""
    from lmrl.recipe.documentation import describe

    known = listing(kind)
    if name not in known:
        raise RecipeError(f"{kind}: {name!r} is none of them{did_you_mean(name, known)}")
    shown = {"environments": ENVIRONMENTS, "objectives": OBJECTIVES, "sources": SOURCES}.get(kind, {}).get(name)
    if shown is None and KINDS[kind] is not None and name in registry.installed(KINDS[kind]):
        found = registry.load(KINDS[kind], name, kind)
        shown = getattr(found, "Options", None) or found
    if shown is None:
        yield known[name]
    elif hasattr(shown, "model_fields"):
        yield from describe(shown, width)
    else:
        yield inspect.getdoc(shown) or known[name]


def _origin(point: registry.metadata.EntryPoint) -> str:
    """The package that an entry point belongs to."""
    package = point.dist
    return f"of package {package.name} {package.version}" if package else point.value


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
