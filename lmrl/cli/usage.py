"""Mistakes in a command line's words and options, as one line."""

from __future__ import annotations

import sys
from typing import Any

import typer

from lmrl.errors import did_you_mean
from lmrl.visible import visible

UsageError: type[Exception] = typer.BadParameter.__mro__[2]
"""The click that typer was built on; newer versions of typer bundle it under another name."""


def report_usage(error: Any) -> int:
    """Print a `UsageError`; returns the exit code."""
    if type(error).__name__ == "NoArgsIsHelpError":  # its message is the help; newer versions have printed it already
        print(error.format_message(), end="")
    else:
        print(usage_text(error), file=sys.stderr)
    return int(error.exit_code)


def usage_text(error: Any) -> str:
    """The mistake, and the command that shows help."""
    command = error.ctx.command_path if error.ctx else "lmrl"
    return f"lmrl: {visible(_reason(error))} (see `{command} -h`)"


def _reason(error: Any) -> str:
    if type(error).__name__ == "NoSuchOption":
        wrong = error.option_name
        names = [one for parameter in error.ctx.command.params for one in parameter.opts if one.startswith("--")]
        return f"there is no option {wrong}{did_you_mean(wrong, [*names, '--help'])}"
    message = " ".join(error.format_message().split())
    return (message[:1].lower() + message[1:]).rstrip(".")
