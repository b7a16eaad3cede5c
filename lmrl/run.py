"""The run folder: everything a run leaves behind, as files that people and other tools can read.

    recipe.yaml       the resolved recipe          versions.json   versions, git commit, machine
    metrics.jsonl     one line a step or score     samples.jsonl   what was sampled, and its rewards
    results.json      the closing table
    stages/NAME/start/                             the policy as the stage began, where it exists nowhere else
    stages/NAME/checkpoints/step-000050/           a transformers or peft folder, and state/ for resuming
    stages/NAME/final/                             the same at the end; a stage that has one is finished
    bundles/NAME-step-000050-EVENT/                an update or pass that went wrong, for `lmrl replay`

A folder under `checkpoints/` or `final/` appears by one rename, so whatever is there is complete.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Collection
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from lmrl.errors import RunError
from lmrl.recipe import MAIN_STAGE, OWN_TASK, Recipe
from lmrl.recipe.files import read_yaml, to_yaml, validate

RECIPE_FILE, VERSIONS_FILE, RESULTS_FILE = "recipe.yaml", "versions.json", "results.json"
METRICS_FILE, SAMPLES_FILE = "metrics.jsonl", "samples.jsonl"
PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "gymnasium", "numpy", "tokenizers")
FREE_TO_CHANGE = (
    ("training", "checkpoint_every"),
    ("training", "keep_checkpoints"),
    ("training", "microbatch_tokens"),
    ("training", "gradient_checkpointing"),
    ("training", "try_worst_case"),
    ("tracking",),
)
"""Recipe keys that a resumed run may change, because they do not touch what is computed, or only its rounding."""


class Run:
    """An open run folder. Only one run may hold it; of several processes of a run, the main one writes."""

    def __init__(self, folder: Path, recipe: Recipe, writes: bool = True):
        """writes: False for a process that leaves writing to the main one."""
        self.folder, self.recipe, self.writes = folder, recipe, writes
        self._files: dict[str, Any] = {}
        self._process = os.getpid()
        if not self.writes:
            return
        self._lock = open(folder / ".lock", "w")  # noqa: SIM115 - held until the process ends
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise RunError(f"{folder}: another process is writing to this run") from error

    # -------------------------------------------------------------------------------------------------------- opening
    @classmethod
    def create(cls, folder: Path, recipe: Recipe) -> Run:
        """A new run in an empty or absent folder."""
        # What a run killed while it was being created leaves behind is no reason to refuse the folder.
        if folder.is_dir() and any(path.name not in (".lock", VERSIONS_FILE) for path in _visible(folder)):
            raise RunError(f"{folder} exists and is not empty: resume it with --resume, or choose another --output")
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(f"--output: cannot make the folder {folder}: {error.strerror}") from error
        run = cls(folder, recipe)
        write_atomically(folder / VERSIONS_FILE, json.dumps(describe_machine(), indent=2) + "\n")
        write_atomically(folder / RECIPE_FILE, to_yaml(recipe))  # last: a folder with a recipe is a run
        return run

    @classmethod
    def resume(cls, folder: Path, recipe: Recipe | None) -> Run:
        """Reopen a run; `recipe` (None: the run's own) must compute the same."""
        own = read_recipe(folder)
        if recipe is not None:
            recipe = _as_before(recipe, folder)
            different = _differences(own.model_dump(mode="json"), recipe.model_dump(mode="json"))
            if different:
                raise RunError(
                    f"{folder} was made by another recipe: '{'.'.join(different[0])}' differs"
                    f"{f' (and {len(different) - 1} more)' if len(different) > 1 else ''}; "
                    "resume it without overrides, or start a new run with another --output"
                )
        return cls(folder, recipe or own)

    # -------------------------------------------------------------------------------------------------------- writing
    def record(self, line: dict[str, Any]) -> None:
        """Append a line to metrics.jsonl."""
        self._append(METRICS_FILE, line)

    def record_samples(self, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            self._append(SAMPLES_FILE, line)

    def _append(self, name: str, line: dict[str, Any]) -> None:
        if not self.writes or os.getpid() != self._process:  # one that was forked off has no run to write to
            return
        if name not in self._files:
            self._files[name] = open(self.folder / name, "a", encoding="utf-8")  # noqa: SIM115
        self._files[name].write(json.dumps(line, ensure_ascii=False, default=str) + "\n")
        self._files[name].flush()

    def recorded(self, stage: str, kind: str) -> list[dict[str, Any]]:
        """Lines of a kind that a stage has in metrics.jsonl."""
        path = self.folder / METRICS_FILE
        lines = [_line(text) for text in path.read_bytes().splitlines()] if path.exists() else []
        return [line for line in lines if line and (line["stage"], line.get("kind")) == (stage, kind)]

    def sync(self) -> None:
        """Put what was recorded on disk; called before a checkpoint that counts on it."""
        for file in self._files.values():
            os.fsync(file.fileno())

    def cut(self, stage: str, step: int) -> None:
        """Drop recorded lines of later steps and stages, and a torn last line: they will be written again.

        Lines that cannot be read are put aside, in NAME.broken, and their neighbours stay.
        """
        if not self.writes:
            return
        order = [*self.recipe.stages, MAIN_STAGE]
        for file in self._files.values():  # the files are about to be replaced
            file.close()
        self._files.clear()
        for name in (METRICS_FILE, SAMPLES_FILE):
            path = self.folder / name
            if not path.exists():
                continue
            kept, broken = [], []
            for number, text in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
                line = _line(text)
                if line is None or line["stage"] not in order:
                    broken.append((number, text))
                elif (line["stage"], line.get("kind")) == (stage, "final"):  # of its end, which is still to come
                    break
                elif (order.index(line["stage"]), line["step"]) <= (order.index(stage), step):
                    kept.append(text + b"\n")
            if broken:
                self._put_aside(path, broken)
            write_atomically(path, b"".join(kept).decode())

    def _put_aside(self, path: Path, broken: list[tuple[int, bytes]]) -> None:
        """Keep lines that cannot be read beside the file they come from, and say so."""
        aside = path.with_name(f"{path.name}.broken")
        with open(aside, "ab") as file:
            file.writelines(text + b"\n" for _, text in broken)
        numbers = ", ".join(str(number) for number, _ in broken[:5]) + (", ..." if len(broken) > 5 else "")
        print(
            f"lmrl: warning: {path}: line {numbers} cannot be read: kept in {aside.name}, all others stay",
            file=sys.stderr,
        )

    # ----------------------------------------------------------------------------------------------------- checkpoints
    def stage_folder(self, stage: str) -> Path:
        return self.folder / "stages" / stage

    def final(self, stage: str) -> Path:
        return self.stage_folder(stage) / "final"

    def checkpoints(self, stage: str) -> list[Path]:
        """Complete checkpoints of a stage, oldest first."""
        return sorted((self.stage_folder(stage) / "checkpoints").glob("step-*"))

    def write_folder(self, target: Path, write: Callable[[Path], None], anyone: bool = False) -> None:
        """Fill a folder that appears by one rename; an existing one is left as it is. anyone: also by a process that leaves
        writing to the main one, under a name of its own."""
        if not (self.writes or anyone) or target.exists():
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = target.parent / f".writing-{target.name}"
        if scratch.exists():
            shutil.rmtree(scratch)
        scratch.mkdir()
        write(scratch)
        self.publish(scratch, target)

    def write_file(self, target: Path, write: Callable[[Path], None]) -> None:
        """Fill a file that appears by one rename."""
        if not self.writes:
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = target.with_name(f".writing-{target.name}")
        write(scratch)
        scratch.rename(target)

    def publish(self, scratch: Path, target: Path) -> None:
        """Make a folder that is written appear under its name, on disk and by one rename."""
        self.sync()
        for path in [*scratch.rglob("*"), scratch]:
            _fsync(path)
        scratch.rename(target)
        _fsync(target.parent)

    def prune(self, stage: str, keep: int, wanted: Collection[int] = ()) -> None:
        """Delete all but the newest checkpoints and those of the wanted steps."""
        if not self.writes:
            return
        for path in self.checkpoints(stage)[:-keep]:
            if path.name not in map(step_name, wanted):
                doomed = path.with_name(f".writing-{path.name}")  # what is half deleted is no checkpoint either
                path.rename(doomed)
                shutil.rmtree(doomed)


def _visible(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if not path.name.startswith(".writing-")]


def _line(text: bytes) -> dict[str, Any] | None:
    """A recorded line, or None where it is broken."""
    try:
        line = json.loads(text)
    except ValueError:  # no JSON, or no UTF-8
        return None
    fine = isinstance(line, dict) and isinstance(line.get("stage"), str) and isinstance(line.get("step"), int)
    return line if fine else None


def step_name(step: int) -> str:
    return f"step-{step:06d}"


def read_recipe(folder: Path) -> Recipe:
    """The resolved recipe of a run folder."""
    if not (folder / RECIPE_FILE).is_file():
        raise RunError(f"{folder} is not a run: it holds no {RECIPE_FILE}")
    return validate(Recipe, read_yaml(folder / RECIPE_FILE))


def final_checkpoint(folder: Path, which: str = "final") -> Path:
    """A checkpoint folder of a run's last stage: `final` (or the newest there is), `best`, or `step-N`."""
    stage = folder / "stages" / MAIN_STAGE
    if not stage.is_dir():
        raise RunError(f"{folder}: its last stage has no checkpoint yet; resume it with: lmrl train {folder} --resume")
    checkpoints = sorted((stage / "checkpoints").glob("step-*"))
    if which == "best":
        newest = [stage / "final"] if (stage / "final").exists() else checkpoints[-1:]
        best = json.loads((newest[0] / "state" / "trainer.json").read_text())["best"] if newest else None
        which = step_name(best["step"]) if best else "final"
    if which == "final":
        if (stage / "final").exists():
            return stage / "final"
        if checkpoints:
            return checkpoints[-1]
        raise RunError(f"{folder}: its last stage has no checkpoint yet; resume it with: lmrl train {folder} --resume")
    step = which.removeprefix("step-")
    found = stage / "checkpoints" / (step_name(int(step)) if step.isdigit() else which)
    if not found.exists():
        names = ", ".join([path.name for path in checkpoints] + ["final", "best"])
        raise RunError(f"{folder} has no checkpoint '{which}'; there are: {names}")
    return found


def latest_run(root: Path = Path("runs")) -> Path:
    """The run folder that was written to last."""
    found = [path.parent for path in root.glob(f"**/{RECIPE_FILE}") if (path.parent / VERSIONS_FILE).exists()]
    if not found:
        raise RunError(f"there is no run to resume under {root}/: name its folder, lmrl train FOLDER --resume")
    return max(found, key=lambda folder: max(path.stat().st_mtime for path in folder.iterdir()))


def describe_machine() -> dict[str, Any]:
    """Versions and machine, for versions.json."""
    versions = {}
    for package in ("lmrl", *PACKAGES):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    here = Path(__file__).resolve().parent
    git = ["git", "-C", str(here), "rev-parse", "HEAD"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, timeout=10).stdout.strip() or None
    except (OSError, subprocess.TimeoutExpired):
        commit = None
    return {
        "python": platform.python_version(),
        "packages": versions,
        "git_commit": commit,
        "machine": {"system": platform.platform(), "processor": platform.machine(), "cores": os.cpu_count()},
        "command": sys.argv,
    }


def write_atomically(path: Path, text: str) -> None:
    scratch = path.with_name(f".writing-{path.name}")
    with open(scratch, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    scratch.rename(path)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _as_before(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe, evaluated as the run in that folder is, which may have begun when recipes that named no suite were not."""
    written = read_yaml(folder / RECIPE_FILE).data
    if "final" in written.get("training", {}):
        return recipe
    evaluation, before = recipe.evaluation, written.get("evaluation", {})
    suite = before.get("suite") if evaluation.suite == OWN_TASK else evaluation.suite
    every = before.get("every", 0) if evaluation.every is None else evaluation.every
    return recipe.model_copy(update={"evaluation": evaluation.model_copy(update={"suite": suite, "every": every})})


def _differences(old: Any, new: Any, keys: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    if keys in FREE_TO_CHANGE or old == new:
        return []
    if isinstance(old, dict) and isinstance(new, dict):
        names = dict.fromkeys([*old, *new])
        return [found for name in names for found in _differences(old.get(name), new.get(name), (*keys, name))]
    return [keys]
