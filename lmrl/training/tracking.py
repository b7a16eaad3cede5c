"""Experiment trackers: where people follow a run, besides its folder. The shipped ones are accelerate's; others are custom.

They get the recipe, the metrics of each step and evaluation, the shown samples and the closing table. A resumed run continues in the
run that the tracker already has: its id is kept in the run folder, trackers/runs.json.
"""

from __future__ import annotations

import html
import importlib.util
import json
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lmrl import distributed
from lmrl.atomic_files import write_atomically
from lmrl.errors import LmrlError, PluginError, RecipeError, RunError, counted
from lmrl.extras import fix_of
from lmrl.plugins import registry
from lmrl.plugins.foreign import foreign
from lmrl.recipe import CustomTracker, Recipe
from lmrl.run import Run
from lmrl.training.display import Display
from lmrl.trajectories.trajectory import Trajectory

FOLDER, IDS_FILE = "trackers", "runs.json"
LIMIT = 300.0
"""Seconds that a call of a tracker may take; one that takes longer has failed."""
CELL = 4000
"""Characters of a table's cell; longer texts are cut."""


# ------------------------------------------------------------------------------------------------------------- starting
@dataclass(frozen=True)
class Start:
    """Arguments to start a tracker. id: the run's id there. known: the tracker holds an earlier part of this run under that id."""

    label: str
    id: str
    known: bool
    folder: Path


ARGUMENTS: dict[str, Callable[[Start], dict[str, Any]]] = {
    "aim": lambda start: {"run_hash": start.id} if start.known else {},
    "clearml": lambda start: {
        "task_name": start.label,
        **({"continue_last_task": start.id} if start.known else {"reuse_last_task_id": False}),
    },
    "comet_ml": lambda start: {"experiment_key": start.id},
    "dvclive": lambda start: {"dir": str(start.folder / "dvclive"), "resume": start.known},
    "mlflow": lambda start: {"run_id": start.id} if start.known else {"run_name": start.label},
    "swanlab": lambda start: {
        "experiment_name": start.label,
        "id": start.id[:21],  # the length that its older versions ask for
        "resume": "allow",
        "logdir": str(start.folder),
    },
    "trackio": lambda start: {"name": f"{start.label}-{start.id[:8]}", "resume": "allow"},
    "wandb": lambda start: {"name": start.label, "id": start.id, "resume": "allow", "dir": str(start.folder)},
}
"""How each shipped tracker is told the run's name and id."""
CHOSEN: dict[str, Callable[[Any], str]] = {
    "aim": lambda tracker: tracker.tracker.hash,
    "clearml": lambda tracker: tracker.tracker.id,
    "mlflow": lambda tracker: tracker.tracker.info.run_id,
}
"""The ids that trackers choose themselves, once they are started."""


def check_trackers(recipe: Recipe) -> None:
    """Raise RecipeError or PluginError for a tracker that is not installed, or none of accelerate's kind."""
    for index, spec in enumerate(recipe.tracking.trackers):
        _class_of(spec, index)


def _class_of(spec: CustomTracker, index: int) -> type:
    from accelerate.tracking import GeneralTracker

    key = f"tracking.trackers.{index}"
    modules = {"tensorboard": ("tensorboard", "tensorboardX")}.get(spec.name, (spec.name,))
    if spec.name in registry.SHIPPED["tracker"] and not any(map(importlib.util.find_spec, modules)):
        raise RecipeError(f"{key}: '{spec.name}' is not installed: {fix_of(spec.name)}")
    cls = registry.load("tracker", spec.name, key)
    if not (isinstance(cls, type) and issubclass(cls, GeneralTracker)):
        raise PluginError(
            f"{key}: '{spec.name}' is no tracker: derive its class from accelerate.tracking.GeneralTracker"
        )
    return cls


