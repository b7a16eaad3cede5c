"""`lmrl env`: check an environment."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lmrl.cli.commands import COMMANDS, PLAIN
from lmrl.cli.common import Debug, Overrides, check_outputs, show_findings

if TYPE_CHECKING:
    from lmrl.recipe import EnvironmentTask

app = typer.Typer(help=COMMANDS["env"], no_args_is_help=True, **PLAIN)
Named = Annotated[
    str,
    typer.Argument(
        help="A name, file.py:Name, a dotted path, or LIBRARY:ID (gymnasium, textarena, reasoning_gym, verifiers, openenv)",
        metavar="ENVIRONMENT",
    ),
]


@app.callback()
def group() -> None:
    """Check environments."""


@app.command()
def check(
    environment: Named,
    options: Overrides = None,
    episodes: Annotated[int, typer.Option("--episodes", min=2, help="Episodes to play")] = 20,
    to_json: Annotated[Path | None, typer.Option("--json", help="Also write the findings to this file")] = None,
    debug: Debug = False,
) -> None:
    """Check an environment before training: seeds, return values, episode ends, rewards, players, odd actions, speed.
    Exit code 1: a check failed."""
    from lmrl.environments.check import check_environment

    check_outputs(to_json)
    show_findings(check_environment(task_section(environment, options), episodes), to_json)


def task_section(environment: str, options: list[str] | None) -> EnvironmentTask:
    """The `task` section that a recipe would have for this environment and these options."""
    from lmrl.recipe import EnvironmentTask, Section, TaskSection
    from lmrl.recipe.document import Document
    from lmrl.recipe.overrides import apply_overrides
    from lmrl.recipe.paths import resolve_files
    from lmrl.recipe.validation import validate

    class Checked(Section):
        task: TaskSection

    document = Document({"task": {"environment": environment}}, places={("task", "environment"): "ENVIRONMENT"})
    apply_overrides(document, [one if one.startswith("task.") else f"task.{one}" for one in options or ()])
    resolve_files(document.data, Path.cwd())
    task = validate(Checked, document).task
    assert isinstance(task, EnvironmentTask), "an environment was named"
    return task
