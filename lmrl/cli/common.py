"""Options that several verbs share."""

from __future__ import annotations

from typing import Annotated

import typer

Overrides = Annotated[
    list[str] | None, typer.Argument(help="Changes, for instance training.steps=50", metavar="[KEY=VALUE]...")
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error")]
