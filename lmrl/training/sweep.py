"""Sweeps: a recipe run once for every combination of some keys' values, and one table over the runs.

Runs are separate processes (`lmrl train ...`), so that each is what it would be alone, and one that fails does not
affect the others. The sweep's folder holds

    NAME/          a run, for instance seed-0_graph-1000      NAME.log   what it printed, each time
    results.json   scores over the runs, see `over_runs`
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lmrl.atomic_files import write_atomically
from lmrl.errors import COLLAPSED, LmrlError, RecipeError, RunError, counted
from lmrl.evaluation.statistics import UNLIMITED, summarize
from lmrl.plugins.foreign import noted
from lmrl.recipe import CHOICES, REWARD_MODEL, Recipe
from lmrl.recipe.document import Loader
from lmrl.recipe.files import load_recipe
from lmrl.run import CALL_FILE, RESULTS_FILE, Run
from lmrl.run_folders import RECIPE_FILE, read_recipe
from lmrl.training.build import suite_of
from lmrl.training.devices import slots_here
from lmrl.training.display import Display, counted_interval, fixed
from lmrl.training.extend import further_steps
from lmrl.training.interrupt import Interrupt, Interrupted
from lmrl.training.train import default_output

Rows = dict[str, dict[str, dict[str, Any]]]
"""Scores by row (data, BC, PPO, optimum) and metric."""
POLL_SECONDS = 0.2
KINDS = {f"{section}.{key}" for section, (key, _, _) in CHOICES.items()}


class SweepError(LmrlError):
    """Some runs of a sweep failed."""

    exit_code = 1


@dataclass(frozen=True)
class Point:
    """One combination: the run's name, its overrides, and the recipe that they make."""

    name: str
    overrides: list[str]
    recipe: Recipe

    @property
    def columns(self) -> list[str]:
        """The metrics of the run's suite, or of its reward model; the main one first."""
        if self.recipe.objective.name == REWARD_MODEL:
            from lmrl.training.agreement import COLUMNS

            return COLUMNS
        suite = suite_of(self.recipe, self.recipe.task)
        return suite.metrics if suite else []


def sweep(
    recipe: str,
    overrides: Sequence[str],
    over: Sequence[str],
    output: str | Path | None = None,
    jobs: int = 1,
    resume: bool = False,
) -> dict[str, Any]:
    """Run a recipe (a file or a shipped name) over values, `jobs` runs at a time; returns what results.json holds.

    over: `KEY=VALUE,VALUE`, one entry per key. output: the sweep's folder (default: a new one under `runs/`). resume:
    keep the finished runs in that folder and continue the others. Accelerators, if any, are divided among parallel
    runs. Raises RecipeError or RunError before anything runs, and SweepError at the end if runs failed. SIGTERM and
    Ctrl-C let every run save a checkpoint.
    """
    display = Display()
    points = combinations(recipe, overrides, over)
    if jobs < 1:
        raise RecipeError(f"--jobs: at least one run at a time, not {jobs}")
    folder = Path(output) if output is not None else default_output(recipe)
    quoted = shlex.quote(str(folder))
    _check(folder, points, resume)
    folder.mkdir(parents=True, exist_ok=True)
    display.say(f"{counted(len(points), 'run')}, {min(jobs, len(points))} at a time, in {folder}")

    def start(point: Point) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "lmrl.training.swept_run", str(os.getpid()), "train", recipe, *point.overrides]
        command += ["--output", str(folder / point.name), "--resume"]
        environment = os.environ | ({"OMP_NUM_THREADS": "1"} if jobs > 1 else {}) | slots.take(point.name)
        with open(_log(folder, point), "ab") as log:
            printed[point.name] = log.tell()
            # Its own process group: Ctrl-C reaches only the sweep, which passes it on once (a second one would not
            # save).
            return subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, process_group=0
            )

    def report(point: Point, code: int, seconds: float) -> None:
        slots.free(point.name)
        if code in (0, COLLAPSED) and _finished(folder, point):
            display.say(f"{finished_line(point, _read(folder, point))}  ({seconds:.0f} s)")
        else:
            log = _log(folder, point).read_bytes()[printed[point.name] :]  # without what it printed in earlier attempts
            failed[point.name] = failure(log.decode(errors="replace"), code, noted(folder / point.name / CALL_FILE))
            display.say(f"{point.name} failed: {failed[point.name]}")

    slots = slots_here(jobs)
    failed: dict[str, str] = {}
    printed: dict[str, int] = {}
    """Size of a run's log when it was started."""
    waiting = []
    for point in points:
        if _finished(folder, point):
            display.say(f"{finished_line(point, _read(folder, point))}  (finished before)")
        else:
            waiting.append(point)
    try:
        run_all(waiting, start, report, jobs)
    except Interrupted:
        display.say(f"interrupted; continue with the same command, --output {quoted} and --resume")
        raise
    rows = over_runs({point.name: _read(folder, point) for point in points if point.name not in failed})
    results: dict[str, Any] = {"over": swept_values(over), "rows": rows, "failed": failed}
    write_atomically(folder / RESULTS_FILE, json.dumps(results, indent=2) + "\n")
    columns = dict.fromkeys(column for point in points for column in point.columns)
    if rows and columns:
        display.grid(
            "Result over runs",
            sweep_lines(rows, columns),
            "mean ± half width of the 95 % interval over runs, and the lowest run",
        )
    elif not rows and not failed:
        display.say(
            f"no run was evaluated, so there are no scores to compare: set evaluation.every, or lmrl eval {quoted}/*/"
        )
    if failed:
        raise SweepError(
            f"{len(failed)} of {len(points)} runs failed: {', '.join(failed)} (each has a .log in {folder})"
        )
    return results


