"""`lmrl compare`: policies, or logs of evaluations, on the same episodes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lmrl.cli.common import (
    Checkpoint,
    Checkpoints,
    Debug,
    EndpointOptions,
    Policies,
    RunCode,
    TrustRemoteCode,
    check_outputs,
    draw,
    endpoint_of,
    listed,
    read_options,
    split_policies,
    weights,
    write_file,
)
from lmrl.errors import RecipeError, RewardError

if TYPE_CHECKING:
    from lmrl.evaluation.paired import Comparison, Difference

INTERVAL = "95 % interval"
WIDTH = 300
"""Characters of a prompt or completion to show."""


def command(
    policies: Policies = None,
    suite: Annotated[
        str | None, typer.Option("--suite", "-s", help="A suite's file or name (default: the first policy's own)")
    ] = None,
    checkpoint: Checkpoint = "final",
    checkpoints: Checkpoints = None,
    beta: Annotated[
        str | None,
        typer.Option("--beta", help="For policies with Q heads: weights of Q, each compared as a separate policy"),
    ] = None,
    metric: Annotated[
        list[str] | None, typer.Option("--metric", "-m", help="What to compare (default: the suite's metrics)")
    ] = None,
    control: Annotated[
        str | None,
        typer.Option(
            "--control", metavar="METRIC", help="Compare at equal values of this as well, for instance length"
        ),
    ] = None,
    judge: Annotated[
        str | None,
        typer.Option(
            "--judge",
            metavar="NAME|ADDRESS",
            help="Also judge pairs of answers in both orders: a reward or judge, http://HOST/v1#MODEL",
        ),
    ] = None,
    judge_option: Annotated[
        list[str] | None,
        typer.Option("--judge-option", help="NAME=VALUE for the judge, as under `options` in a recipe"),
    ] = None,
    log: Annotated[Path | None, typer.Option("--log", help="Save every episode that is played to this folder")] = None,
    json: Annotated[Path | None, typer.Option("--json", help="Also write the comparison to this file")] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="Draw the differences into this file (.png, .svg, .pdf)")
    ] = None,
    fail_under: Annotated[
        list[str] | None,
        typer.Option(
            "--fail-under", metavar="CLAIM", help="Exit with 1 unless the 95 % interval shows it, e.g. 'B - A > -0.01'"
        ),
    ] = None,
    samples: Annotated[int, typer.Option("--samples", help="Samples to show, those that changed most")] = 3,
    endpoint: EndpointOptions = None,
    run_code: RunCode = False,
    trust_remote_code: TrustRemoteCode = False,
    debug: Debug = False,
) -> None:
    """Compare policies, or logs of evaluations, on the same episodes: paired differences with p-values."""
    from lmrl.evaluation.bridges import is_foreign
    from lmrl.evaluation.claims import read_claim
    from lmrl.evaluation.suites import allow_code, load_suite, refuse_code

    names, overrides = split_policies(policies or [])
    check_outputs(json, plot)
    if judge_option and judge is None:
        raise RecipeError("--judge-option needs a judge: add --judge NAME")
    options = read_options(judge_option or (), "--judge-option")
    if not names:
        raise RecipeError("name the policies or logs to compare: lmrl compare A B --suite NAME")
    claims, betas = [read_claim(text) for text in fail_under or ()], weights(beta)
    if suite is not None and not is_foreign(suite):
        loaded = load_suite(suite, overrides)  # report a mistake in the suite before any model is loaded
        refuse_code(allow_code(loaded) if run_code else loaded)

    from lmrl.evaluation.compare import compare

    failure = None
    try:
        found = compare(
            names,
            suite,
            overrides,
            checkpoint,
            listed(checkpoints),
            betas,
            metric or (),
            [claim.text for claim in claims],
            log,
            samples,
            trust_remote_code,
            run_code,
            control,
            judge,
            options,
            endpoint_of(endpoint, names),
        )
    except RewardError as error:
        if error.comparison is None:
            raise
        found, failure = error.comparison, error  # what was played is shown without its judge
    _show(found)
    write_file(json, "comparison", found.to_json)
    draw(plot, "comparison", found)
    if failure is not None:
        raise failure
    found.require(claims)


def _show(found: Comparison) -> None:
    from lmrl.training.display import Display, fixed, shorten

    display = Display()
    display.table(f"Scores on {found.suite}", {f"{key}: {name}": found.rows[key] for key, name in found.names.items()})
    display.say(f"played: {found.played}")
    heads = ["", "metric", "change", "p", "Holm", "won / tied / lost", "correlation", "to settle it"]
    lines = [heads, *map(_cells, found.differences)]
    display.grid("Differences of the same samples", lines, f"change: its mean and {INTERVAL}")
    if found.judged:
        display.grid(f"Judged by {found.judged[0].judge}, each pair in both orders", _judged_lines(found))
    if found.ratings:
        display.grid("Bradley-Terry ratings (A is 0; 400 points are odds of 10 to 1)", _rating_lines(found))
    for change in found.changes:
        display.say(f"\n  {shorten(change.prompt, WIDTH)}")
        for key, completion in change.completions.items():
            display.say(f"    {key} [{fixed(change.scores[key])}] {shorten(completion, WIDTH)}")


def _judged_lines(found: Comparison) -> list[list[str]]:
    lines = [["", "win rate", INTERVAL, "p", "won / tied / lost", "shown first wins"]]
    for one in found.judged:
        low, high = one.ci95
        shown = ""
        if one.position is not None and one.position_ci95 is not None:
            shown = f"{one.position:.2f} [{one.position_ci95[0]:.2f}, {one.position_ci95[1]:.2f}]"
        wins = f"{one.wins} / {one.ties} / {one.losses}" + (f" ({one.failed} failed)" if one.failed else "")
        name = f"{one.first} over {one.second}"
        lines.append([name, f"{one.win_rate:.3f}", f"[{low:.3f}, {high:.3f}]", f"{one.p:.2g}", wins, shown])
    return lines


def _rating_lines(found: Comparison) -> list[list[str]]:
    lines = [["", "points", INTERVAL]]
    for one in sorted(found.ratings, key=lambda one: -one.points):
        low, high = one.ci95
        lines.append([f"{one.key}: {found.names[one.key]}", f"{one.points:+.0f}", f"[{low:+.0f}, {high:+.0f}]"])
    return lines


def _cells(one: Difference) -> list[str]:
    from lmrl.evaluation.paired import AT_EQUAL
    from lmrl.training.display import decimals

    low, high = one.ci95
    places = max(4, decimals(one.mean, (high - low) / 2))
    more = "no difference" if one.more is None else "settled" if one.more == 0 else f"{one.more} more {one.unit}s"
    if AT_EQUAL in one.metric and one.more is None:
        more = ""
    if one.more and one.is_fixed:
        more = f"{(one.prompts + one.more) / one.prompts:.1f} times the samples"
    return [
        f"{one.first} - {one.second}",
        one.metric,
        f"{one.mean:+.{places}f} [{low:+.{places}f}, {high:+.{places}f}]",
        f"{one.p:.2g}",
        f"{one.adjusted:.2g}",
        f"{one.wins} / {one.ties} / {one.losses}",
        "" if one.correlation is None else f"{one.correlation:.2f}",
        more,
    ]
