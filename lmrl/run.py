"""The run folder: everything a run leaves behind, as files that people and other tools can read.

    recipe.yaml       the resolved recipe          versions.json   versions, git commit, machine, hashes of named files
    metrics.jsonl     one line per step or score   samples.jsonl   samples with their rewards
    results.json      the final table
    model/                                         a model that was passed as a Python object, unchanged
    stages/NAME/start/                             the stage's initial policy, if it exists nowhere else
    stages/NAME/checkpoints/step-000050/           a transformers or peft folder, and state/ for resuming
    stages/NAME/final/                             the same at the end; a stage that has one is finished
    bundles/NAME-step-000050-EVENT/                a failed update or pass, for `lmrl replay`

A folder under `checkpoints/` or `final/` appears by one rename, so whatever is there is complete.
"""

from __future__ import annotations

import fcntl
import hashlib
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

from lmrl.atomic_files import SCRATCH, replacing, scratch_path, write_atomically
from lmrl.errors import LostFolderError, RunError
from lmrl.named_files import changed, contents, file_hash
from lmrl.recipe import MAIN_STAGE, Recipe
from lmrl.recipe.files import to_yaml
from lmrl.resumed_recipe import resumed_recipe
from lmrl.run_folders import RECIPE_FILE, VERSIONS_FILE, checkpoints_in, read_recipe, step_name
from lmrl.secrets import check_no_secrets, redact

RESULTS_FILE = "results.json"
MODEL_FOLDER = "model"
"""Folder of the model that a Python program passed as an object, unchanged."""
METRICS_FILE, SAMPLES_FILE = "metrics.jsonl", "samples.jsonl"
LOCK_FILE, CALL_FILE = ".lock", ".call"
"""The file that a writing process locks; the reward or environment that is being called (see lmrl.plugins.foreign); deleted if the run ended with its own message."""
OF_A_START = {
    LOCK_FILE,
    CALL_FILE,
    RECIPE_FILE,
    VERSIONS_FILE,
    METRICS_FILE,
    SAMPLES_FILE,
    MODEL_FOLDER,
    "bad_rows.jsonl",
    "stages",
    "trackers",
}
"""Files that a run may have written before its first step."""
PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "gymnasium", "numpy", "tokenizers")


