"""Episodes of an evaluation, and the records of a run, as tables: for pandas, CSV, JSON and Parquet."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmrl.errors import RunError
from lmrl.evaluation.log import in_order, logs_in
from lmrl.evaluation.scoring import named_values
from lmrl.run import METRICS_FILE, SAMPLES_FILE
from lmrl.trajectories.trajectory import Trajectory

if TYPE_CHECKING:
    from pandas import DataFrame

KINDS = (".csv", ".json", ".jsonl", ".parquet")
LISTS = ("tokens", "logprobs")
"""Columns that CSV cannot hold."""
COLUMNS = ("policy", "group", "episode", "prompt", "completion", "turns", "failure", *LISTS, "began", "seconds")
"""Columns of every table of episodes; a score of such a name is `component/NAME` there."""


def load_eval(log: str | Path) -> DataFrame:
    """The episodes of an evaluation log, or of all logs in a folder: one row each.

    Columns: policy, group, episode, prompt, completion, reward (or return), components, metrics, length, turns, failure,
    tokens and logprobs (of sampled tokens), began, seconds. Raises RunError if there is no log.
    """
    records: list[dict[str, Any]] = []
    for label, one in in_order(logs_in(log)):
        for row, trajectory in zip(one.rows(), one.trajectories(), strict=True):
            times = {name: row.get(name) for name in ("began", "seconds")}
            records.append(record(label, trajectory) | times)
    return frame_of(records)


def load_run(run: str | Path, kind: str | None = None) -> DataFrame:
    """The metrics of a run, from its metrics.jsonl: one row a line, of one kind or of all.

    Columns: stage, step, kind (`train`, `eval`, `final`, `check`, ...), and every metric. A score with an interval is
    three columns, NAME, NAME_low and NAME_high; other nested values are NAME/PART. A torn last line, of a run that is
    being written, is left out. Raises RunError if the folder is not a run, or has no metrics yet.
    """
    path = Path(run).expanduser() / METRICS_FILE
    if not path.is_file():
        raise RunError(f"{run} is not a run with metrics: it holds no {METRICS_FILE}")
    return frame_of([line for line in _lines(path) if kind in (None, line.get("kind"))])


def load_samples(run: str | Path) -> DataFrame:
    """The samples that a run has saved in samples.jsonl, with their rewards: one row per sample, no rows if there are
    none."""
    path = Path(run).expanduser() / SAMPLES_FILE
    return frame_of(_lines(path) if path.is_file() else [])


def _lines(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a JSON Lines file, flattened. Texts may hold other line breaks, such as U+2028."""
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            found = json.loads(line)
        except ValueError:
            continue
        if isinstance(found, dict):
            records.append(_flat(found))
    return records


def _flat(line: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A line, flattened."""
    flat: dict[str, Any] = {}
    for name, value in line.items():
        name = f"{prefix}{name}"
        if isinstance(value, dict) and "mean" in value and "ci95" in value:
            low, high = value["ci95"]
            flat |= {name: value["mean"], f"{name}_low": low, f"{name}_high": high}
        elif isinstance(value, dict):
            flat |= _flat(value, f"{name}/")
        else:
            flat[name] = value
    return flat


def frame_of(records: Sequence[Mapping[str, Any]]) -> DataFrame:
    """Records as a table, with every column that any of them has."""
    import pandas

    return pandas.DataFrame.from_records(list(records))


def records_of(episodes: Mapping[str, Sequence[Trajectory]]) -> Iterator[dict[str, Any]]:
    """The rows of a table of episodes by policy."""
    for label, trajectories in episodes.items():
        for trajectory in trajectories:
            yield record(label, trajectory)


def record(policy: str, trajectory: Trajectory) -> dict[str, Any]:
    """An episode as a row of a table."""
    sampled = [(one, place) for one in trajectory.segments for place in one.actions]
    values = {f"component/{name}" if name in COLUMNS else name: value for name, value in named_values(trajectory)}
    return {
        "policy": policy,
        "group": trajectory.group,
        "episode": trajectory.episode,
        "prompt": trajectory.prompt,
        "completion": trajectory.completion,
        **values,
        "turns": len(trajectory.turns),
        "failure": trajectory.failure,
        "tokens": [one.tokens[place] for one, place in sampled],
        "logprobs": [one.logprobs[place] for one, place in sampled],
    }


def write_table(frame: DataFrame, path: Path) -> None:
    """Write a table as CSV, JSON (a list of objects), JSON lines or Parquet, by the name's ending."""
    check_table_name(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".csv":
        frame.drop(columns=[name for name in LISTS if name in frame]).to_csv(path, index=False)
    elif path.suffix == ".parquet":
        frame.to_parquet(path, index=False)
    else:
        lines = path.suffix == ".jsonl"
        frame.to_json(path, orient="records", lines=lines, force_ascii=False, double_precision=15)


def check_table_name(path: Path) -> None:
    """Raise RunError for a file name that does not end in a table's format."""
    if path.suffix not in KINDS or path.is_dir():
        raise RunError(f"--export: '{path}' does not name a table: end it in {', '.join(KINDS)}")
