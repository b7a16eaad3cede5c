"""`lmrl eval`: score a policy on a suite."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from lmrl.cli.common import Debug, Overrides
from lmrl.errors import RecipeError, RunError


def command(
    policy: Annotated[
        str, typer.Argument(help="A run folder, a checkpoint, a model folder, a GGUF file or a hub name")
    ],
    overrides: Overrides = None,
    suite: Annotated[
        str | None, typer.Option("--suite", "-s", help="A suite's file or name (default: the run's own, else its task)")
    ] = None,
    checkpoint: Annotated[str, typer.Option("--checkpoint", help="Of a run: final, best, or step-N")] = "final",
    json: Annotated[Path | None, typer.Option("--json", help="Also write the scores to this file")] = None,
    beta: Annotated[
        str | None, typer.Option("--beta", help="Of a policy with Q heads: weights of Q to try, for instance 1,4,16,64")
    ] = None,
    fail_under: Annotated[
        list[str] | None,
        typer.Option("--fail-under", metavar="METRIC=VALUE", help="Exit with 1 if the mean is lower, e.g. return=-3"),
    ] = None,
    samples: Annotated[int, typer.Option("--samples", help="Completions to show")] = 3,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Allow a hub model to run its own code")
    ] = False,
    debug: Debug = False,
) -> None:
    """Score a policy: a table of means with 95 % confidence intervals."""
    from lmrl.evaluation.suites import load_suite

    if json is not None and json.is_dir():
        raise RunError(f"--json: {json} is a folder, name a file")
    betas, floors = _numbers(beta), _floors(fail_under or [])
    if suite is not None:
        load_suite(suite, overrides or [])  # a mistake in the suite should not wait for the model to load

    from lmrl.evaluation import evaluate
    from lmrl.training.display import Display

    report = evaluate(policy, suite, overrides or [], checkpoint, trust_remote_code, betas)
    display = Display()
    display.samples(report.trajectories, samples)
    display.table(f"{report.policy} on {report.suite}", report.rows)
    display.say(f"played: {report.played}")
    if json is not None:
        json.parent.mkdir(parents=True, exist_ok=True)
        json.write_text(report.to_json())
        print(f"scores written to {json}")
    report.require(floors)


def _numbers(text: str | None) -> list[float]:
    """`1,4,16` as numbers."""
    try:
        numbers = [float(part) for part in text.split(",")] if text else []
    except ValueError:
        numbers = [-1.0]
    if any(not 0 <= number < float("inf") for number in numbers):
        raise RecipeError(f"--beta: '{text}' is no list of weights, for instance 1,4,16,64")
    return numbers


def _floors(texts: list[str]) -> dict[str, float]:
    """`return=-3` as a metric and the least that its mean may be."""
    floors = {}
    for text in texts:
        metric, _, value = text.partition("=")
        try:
            floors[metric.strip()] = float(value)
        except ValueError:
            floors[metric.strip()] = math.nan
        if math.isnan(floors[metric.strip()]):
            raise RecipeError(f"--fail-under: '{text}' is not METRIC=VALUE, for instance return=-3")
    return floors
