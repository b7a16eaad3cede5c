"""`lmrl replay`: compute a kept non-finite minibatch again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lmrl.cli.common import Debug


def command(
    folder: Annotated[Path, typer.Argument(help="A folder below RUN/nonfinite/")],
    debug: Debug = False,
) -> None:
    """Compute a minibatch that stopped a run again, and say where it stops being finite."""
    from lmrl.training.replay import replay

    for line in replay(folder):
        print(line)