def open_trackers(run: Run, display: Display) -> Trackers:
    """The trackers that a run's recipe names, started in the main process; none in the others. Raises RunError for one that cannot
    be started."""
    trackers, error = Trackers(run, display), None
    if run.writes:
        try:
            for index, spec in enumerate(run.recipe.tracking.trackers):
                trackers.opened[spec.name] = _start(run, spec, index)
        except LmrlError as problem:
            trackers.finish(failed=True)
            error = problem
    if error := distributed.broadcast(error):
        raise error
    return trackers


def _start(run: Run, spec: CustomTracker, index: int) -> Any:
    """One tracker, started; it is given the recipe unless it already has this run."""
    folder = run.folder / FOLDER
    folder.mkdir(exist_ok=True)
    ids = _ids(folder)
    start = Start(run.folder.name, ids.get(spec.name, uuid.uuid4().hex), spec.name in ids, folder)
    arguments = (ARGUMENTS[spec.name](start) if spec.name in ARGUMENTS else {}) | spec.options
    cls = _class_of(spec, index)
    places = [str(folder)] if getattr(cls, "requires_logging_directory", False) else []
    try:
        with _limited(spec.name):
            tracker = cls(run.recipe.tracking.project, *places, **arguments)
            tracker.start()
            if not start.known:
                tracker.store_init_configuration(config_of(run.recipe))
            chosen = CHOSEN.get(spec.name, lambda tracker: start.id)(tracker)
    except (Exception, SystemExit) as error:
        raise RunError(f"tracking.trackers.{index}: '{spec.name}' cannot be started: {_line(error)}") from error
    write_atomically(folder / IDS_FILE, json.dumps(ids | {spec.name: chosen}, indent=2) + "\n")
    return tracker


def _limited(name: str) -> foreign:
    return foreign(f"tracker {name}", LIMIT, key=None, may_hang=True)


def _ids(folder: Path) -> dict[str, str]:
    """By tracker, the id that it knows this run by."""
    try:
        ids: dict[str, str] = json.loads((folder / IDS_FILE).read_text())
        return ids
    except (OSError, ValueError):  # none yet, or torn
        return {}


def config_of(recipe: Recipe) -> dict[str, str | int | float | bool]:
    """The recipe as trackers take it: plain values by dotted key; null and lists of values are text."""
    flat: dict[str, str | int | float | bool] = {}

    def flatten(value: Any, key: str) -> None:
        if isinstance(value, dict) and value:
            for name, inner in value.items():
                flatten(inner, f"{key}.{name}" if key else str(name))
        elif isinstance(value, list) and any(isinstance(item, dict | list) for item in value):
            for index, item in enumerate(value):
                flatten(item, f"{key}.{index}")
        else:
            flat[key] = value if isinstance(value, str | int | float) else json.dumps(value)

    flatten(recipe.model_dump(mode="json"), "")
    return flat


# ------------------------------------------------------------------------------------------------------------- a run's
@dataclass
class Trackers:
    """Open trackers by name; `with` finishes them, however the run ends.

    One that fails is dropped from then on: this is reported once and recorded, and what it misses is counted.
    """

    run: Run
    display: Display
    opened: dict[str, Any] = field(default_factory=dict)
    missed: dict[str, int] = field(default_factory=dict)

    def __enter__(self) -> Trackers:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        self.finish(failed=kind is not None)

    def log(self, values: dict[str, Any], stage: str, step: int, offset: int = 0) -> None:
        """step: of the stage. offset: steps of the stages before it."""
        self._each(lambda tracker: tracker.log(values, step=offset + step), stage, step)

    def table(
        self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], stage: str, step: int, offset: int = 0
    ) -> None:
        if rows:
            cells = [[_cell(value) for value in row] for row in rows]
            self._each(lambda tracker: log_table(tracker, name, list(columns), cells, offset + step), stage, step)

    def _each(self, call: Callable[[Any], None], stage: str, step: int) -> None:
        for name, tracker in self.opened.items():
            if name in self.missed:
                self.missed[name] += 1
                continue
            try:
                with _limited(name):
                    call(tracker)
            except (Exception, SystemExit) as error:
                self.missed[name] = 1
                self.run.record({"stage": stage, "step": step, "kind": "tracker", "name": name, "error": _line(error)})
                self.display.say(f"warning: tracker {name} failed and is left out from here on: {_line(error)}")

    def finish(self, failed: bool) -> None:
        """failed: the run has not reached its end."""
        for name, tracker in self.opened.items():
            try:
                with _limited(name):
                    finish_tracker(tracker, name, failed)
            except (Exception, SystemExit) as error:
                if name not in self.missed:
                    self.display.say(f"warning: tracker {name} could not be finished: {_line(error)}")
        for name, count in self.missed.items():
            self.display.say(
                f"tracker {name} has missed {counted(count, 'entry', 'entries')} since it failed: metrics.jsonl has all"
            )
        self.opened = {}


