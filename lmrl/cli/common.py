"""Options that several commands share."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lmrl.errors import RecipeError, RunError

if TYPE_CHECKING:
    from lmrl.findings import Finding

Overrides = Annotated[
    list[str] | None, typer.Argument(help="Overrides, for instance training.steps=50", metavar="[KEY=VALUE]...")
]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Allow a hub model to run its own code")]
RunCode = Annotated[
    bool, typer.Option("--run-code", help="Allow a suite to run code that the policy writes, in limited processes")
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error")]

Policies = Annotated[
    list[str] | None,
    typer.Argument(
        help="Run folders, checkpoints, model folders, GGUF files, hub names or addresses (http://HOST/v1#MODEL); then overrides of the suite",
        metavar="POLICY... [KEY=VALUE]...",
        show_default=False,
    ),
]
Checkpoint = Annotated[str, typer.Option("--checkpoint", help="For a run: final, best or step-N")]
Checkpoints = Annotated[
    str | None,
    typer.Option("--checkpoints", help="Several checkpoints of each run: all, or for instance step-20,best,final"),
]
EndpointOptions = Annotated[
    list[str] | None,
    typer.Option(
        "--endpoint",
        metavar="KEY=VALUE",
        help="For policies that are addresses: key_env, timeout, retries, connections, requests_per_minute, prices, max_spend, cache",
    ),
]
OVERRIDE = re.compile(r"[A-Za-z_][\w.-]*=")


def split_policies(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Policies, and the overrides among them: arguments that begin with `KEY=` and are not files here."""
    overrides = [one for one in arguments if OVERRIDE.match(one) and not Path(one).expanduser().exists()]
    return [one for one in arguments if one not in overrides], overrides


def check_outputs(file: Path | None, plot: Path | None = None, option: str = "--json") -> None:
    """Raise RunError for output files that cannot be written, before any work is done. option: that names the file."""
    for name, path in ((option, file), ("--plot", plot)):
        if path is not None:
            check_output(path, name)
    if plot is not None:
        from lmrl.plots import check_picture

        check_picture(plot)


def check_output(path: Path, option: str) -> None:
    """Raise RunError for an output file that cannot be written; it and its folders may not exist yet."""
    if path.is_dir():
        raise RunError(f"{option}: {path} is a folder, name a file")
    there = next(one for one in (path, *path.parents) if one.exists())
    if there != path and not there.is_dir():
        raise RunError(f"{option}: {path} cannot be written: {there} is a file")
    if not os.access(there, os.W_OK):
        raise RunError(f"{option}: {path} cannot be written: {there} is read-only for this user")


def write_file(path: Path | None, what: str, text: Callable[[], str]) -> None:
    """Write a command's result to the file that an option names, if it does."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text(), encoding="utf-8")
        print(f"{what} written to {path}")


def show_findings(findings: Iterable[Finding], file: Path | None, well: str = "fit for training") -> None:
    """Print findings as they arrive, and write them to the --json file. Exits with 1 if one has failed."""
    from lmrl.findings import show

    made = show(findings, well)
    write_file(file, "findings", lambda: json.dumps(list(map(vars, made)), indent=2) + "\n")
    if any(finding.passed is False for finding in made):
        raise typer.Exit(1)


def draw(path: Path | None, picture: str, found: Any) -> None:
    """Draw a command's result into the --plot file, if one is named. picture: a function of lmrl.plots."""
    if path is not None:
        from lmrl import plots

        plots.save(getattr(plots, picture)(found), path)
        print(f"picture: {path}")


def endpoint_of(options: Sequence[str] | None, policies: Sequence[str]) -> Any:
    """`--endpoint KEY=VALUE` as an Endpoint. Raises RecipeError if it is invalid, or if no policy is an address."""
    from lmrl.engines.remote import Endpoint, is_address
    from lmrl.recipe.document import Document
    from lmrl.recipe.overrides import apply_overrides
    from lmrl.recipe.validation import validate

    if options and not any(map(is_address, policies)):
        raise RecipeError("--endpoint is for policies that are addresses, and none is: leave it out")
    document = Document({})
    apply_overrides(document, options or ())
    return validate(Endpoint, document)


def weights(text: str | None) -> list[float]:
    """`--beta 1,4,16` as numbers. Raises RecipeError."""
    try:
        numbers = [float(part) for part in text.split(",")] if text else []
    except ValueError:
        numbers = [-1.0]
    if any(not 0 <= number < float("inf") for number in numbers):
        raise RecipeError(f"--beta: '{text}' is not a list of weights, for instance 1,4,16,64")
    return numbers


def listed(text: str | None) -> list[str]:
    """`a, b` as a list."""
    return [part.strip() for part in text.split(",")] if text else []


def read_options(texts: Sequence[str], key: str) -> dict[str, Any]:
    """`NAME=VALUE`, the value as YAML, as an object. key: the command line's option, for messages. Raises
    RecipeError."""
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