# --------------------------------------------------------------------------------------------------- what is to be run
def read_over(over: Iterable[str]) -> dict[str, list[str]]:
    """`["training.seed=0,1"]` as `{"training.seed": ["0", "1"]}`; commas within brackets or quotes do not split."""
    swept: dict[str, list[str]] = {}
    for option in over:
        key, equals, text = option.partition("=")
        if not equals or not key:
            raise RecipeError(f"--over '{option}' is not of the form key=value,value, for instance training.seed=0,1,2")
        if key in swept:
            raise RecipeError(f"--over names '{key}' twice: give all its values at once")
        values = _split(text, option)
        if not values:
            raise RecipeError(f"--over '{option}' has no values, for instance training.seed=0,1,2")
        swept[key] = values
    return swept


def swept_values(over: Iterable[str]) -> dict[str, list[Any]]:
    """The values of each key, read as overrides are."""
    return {key: [yaml.load(text, Loader=Loader) for text in texts] for key, texts in read_over(over).items()}


def _split(text: str, option: str) -> list[str]:
    listed = f"[{text}]"
    try:
        node = yaml.compose(listed, Loader=Loader)
    except yaml.YAMLError as error:
        raise RecipeError(f"--over '{option}': the values are not a YAML list, for instance 0,1,2") from error
    assert node is not None, "brackets are a list"
    return [listed[item.start_mark.index : item.end_mark.index].strip() for item in node.value]


def combinations(recipe: str, overrides: Sequence[str], over: Sequence[str]) -> list[Point]:
    """Every combination of the values, the last key's turning fastest, each a checked recipe."""
    swept = read_over(over)
    for key in (override.partition("=")[0] for override in overrides):
        if key in swept:
            raise RecipeError(f"'{key}' is both set and swept by --over: leave one out")
    labels = _labels(list(swept))
    short = {key: _short(values) for key, values in swept.items()}
    points: list[Point] = []
    made: dict[str, str] = {}
    for chosen in itertools.product(*(range(len(values)) for values in swept.values())):
        name = "_".join(f"{labels[key]}-{short[key][index]}" for key, index in zip(swept, chosen, strict=True))
        own = [f"{key}={swept[key][index]}" for key, index in zip(swept, chosen, strict=True)]
        # A section's kind is set first, because setting it clears the section's other keys.
        everything = sorted([*overrides, *own], key=lambda override: not _names_a_kind(override))
        point = Point(name, everything, load_recipe(recipe, everything))
        first = made.setdefault(point.recipe.model_dump_json(), " ".join(own))
        if len(made) == len(points):
            raise RecipeError(f"--over: {first} and {' '.join(own)} make the same run: leave one out")
        points.append(point)
    return points


def _names_a_kind(override: str) -> bool:
    return ".".join(override.partition("=")[0].split(".")[-2:]) in KINDS


def _labels(keys: list[str]) -> dict[str, str]:
    """For each dotted key, its shortest suffix that no other key has: `seed`, or `warmup-training-steps`."""

    def label(key: str) -> str:
        parts = key.split(".")
        endings = [parts[start:] for start in range(len(parts) - 1, -1, -1)]
        alone = [end for end in endings if sum(other.split(".")[-len(end) :] == end for other in keys) == 1]
        return "-".join((alone or [parts])[0])

    return {key: label(key) for key in keys}


def _short(values: list[str]) -> list[str]:
    """Values as parts of a folder's name, numbered if some would otherwise be equal."""
    names = [re.sub(r"[^\w.+-]+", "-", value.strip("[]{}\"'/ "))[:40] for value in values]
    if len(set(names)) == len(names):
        return names
    return [f"{name}-{number}" for number, name in enumerate(names, start=1)]