@dataclass(frozen=True)
class StageTracking:
    """A stage's view of the trackers. offset: steps of the stages before it. trackers: None for none."""

    trackers: Trackers | None = None
    stage: str = ""
    offset: int = 0

    def __call__(self, metrics: dict[str, Any], step: int) -> None:
        if self.trackers is not None:
            self.trackers.log(metrics, self.stage, step, self.offset)

    def samples(self, trajectories: Sequence[Trajectory], step: int) -> None:
        """A table of these episodes."""
        if self.trackers is not None:
            rows = [[step, one.prompt, one.completion, one.reward] for one in trajectories]
            columns = ("step", "prompt", "completion", "reward")
            self.trackers.table(f"{self.stage}/samples", columns, rows, self.stage, step, self.offset)


SCORE_COLUMNS = ("row", "metric", "mean", "low", "high", "n")


def score_rows(scores: dict[str, dict[str, dict[str, Any]]]) -> list[list[Any]]:
    """A table of scores (see lmrl.evaluation.statistics.summarize), one row a number."""
    return [
        [label, name, score["mean"], *score["ci95"], score["n"]]
        for label, row in scores.items()
        for name, score in row.items()
    ]


# ------------------------------------------------------------------------------------------------------------ by kind
def log_table(tracker: Any, name: str, columns: list[str], rows: list[list[Any]], step: int) -> None:
    """A table as the tracker has them: by its `log_table`, as trackio's Table, or tensorboard's text; others have none."""
    if hasattr(tracker, "log_table"):
        tracker.log_table(name, columns=columns, data=rows, step=step)
    elif tracker.name == "trackio":
        import pandas
        import trackio

        tracker.log({name: trackio.Table(dataframe=pandas.DataFrame(rows, columns=columns))}, step=step)
    elif tracker.name == "tensorboard":
        tracker.log({name: markdown(columns, rows)}, step=step)


def finish_tracker(tracker: Any, name: str, failed: bool) -> None:
    """Finish a tracker, and tell it that the run failed, if it has a way to be told."""
    if failed and name == "wandb":
        tracker.tracker.finish(exit_code=1)
    elif failed and name == "mlflow":
        import mlflow

        mlflow.end_run("FAILED")
    else:
        tracker.finish()


def markdown(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table in Markdown, whose cells show text as it is."""

    def line(cells: Sequence[Any]) -> str:
        texts = (html.escape(f"{cell:.4g}" if isinstance(cell, float) else str(cell), quote=False) for cell in cells)
        return "| " + " | ".join(text.replace("|", "&#124;").replace("\n", "<br>") for text in texts) + " |"

    return "\n".join([line(columns), line(["---"] * len(columns)), *map(line, rows)])


def _cell(value: Any) -> Any:
    """Text in whole characters and of bounded length; a missing number is empty text."""
    if isinstance(value, bool | int | float):
        return value
    text = "" if value is None else value if isinstance(value, str) else json.dumps(value, default=str)
    return text[:CELL].encode(errors="replace").decode()


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__
