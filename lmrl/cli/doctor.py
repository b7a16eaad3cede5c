"""`lmrl doctor`: is this machine ready?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lmrl.cli.common import Debug, check_outputs, show_findings


def command(
    output: Annotated[Path, typer.Option("--output", "-o", help="Where runs will be written")] = Path("runs"),
    to_json: Annotated[Path | None, typer.Option("--json", help="Also write the findings to this file")] = None,
    debug: Debug = False,
) -> None:
    """Check versions, devices, memory, disk and optional parts, and name fixes. Exit code 1: something is wrong."""
    from lmrl.doctor import examine

    check_outputs(to_json)
    show_findings(examine(output), to_json, well="ready")
