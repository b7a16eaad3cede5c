"""`lmrl reward`: check, score and serve rewards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lmrl.cli.commands import COMMANDS, PLAIN
from lmrl.cli.common import Debug, check_outputs, read_options, show_findings, write_file
from lmrl.errors import counted
from lmrl.visible import visible

if TYPE_CHECKING:
    from lmrl.recipe import Reward

Named = Annotated[
    str, typer.Argument(help="file.py:function, a dotted path, http://ADDRESS, or the folder of a classifier")
]
Options = Annotated[
    list[str] | None, typer.Option("--option", "-o", help="NAME=VALUE for the reward, as under `options` in a recipe")
]
Data = Annotated[
    str | None, typer.Option("--data", "-d", help="Samples: JSONL or Parquet with prompt, completion and other columns")
]

app = typer.Typer(help=COMMANDS["reward"], no_args_is_help=True, **PLAIN)


@app.command()
def check(
    reward: Named,
    data: Data = None,
    option: Options = None,
    timeout: Annotated[float, typer.Option("--timeout", help="Seconds that a call may take")] = 30.0,
    to_json: Annotated[Path | None, typer.Option("--json", help="Also write the findings to this file")] = None,
    gold: Annotated[
        str | None,
        typer.Option(
            "--gold", metavar="COLUMN", help="Column of --data with right answers, which should score higher ..."
        ),
    ] = None,
    wrong: Annotated[
        str | None,
        typer.Option("--wrong", metavar="COLUMN", help="... than these (default: right answers of other rows)"),
    ] = None,
    debug: Debug = False,
) -> None:
    """Check a reward before training: protocol, purity, odd completions, speed, distribution. Exit code 1: a check
    failed."""
    from itertools import chain

    from lmrl.errors import DataError
    from lmrl.rewards.calibrate import check_gold, samples_of
    from lmrl.rewards.check import check_reward
    from lmrl.rewards.load import load_reward
    from lmrl.rewards.rescore import columns_of, read_samples

    check_outputs(to_json)
    spec = _spec(reward, option)
    if (gold is None and wrong is not None) or (gold is not None and data is None):
        raise DataError(
            "--gold COLUMN names right answers of --data FILE, and --wrong COLUMN goes with it: name both of them"
        )
    columns = None if data is None else samples_of(data, gold, wrong) if gold else columns_of(read_samples(data))
    findings = check_reward(spec, columns, timeout)
    if data is not None and gold is not None:
        apart = spec.model_copy(update={"timeout": timeout, "workers": 1}) if spec.kind == "function" else spec
        findings = chain(findings, check_gold(load_reward(apart, "reward"), data, gold, wrong))
    show_findings(findings, to_json)


@app.command()
def calibrate(
    reward: Named,
    data: Annotated[str, typer.Option("--data", "-d", help="Labelled pairs: rows with prompt, chosen and rejected")],
    option: Options = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Use only the first pairs")] = None,
    timeout: Annotated[float | None, typer.Option("--timeout", help="Seconds that a call may take")] = None,
    to_json: Annotated[Path | None, typer.Option("--json", help="Also write the findings to this file")] = None,
    debug: Debug = False,
) -> None:
    """Compare a reward or a judge with people's preferences: agreement, and bias for length and position. Exit code 1:
    a check failed."""
    from lmrl.rewards.calibrate import Pairs, by_comparison, by_scores, check_pairs
    from lmrl.rewards.load import load_reward, reward_object

    check_outputs(to_json)
    pairs, spec = Pairs(data, limit), _spec(reward, option)
    judge = reward_object(spec) if spec.kind == "function" else None
    if judge is not None and hasattr(judge, "prefers"):
        verdicts = by_comparison(judge.prefers, pairs)
    else:
        verdicts = by_scores(load_reward(spec.model_copy(update={"timeout": timeout}), "reward"), pairs)
    show_findings(check_pairs(verdicts, pairs), to_json, well="agrees with the labels")


@app.command()
def score(
    reward: Named,
    data: Data = None,
    run: Annotated[Path | None, typer.Option("--run", "-r", help="Score the saved samples of a run")] = None,
    option: Options = None,
    output: Annotated[
        Path | None, typer.Option("--output", help="Write the samples with their scores to this file, as JSONL")
    ] = None,
    timeout: Annotated[float | None, typer.Option("--timeout", help="Seconds that a call may take")] = None,
    workers: Annotated[int, typer.Option("--workers", min=0, help="Processes (0: this one)")] = 0,
    debug: Debug = False,
) -> None:
    """Score a file of samples, or the saved samples of a run, and compare with the rewards they had."""
    from lmrl.errors import DataError, RunError
    from lmrl.evaluation.statistics import summarize
    from lmrl.rewards.load import load_reward
    from lmrl.rewards.rescore import correlations, read_samples, rescore
    from lmrl.run import SAMPLES_FILE

    if (data is None) == (run is None):
        raise DataError("name either --data FILE or --run FOLDER")
    check_outputs(output, option="--output")
    if run is not None:
        if not (run / SAMPLES_FILE).is_file():
            raise RunError(f"{run} holds no {SAMPLES_FILE}")
        data = str(run / SAMPLES_FILE)
    spec = _spec(reward, option).model_copy(update={"timeout": timeout, "workers": workers})
    assert data is not None
    samples = read_samples(data)
    found = rescore(load_reward(spec, "reward"), samples)
    known = [value for value in found.values if value is not None]
    scored = [
        {**sample, "score": value, "cause": cause}
        for sample, value, cause in zip(samples, found.values, found.causes, strict=True)
    ]
    lines = [json.dumps(one, ensure_ascii=False, default=str) + "\n" for one in scored]
    write_file(output, "samples", lambda: "".join(lines))
    failed = len(samples) - len(known)
    if known:
        prompts = [str(sample["prompt"]) for sample in scored if sample["score"] is not None]
        summary = summarize(known, prompts, unit="prompt")
        low, high = summary["ci95"]
        print(
            f"{spec.label}: mean {summary['mean']:.4f} [{low:.4f}, {high:.4f}] over {counted(len(known), 'sample')}; the 95 % "
            f"interval holds for {summary['holds_for']}"
        )
    if failed:
        print(
            f"without a score: {counted(failed, 'sample')}; first: {visible(next(cause for cause in found.causes if cause))}"
        )
    if related := correlations(found.values, [sample.get("reward") for sample in samples]):
        print(
            f"correlation with the saved reward: Pearson {related['pearson']:.3f}, Spearman {related['spearman']:.3f}"
        )
    if not known:
        raise typer.Exit(1)


@app.command()
def serve(
    reward: Named,
    option: Options = None,
    host: Annotated[
        str, typer.Option("--host", help="Address to listen on; any but 127.0.0.1 needs a token")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535)] = 8765,
    token_env: Annotated[
        str | None, typer.Option("--token-env", help="Environment variable with the token that requests must carry")
    ] = None,
    timeout: Annotated[float | None, typer.Option("--timeout", help="Seconds that a call may take")] = None,
    workers: Annotated[int, typer.Option("--workers", min=0, help="Processes (0: this one)")] = 0,
    debug: Debug = False,
) -> None:
    """Serve a reward over HTTP, for `url:` in a recipe."""
    import os

    from lmrl.errors import RunError
    from lmrl.rewards.load import load_reward
    from lmrl.rewards.serve import RewardServer

    token = os.environ.get(token_env) if token_env else None
    if token_env and not token:
        raise RunError(f"--token-env: the environment variable {token_env} is not set")
    spec = _spec(reward, option).model_copy(update={"timeout": timeout, "workers": workers})
    server = RewardServer(load_reward(spec, "reward"), host, port, token)
    print(f"{spec.what} at http://{host}:{server.server_address[1]} (Ctrl-C ends it)")
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        server.server_close()


def _spec(reward: str, options: list[str] | None) -> Reward:
    """The reward named on the command line, as a section of a recipe."""
    from lmrl.errors import RecipeError
    from lmrl.local_names import refuse_missing
    from lmrl.recipe import Reward

    file, colon, _ = reward.rpartition(":")
    if reward.startswith(("http://", "https://")):
        kind = "url"
    elif Path(reward).is_dir():
        kind = "model"
    elif colon and file.endswith(".py"):
        kind = "function"
        if not Path(file).is_file():
            raise RecipeError(f"reward: file '{file}' does not exist (looked in {Path.cwd()})")
    elif reward.endswith(".py"):
        raise RecipeError(f"reward: '{reward}' does not say which function: {reward}:NAME")
    elif "/" in reward or ":" in reward:
        refuse_missing(reward, "reward")
        kind = "model"
    else:
        kind = "function"

    return Reward(**{kind: reward, "options": read_options(options or (), "--option")})
