"""`lmrl ls`: list recipes, environments, rewards and other parts."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint
from typing import Annotated, Any

import typer
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from lmrl.cli.common import Debug
from lmrl.errors import RecipeError, did_you_mean
from lmrl.plugins import registry
from lmrl.shipped import descriptions, reward_docs, section_docs
from lmrl.visible import plain_console

KINDS: dict[str, registry.Kind | None] = {
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
"""The things that can be listed, and the registry's kind of each."""
ENGINES = {
    "hf": "The policy's own transformers model.",
    "vllm": "A copy of the weights in vLLM, in the same process.",
    "vllm-server": "Copies in one or several vLLM servers.",
}
TRACKERS = {
    "aim": "A repository in the run folder, for `aim up`.",
    "clearml": "A task of a ClearML server.",
    "comet_ml": "An experiment at Comet.",
    "dvclive": "Files in the run folder, for `dvc` and its extension of VS Code.",
    "mlflow": "A run of an MLflow server, or of the folder that MLFLOW_TRACKING_URI names.",
    "swanlab": "An experiment at SwanLab.",
    "tensorboard": "Files in the run folder, for `tensorboard --logdir`.",
    "trackio": "A local dashboard, `trackio show`.",
    "wandb": "A run at Weights & Biases.",
}
SHIPPED: dict[str, Callable[[], dict[str, str]]] = {
    "recipes": lambda: descriptions("recipes"),
    "environments": lambda: section_docs("task.py", "environment"),
    "rewards": reward_docs,
    "objectives": lambda: section_docs("objectives", "name"),
    "sources": lambda: section_docs("source.py", "name") | section_docs("blend.py", "name"),
    "engines": lambda: ENGINES,
    "listeners": dict,
    "trackers": lambda: TRACKERS,
    "suites": lambda: descriptions("eval"),
}
"""Shipped things of each kind, read from lmrl's files."""


def command(
    kind: Annotated[str | None, typer.Argument(help=f"One of {', '.join(KINDS)} (default: all)")] = None,
    name: Annotated[str | None, typer.Argument(help="One of that kind: what it is, and its keys in a recipe")] = None,
    debug: Debug = False,
) -> None:
    """List recipes, environments, rewards, objectives, suites and more, of lmrl and of installed packages."""
    if kind is not None and kind not in KINDS:
        raise RecipeError(f"no kind called '{kind}'{did_you_mean(kind, KINDS)}")
    if kind is not None and name is not None:
        console = plain_console()
        for line in details(kind, name, console.width):
            console.print(line)
        return
    console = plain_console()
    parts: list[RenderableType] = []
    for one in [kind] if kind else KINDS:
        found = listing(one)
        if found or kind is not None:
            parts += [Text(one, style="bold"), _laid_out(found, console.width)]
    console.print(Group(*parts))  # in one write, so that a reader such as `grep -q` may close the pipe early


def _laid_out(found: dict[str, str], width: int) -> RenderableType:
    """Names with their descriptions beside them, or below if long names leave no room. width: columns of the
    terminal."""
    texts = {name: Text(text) for name, text in found.items()}
    if max(map(len, found), default=0) > width // 3:
        parts = [(Padding(Text(name), (0, 0, 0, 2)), Padding(text, (0, 3, 0, 6))) for name, text in texts.items()]
        return Group(*(part for pair in parts for part in pair))
    table = Table(show_header=False, box=None, padding=(0, 3, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column()
    for name, text in texts.items():
        table.add_row(Text(f"  {name}"), text)
    return table


def listing(kind: str) -> dict[str, str]:
    """Names of that kind, each with a one-line summary; reads files, and imports neither pydantic nor user code."""
    own = KINDS[kind]
    extra = {} if own is None else {name: _origin(point) for name, point in registry.installed(own).items()}
    return SHIPPED[kind]() | extra


def details(kind: str, name: str, width: int) -> Iterator[str]:
    """One thing of a kind: its docstring and its keys. A part of an installed package is imported."""
    from lmrl.recipe import ENVIRONMENTS, OBJECTIVES, SOURCES
    from lmrl.recipe.documentation import describe

    known = listing(kind)
    if name not in known:
        raise RecipeError(f"{kind}: there is no {name!r}{did_you_mean(name, known)}")
    sections: dict[str, Any] = {"environments": ENVIRONMENTS, "objectives": OBJECTIVES, "sources": SOURCES}
    shown = sections.get(kind, {}).get(name)
    own = KINDS[kind]
    if shown is None and own is not None and name in registry.installed(own):
        found = registry.load(own, name, kind)
        shown = getattr(found, "Options", None) or found
    if shown is None:
        yield known[name]
    elif hasattr(shown, "model_fields"):
        yield from describe(shown, width)
    else:
        yield inspect.getdoc(shown) or known[name]


def _origin(point: EntryPoint) -> str:
    """The package that an entry point belongs to."""
    package = point.dist
    return f"of package {package.name} {package.version}" if package else point.value