def _check(folder: Path, points: list[Point], resume: bool) -> None:
    """Raise RunError for a folder that would be overwritten, or whose runs were made from other recipes."""
    if folder.exists() and not folder.is_dir():
        raise RunError(f"--output: {folder} is a file, not a folder")
    if not resume and folder.is_dir() and any(folder.iterdir()):
        raise RunError(f"{folder} exists and is not empty: resume it with --resume, or choose another --output")
    for point in points:
        if (folder / point.name / RECIPE_FILE).is_file():
            Run.resume(folder / point.name, point.recipe)  # raises if it is another recipe's run; closed at once


# ------------------------------------------------------------------------------------------------------------- running
def run_all(
    points: Sequence[Point],
    start: Callable[[Point], subprocess.Popen[bytes]],
    report: Callable[[Point, int, float], None],
    jobs: int,
) -> None:
    """Keep `jobs` processes going until all have ended; report each with its exit code and seconds.

    A signal is passed on as one SIGTERM to each, and raises Interrupted when they have ended.
    """
    waiting = deque(points)
    active: dict[str, tuple[Point, subprocess.Popen[bytes], float]] = {}
    with Interrupt() as interrupt:
        try:
            while waiting or active:
                if interrupt.number is not None:
                    raise Interrupted(interrupt.number)
                while waiting and len(active) < jobs:
                    point = waiting.popleft()
                    active[point.name] = (point, start(point), time.monotonic())
                time.sleep(POLL_SECONDS)
                for point, process, started in list(active.values()):
                    if process.poll() is not None:
                        del active[point.name]
                        report(point, process.returncode, time.monotonic() - started)
        finally:
            for _, process, _ in active.values():
                process.terminate()
            for _, process, _ in active.values():
                process.wait()


def failure(log: str, code: int, call: str | None = None) -> str:
    """Why a run failed, in one line: its error, or the last line that it printed, or its exit code.

    call: the call of the user's code in which it ended without a word."""
    end = log.rpartition("Traceback (most recent call last):")[2]  # lines of lmrl before it did not end the run
    lines = [line.strip() for line in end.splitlines() if line.strip()]
    errors = [line.removeprefix("lmrl: ") for line in lines if line.startswith("lmrl: ")]
    if code <= 0 or (call and not errors):
        how = f"ended by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}, but no result"
        return how + (f": ended in the middle of {call}" if call else "")
    return (errors or lines or [f"exit code {code}"])[-1]


def _log(folder: Path, point: Point) -> Path:
    return folder / f"{point.name}.log"


def _finished(folder: Path, point: Point) -> bool:
    run = folder / point.name
    return (run / RESULTS_FILE).is_file() and not further_steps(read_recipe(run), point.recipe)


def _read(folder: Path, point: Point) -> Rows:
    rows: Rows = json.loads((folder / point.name / RESULTS_FILE).read_text())
    return rows


# ------------------------------------------------------------------------------------------------------------- results
def finished_line(point: Point, rows: Rows) -> str:
    """A run's name and the main metric of each row."""
    means = [
        f"{label} {fixed(row[main]['mean'])}"
        for main in point.columns[:1]
        for label, row in rows.items()
        if main in row
    ]
    return "  ".join([point.name, *means])


def over_runs(runs: dict[str, Rows]) -> Rows:
    """Scores over runs by row and metric: mean, 95 % interval over the runs' means, n runs, the lowest, and each one's.

    A row that only some runs have (another method's) counts only these; but a run without a row for its best or its
    last policy counts with its result, which is that policy. The optimum comes last.
    """
    labels = dict.fromkeys(label for rows in runs.values() for label in rows)
    over = {}
    for label in sorted(labels, key=lambda label: label == "optimum"):
        result = label.removesuffix(", best").removesuffix(", last")
        found = {name: rows.get(label) or rows.get(result) for name, rows in runs.items()}
        over[label] = _over_runs([(name, row) for name, row in found.items() if row is not None])
    return over


def _over_runs(rows: list[tuple[str, dict[str, dict[str, Any]]]]) -> dict[str, dict[str, Any]]:
    scores = {}
    for metric in dict.fromkeys(metric for _, row in rows for metric in row):
        values = {name: row[metric]["mean"] for name, row in rows if metric in row}
        score = summarize(list(values.values()), limits=UNLIMITED, unit="run")
        scores[metric] = score | {"lowest": min(values.values()), "values": values}
    return scores


def sweep_lines(rows: Rows, columns: Iterable[str]) -> list[list[str]]:
    """The rows as lines of cells, each column with its mean over runs, the interval, and the lowest run."""
    shown = [column for column in columns if any(column in scores for scores in rows.values())]
    lines = [["", *(head for column in shown for head in (column, "lowest")), "n"]]
    for label, scores in rows.items():
        count = next((scores[column]["n"] for column in shown if column in scores), "")
        cells = [cell for column in shown for cell in _cells(scores.get(column), count)]
        lines.append([label, *cells, str(count)])
    return lines


def _cells(score: dict[str, Any] | None, count: int | str) -> tuple[str, str]:
    return counted_interval(score, count), fixed(score["lowest"]) if score else ""
