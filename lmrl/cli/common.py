"""Options that several verbs share."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from lmrl.errors import RecipeError

Overrides = Annotated[
    list[str] | None, typer.Argument(help="Changes, for instance training.steps=50", metavar="[KEY=VALUE]...")
]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Allow a hub model to run its own code")]
RunCode = Annotated[
    bool, typer.Option("--run-code", help="Allow a suite to run code that the policy writes, in limited processes")
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error")]

Policies = Annotated[
    list[str] | None,
    typer.Argument(
        help="Run folders, checkpoints, model folders, GGUF files or hub names; then changes of the suite",
        metavar="POLICY... [KEY=VALUE]...",
        show_default=False,
    ),
]
OVERRIDE = re.compile(r"[A-Za-z_][\w.-]*=")


def split_policies(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Policies, and the overrides among them: what begins with `KEY=` and is no file here."""
    overrides = [one for one in arguments if OVERRIDE.match(one) and not Path(one).expanduser().exists()]
    return [one for one in arguments if one not in overrides], overrides


def weights(text: str | None) -> list[float]:
    """`--beta 1,4,16` as numbers. Raises RecipeError."""
    try:
        numbers = [float(part) for part in text.split(",")] if text else []
    except ValueError:
        numbers = [-1.0]
    if any(not 0 <= number < float("inf") for number in numbers):
        raise RecipeError(f"--beta: '{text}' is no list of weights, for instance 1,4,16,64")
    return numbers


def listed(text: str | None) -> list[str]:
    """`a, b` as a list."""
    return [part.strip() for part in text.split(",")] if text else []


def read_options(texts: Sequence[str], key: str) -> dict[str, Any]:
    """`NAME=VALUE`, the value as YAML, as an object. key: the command line's option, for messages. Raises RecipeError."""
    import yaml

    given = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise RecipeError(f"{key} {text}: expected NAME=VALUE")
        try:
            given[name] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise RecipeError(f"{key} {text}: the value is not valid YAML") from error
    return given
