"""The commands by name, each imported when it is called: `lmrl --help` loads none of them."""

from __future__ import annotations

import importlib
from typing import Any

import typer
from typer.core import TyperGroup
from typer.main import get_command

from lmrl.errors import did_you_mean

COMMANDS = {
    "ls": "List recipes, environments, rewards, objectives, suites and more, of lmrl and of installed packages.",
    "new": "Write a first recipe for an environment or data of your own, after looking at it.",
    "cp": "Copy a recipe (or a suite, or a reward) to edit.",
    "show": "Show a recipe with all defaults, what a step does, and how much memory it takes; or a suite with all defaults.",
    "train": "Train a recipe.",
    "eval": "Score policies: a table of means with 95 % confidence intervals.",
    "compare": "Compare policies, or logs of evaluations, on the same episodes: paired differences with p-values.",
    "frontier": "Score a run's checkpoints against their divergence from the initial policy, and against its best-of-n.",
    "chat": "Talk to a policy, or to two side by side.",
    "play": "Play an environment, or watch a scripted player or a policy. Ctrl-D ends the game.",
    "collect": "Play episodes and save them as training rows, for source.path=FOLDER.",
    "serve": "Serve a policy over OpenAI's API: chat completions, completions, models.",
    "export": "Write a run as an ordinary transformers checkpoint, which any server decodes at full speed.",
    "replay": "Repeat a failed update or pass, or episodes; exit code 1 if one comes out differently.",
    "env": "Check environments.",
    "doctor": "Check versions, devices, memory, disk and optional parts, and name fixes. Exit code 1: something is wrong.",
    "reward": "Check, score and serve rewards.",
    "completion": "Print the script that completes commands, options and names in bash, zsh or fish; `eval` it, or save it.",
}
"""Each command's help, repeated here so that listing the commands imports none of them."""
PLAIN: dict[str, Any] = {"add_completion": False, "rich_markup_mode": None}
"""Help without rich, whose Markdown renderer takes longer to import than the rest of the command line."""


class Commands(TyperGroup):
    """The group of all commands."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        return load_command(cmd_name) if cmd_name in COMMANDS else None

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args[0] not in COMMANDS and not args[0].startswith("-"):
            ctx.fail(f"No such command '{args[0]}'{did_you_mean(args[0], COMMANDS)}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


def load_command(name: str) -> Any:
    """The click command of that name: its module's `app`, or its function `command`."""
    module = importlib.import_module(f"lmrl.cli.{name}")
    app = getattr(module, "app", None)
    if app is None:
        app = typer.Typer(**PLAIN)
        app.command(name=name)(module.command)
    command = get_command(app)
    command.name = name
    return command