class Run:
    """An open run folder. Only one run may hold it; if a run has several processes, the main one writes."""

    def __init__(self, folder: Path, recipe: Recipe, writes: bool = True):
        """writes: False for a process that leaves writing to the main one."""
        self.folder, self.recipe, self.writes = folder, recipe, writes
        self._files: dict[str, Any] = {}
        self.new: list[Path] = []
        """Folders that were created for this run, innermost first."""
        self._process = os.getpid()
        if not self.writes:
            return
        self._lock = open(folder / LOCK_FILE, "w")  # noqa: SIM115 - held until `release`
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise RunError(f"{folder}: another process is writing to this run") from error

    # -------------------------------------------------------------------------------------------------------- opening
    @classmethod
    def create(cls, folder: Path, recipe: Recipe) -> Run:
        """A new run in an empty or absent folder."""
        check_no_secrets(recipe)
        if folder.is_dir() and not is_blank(folder):
            if (folder / RECIPE_FILE).is_file():
                raise RunError(f"{folder} holds a run: continue it with --resume, or choose another --output")
            if has_steps(folder):
                raise RunError(
                    f"{folder} holds a run without its {RECIPE_FILE}: put that back and resume it, or choose another "
                    "--output"
                )
            raise RunError(f"{folder} exists and is not empty: choose another --output")
        new = [one for one in (folder, *folder.parents) if not one.exists()]
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(f"--output: cannot make the folder {folder}: {error.strerror}") from error
        run = cls(folder, recipe)
        run.new = new
        run._clear()
        run._write_recipe(describe_machine() | {"files": contents(recipe.model_dump(mode="json"))})
        return run

    @classmethod
    def resume(cls, folder: Path, recipe: Recipe | None) -> Run:
        """Reopen a run; `recipe` (None: the run's own) must compute the same."""
        own = read_recipe(folder)
        return cls(folder, own if recipe is None else resumed_recipe(folder, own, recipe))

    def rewrite_recipe(self) -> None:
        """Write the recipe that the run continues with, which is then its own."""
        self._write_recipe(self._versions())

    def _write_recipe(self, versions: dict[str, Any]) -> None:
        text = to_yaml(self.recipe)
        versions |= {"recipe": hashlib.sha256(text.encode()).hexdigest()}
        write_atomically(self.folder / VERSIONS_FILE, json.dumps(versions, indent=2) + "\n")
        write_atomically(self.folder / RECIPE_FILE, text)  # last: a folder with a recipe is a run

    def _versions(self) -> dict[str, Any]:
        """The content of versions.json; empty if it is missing or damaged, because the run does not need it."""
        try:
            versions: dict[str, Any] = json.loads((self.folder / VERSIONS_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return versions

    def changed_files(self) -> list[str]:
        """The recipe, if it was edited, and the files that it names whose content is not what it was when the run
        began."""
        versions, own = self._versions(), self.folder / RECIPE_FILE
        edited = versions.get("recipe", file_hash(own)) != file_hash(own)
        return [str(own)] * edited + changed(versions.get("files", {}))

    def release(self) -> None:
        """Unlock the folder for other writers; this object only reads from now on."""
        if self.writes:
            self._lock.close()

    def discard(self) -> None:
        """Remove all files of a run that was refused, as long as nothing was sampled or trained."""
        if not self.writes or (self.folder / SAMPLES_FILE).exists() or not is_blank(self.folder):
            return
        for file in self._files.values():
            file.close()
        self._files.clear()
        self._clear()
        (self.folder / LOCK_FILE).unlink(missing_ok=True)
        for folder in self.new:
            if any(folder.iterdir()):
                break
            folder.rmdir()

    def _clear(self) -> None:
        """Remove the files of a failed start."""
        for path in [*self.folder.iterdir()]:
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != LOCK_FILE:
                path.unlink()

    # -------------------------------------------------------------------------------------------------------- writing
    def _check_held(self) -> None:
        """Raise LostFolderError if the folder is no longer the one that was locked: another run may be there by now."""
        if not self.writes:
            return
        try:
            held = os.path.samestat(os.stat(self.folder / LOCK_FILE), os.fstat(self._lock.fileno()))
        except FileNotFoundError:
            held = False
        if not held:
            raise LostFolderError(
                f"{self.folder} was moved, deleted or replaced while this run was writing to it: resume it where it is "
                "now, or start it again"
            )

    def record(self, line: dict[str, Any]) -> None:
        """Append a line to metrics.jsonl."""
        self._check_held()
        self._append(METRICS_FILE, line)

    def record_samples(self, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            self._append(SAMPLES_FILE, line)

    def _append(self, name: str, line: dict[str, Any]) -> None:
        if not self.writes or os.getpid() != self._process:  # a forked process must not write to the run
            return
        if name not in self._files:
            self._files[name] = open(self.folder / name, "a", encoding="utf-8")  # noqa: SIM115
        self._files[name].write(json.dumps(line, ensure_ascii=False, default=str) + "\n")
        self._files[name].flush()

    def recorded(self, stage: str, kind: str) -> list[dict[str, Any]]:
        """A stage's lines of one kind in metrics.jsonl."""
        path = self.folder / METRICS_FILE
        lines = [_line(text) for text in path.read_bytes().splitlines()] if path.exists() else []
        return [line for line in lines if line and (line["stage"], line.get("kind")) == (stage, kind)]

    def sync(self) -> None:
        """Sync the recorded lines to disk; called before a checkpoint that relies on them."""
        for file in self._files.values():
            os.fsync(file.fileno())

    def cut(self, stage: str, step: int) -> None:
        """Drop recorded lines of later steps and stages, and a torn last line: they will be written again.

        Lines that cannot be read are moved to NAME.broken; all others stay.
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
                elif (line["stage"], line.get("kind")) == (
                    stage,
                    "final",
                ):  # written at the stage's end, which is still to come
                    break
                elif (order.index(line["stage"]), line["step"]) <= (order.index(stage), step):
                    kept.append(text + b"\n")
            if broken:
                self._put_aside(path, broken)
            write_atomically(path, b"".join(kept).decode())

    def _put_aside(self, path: Path, broken: list[tuple[int, bytes]]) -> None:
        """Move lines that cannot be read to a file next to the original, and print a warning."""
        aside = path.with_name(f"{path.name}.broken")
        with open(aside, "ab") as file:
            file.writelines(text + b"\n" for _, text in broken)
        numbers = ", ".join(str(number) for number, _ in broken[:5]) + (", ..." if len(broken) > 5 else "")
        print(
            f"lmrl: warning: {path}: line {numbers} cannot be read: moved to {aside.name}, all others stay",
            file=sys.stderr,
        )

    # ----------------------------------------------------------------------------------------------------- checkpoints
    def stage_folder(self, stage: str) -> Path:
        return self.folder / "stages" / stage

    def final(self, stage: str) -> Path:
        return self.stage_folder(stage) / "final"

    def checkpoints(self, stage: str) -> list[Path]:
        """Complete checkpoints of a stage, oldest first."""
        return checkpoints_in(self.stage_folder(stage))

    def write_folder(self, target: Path, write: Callable[[Path], None], anyone: bool = False) -> None:
        """Write a folder that appears by one rename; an existing one is left unchanged. anyone: also from a process
        other than the main one, under a unique name."""
        self._check_held()
        if not (self.writes or anyone) or target.exists():
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = scratch_path(target)
        if scratch.exists():
            shutil.rmtree(scratch)
        scratch.mkdir()
        try:
            write(scratch)
        except BaseException:  # of a full disk, whose space it would keep
            shutil.rmtree(scratch, ignore_errors=True)
            raise
        self.publish(scratch, target)

    def write_file(self, target: Path, write: Callable[[Path], None]) -> None:
        """Write a file that appears by one rename."""
        if not self.writes:
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        with replacing(target) as scratch:
            write(scratch)

    def publish(self, scratch: Path, target: Path) -> None:
        """Sync a written folder to disk and rename it to its final name."""
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
                doomed = scratch_path(path)  # so that a half-deleted folder is not taken for a checkpoint
                path.rename(doomed)
                shutil.rmtree(doomed)


def is_blank(folder: Path) -> bool:
    """True if a folder is empty, or holds only files of a run that ended before its first step."""
    names = {path.name for path in folder.iterdir() if not path.name.startswith(SCRATCH)}
    if names <= {LOCK_FILE, VERSIONS_FILE}:
        return True
    started = {RECIPE_FILE, VERSIONS_FILE, LOCK_FILE} <= names
    return started and names <= OF_A_START and not has_steps(folder)


def has_steps(folder: Path) -> bool:
    """True if a run's folder holds a step's line, a checkpoint or a result."""
    if any(one for pattern in ("*/checkpoints/*", "*/final") for one in (folder / "stages").glob(pattern)):
        return True
    path = folder / METRICS_FILE
    lines = [_line(text) for text in path.read_bytes().splitlines()] if path.is_file() else []
    return any(line is None or line.get("kind") == "train" for line in lines)


def _line(text: bytes) -> dict[str, Any] | None:
    """A recorded line, or None if it is broken."""
    try:
        line = json.loads(text)
    except ValueError:  # not JSON, or not UTF-8
        return None
    fine = isinstance(line, dict) and isinstance(line.get("stage"), str) and isinstance(line.get("step"), int)
    return line if fine else None


def describe_machine() -> dict[str, Any]:
    """Versions and machine, for versions.json."""
    versions: dict[str, str | None] = {}
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
        "command": [redact(argument) for argument in sys.argv],
    }


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
