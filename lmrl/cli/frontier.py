"""`lmrl frontier`: reward against divergence over a run's checkpoints."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from lmrl.cli.common import Debug, TrustRemoteCode, check_outputs, draw, listed, split_policies, write_file
from lmrl.errors import RecipeError


def command(
    run: Annotated[
        list[str] | None,
        typer.Argument(
            help="A run folder; then overrides of the suite", metavar="RUN [KEY=VALUE]...", show_default=False
        ),
    ] = None,
    suite: Annotated[
        str | None, typer.Option("--suite", "-s", help="A suite's file or name (default: the run's own, else its task)")
    ] = None,
    checkpoints: Annotated[
        str, typer.Option("--checkpoints", help="Which: all, or for instance step-20,best,final")
    ] = "all",
    best_of: Annotated[
        int,
        typer.Option("--best-of", min=1, help="Samples per prompt from the initial policy: the largest n of best-of-n"),
    ] = 16,
    json: Annotated[Path | None, typer.Option("--json", help="Also write the result to this file")] = None,
    plot: Annotated[Path | None, typer.Option("--plot", help="Draw it into this file (.png, .svg, .pdf)")] = None,
    trust_remote_code: TrustRemoteCode = False,
    debug: Debug = False,
) -> None:
    """Score a run's checkpoints against their divergence from the initial policy, and against its best-of-n."""
    from lmrl.evaluation.suites import load_suite

    names, overrides = split_policies(run or [])
    if len(names) != 1:
        raise RecipeError("frontier: name one run: lmrl frontier runs/a --suite NAME")
    check_outputs(json, plot)
    if suite is not None:
        load_suite(suite, overrides)  # report a mistake in the suite before any model is loaded

    from lmrl.evaluation.frontier import frontier
    from lmrl.training.display import Display

    found = frontier(names[0], suite, overrides, listed(checkpoints), best_of, trust_remote_code)
    display = Display()
    nothing = math.nan
    heads = ["kl", found.metric, "at equal length", "best-of-n at this kl", "gain"]
    rows = {
        one.label: [
            nothing if value is None else value
            for value in (one.kl, one.score, one.at_equal_length, one.best_of_n, one.gain)
        ]
        for one in found.points
    }
    display.number_table(f"{found.run} on {found.suite}: kl to the initial policy, in nats per episode", heads, rows)
    yardstick = {f"best of {one.n}": [one.kl, one.score, *one.ci95] for one in found.yardstick}
    display.number_table("Best-of-n of the initial policy", ["kl at most", found.metric, "from", "to"], yardstick)
    display.say(f"played: {found.played}")
    write_file(json, "frontier", found.to_json)
    draw(plot, "frontier", found)
