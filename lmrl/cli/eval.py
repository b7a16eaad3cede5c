"""`lmrl eval`: score policies on a suite."""

from __future__ import annotations

import math
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

from lmrl.cli.common import (
    Checkpoint,
    Checkpoints,
    Debug,
    EndpointOptions,
    Policies,
    RunCode,
    TrustRemoteCode,
    check_output,
    check_outputs,
    endpoint_of,
    listed,
    split_policies,
    weights,
    write_file,
)
from lmrl.cli.completion import suites
from lmrl.errors import RecipeError, did_you_mean


def command(
    policies: Policies = None,
    suite: Annotated[
        str | None,
        typer.Option(
            "--suite",
            "-s",
            help="A suite's file or name (default: the run's own, else its task)",
            autocompletion=suites,
        ),
    ] = None,
    checkpoint: Checkpoint = "final",
    checkpoints: Checkpoints = None,
    log: Annotated[
        Path | None, typer.Option("--log", help="Save every episode to this folder, or resume the log there")
    ] = None,
    part: Annotated[
        int | None,
        typer.Option("--log-every", min=1, help="For a new log: episodes played and written at a time"),
    ] = None,
    rescore: Annotated[
        Path | None, typer.Option("--rescore", help="Score the episodes of this log again; nothing is generated")
    ] = None,
    json: Annotated[Path | None, typer.Option("--json", help="Also write the scores to this file")] = None,
    export: Annotated[
        list[Path] | None,
        typer.Option("--export", help="Write a table of all episodes: a name in .csv, .json, .jsonl or .parquet"),
    ] = None,
    inspect: Annotated[
        Path | None, typer.Option("--inspect", help="Also write the log for inspect_ai, into this folder")
    ] = None,
    beta: Annotated[
        str | None,
        typer.Option("--beta", help="For a policy with Q heads: weights of Q to try, for instance 1,4,16,64"),
    ] = None,
    overlap: Annotated[
        list[str] | None,
        typer.Option(
            "--overlap", metavar="RUN|FILE", help="Look for the prompts in this run's training data, or this file"
        ),
    ] = None,
    overlap_words: Annotated[
        int | None, typer.Option("--overlap-words", min=3, help="Words in a row that count as shared (default: 13)")
    ] = None,
    fail_under: Annotated[
        list[str] | None,
        typer.Option("--fail-under", metavar="METRIC=VALUE", help="Exit with 1 if the mean is lower, e.g. return=-3"),
    ] = None,
    samples: Annotated[int, typer.Option("--samples", help="Completions to show")] = 3,
    run_code: RunCode = False,
    endpoint: EndpointOptions = None,
    trust_remote_code: TrustRemoteCode = False,
    debug: Debug = False,
) -> None:
    """Score policies: a table of means with 95 % confidence intervals."""
    from lmrl.evaluation.bridges import check_foreign, inspect_task, is_foreign
    from lmrl.evaluation.frames import check_table_name, frame_of, load_eval, records_of, write_table
    from lmrl.evaluation.inspect_log import export_inspect
    from lmrl.evaluation.suites import allow_code, load_suite, refuse_code

    names, overrides = split_policies(policies or [])
    check_outputs(json)
    for path in export or ():
        check_table_name(path)
        check_output(path, "--export")
    betas, floors = weights(beta), _floors(fail_under or [])
    if (rescore is None) == (not names):
        raise RecipeError(
            "name a policy to score, or a log to score again: lmrl eval POLICY, or lmrl eval --rescore LOG"
        )
    unused = {
        "--checkpoint": checkpoint != "final",
        "--checkpoints": checkpoints,
        "--beta": beta,
        "--log-every": part,
        "--overlap": overlap,
        "--endpoint": endpoint,
        "--trust-remote-code": trust_remote_code,
    }
    if rescore is not None and (idle := [name for name, given in unused.items() if given]):
        raise RecipeError(f"{idle[0]}: --rescore loads no policy and plays nothing: leave it out")
    if part is not None and log is None:
        raise RecipeError("--log-every needs a log: add --log FOLDER")
    if overlap_words is not None and not overlap:
        raise RecipeError("--overlap-words needs training data to compare with: add --overlap RUN")
    if inspect is not None and log is None:
        raise RecipeError("--inspect converts a log: add --log FOLDER")
    if inspect is not None and inspect_task(suite) is not None:
        raise RecipeError(f"--inspect: {suite} already writes its --log in inspect_ai's format: leave it out")
    if is_foreign(suite):
        check_foreign(suite, overrides)
    elif suite is not None and rescore is None:
        loaded = load_suite(suite, overrides)  # report a mistake in the suite before the model is loaded
        refuse_code(allow_code(loaded) if run_code else loaded)

    from lmrl.evaluation.api import evaluate, rescored
    from lmrl.evaluation.contamination import WORDS
    from lmrl.evaluation.scoring import RESERVED
    from lmrl.training.display import Display

    with TemporaryDirectory() as scratch:
        kept = Path(scratch) / "log" if export and log is None and not is_foreign(suite) else log
        if rescore is not None:
            report = rescored(rescore, suite, overrides, kept, run_code)
        else:
            report = evaluate(
                names,
                suite,
                overrides,
                checkpoint,
                trust_remote_code,
                betas,
                kept,
                listed(checkpoints),
                part,
                run_code=run_code,
                overlap=overlap or (),
                overlap_words=overlap_words or WORDS,
                endpoint=endpoint_of(endpoint, names),
                floors=floors,
            )
        if export:
            if kept is None or is_foreign(suite):
                table = frame_of(list(records_of(report.episodes)))
            else:
                table = load_eval(kept)
            table = table[table["policy"].isin(report.rows)]
    display = Display()
    display.samples(report.trajectories, samples)
    display.table(f"{report.policy} on {report.suite}", report.rows)
    known = list(dict.fromkeys(name for row in report.rows.values() for name in row))
    for name in report.columns:
        # `kl` is measured in training alone, and `normalized` depends on the environment.
        if name not in (*known, *RESERVED):
            display.say(f"metrics: no episode has a '{name}'{did_you_mean(name, known)}")
    display.say(f"played: {report.played}")
    if report.overlap is not None:
        display.say(f"overlap: {report.overlap}")
    if report.clean:
        display.table("Without overlapping prompts", report.clean)
    write_file(json, "scores", report.to_json)
    for path in export or ():
        write_table(table, path)
        print(f"episodes written to {path}")
    if log is not None:
        print(f"log: {log}")
    if log is not None and inspect is not None:
        print(f"written for inspect_ai: {', '.join(map(str, export_inspect(log, inspect)))}")
    report.require(floors)


def _floors(texts: list[str]) -> dict[str, float]:
    """`return=-3` as a metric and the lowest mean allowed."""
    floors: dict[str, float] = {}
    for text in texts:
        metric, _, value = map(str.strip, text.partition("="))
        try:
            floor = float(value)
        except ValueError:
            floor = math.nan
        if math.isnan(floor):
            raise RecipeError(f"--fail-under: '{text}' is not METRIC=VALUE, for instance return=-3")
        if metric in floors:
            raise RecipeError(f"--fail-under: '{metric}' is named twice: leave one out")
        floors[metric] = floor
    return floors
