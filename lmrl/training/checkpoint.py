"""Checkpoints: an ordinary model folder, plus everything that determines the next step.

Weights are read back from the model folder itself. State is safetensors and JSON; nothing is unpickled. There is no
generator state, because every random stream is a function of (seed, stage, step).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from lmrl.errors import RunError
from lmrl.evaluation.api import TASK_FILE
from lmrl.objectives.base import Objective
from lmrl.policy.policy import Policy
from lmrl.recipe import OWN_TASK, Recipe
from lmrl.run import Run
from lmrl.run_folders import step_name
from lmrl.sources.base import Source
from lmrl.training.parallel.strategy import Strategy
from lmrl.training.updater import Updater

STATE = "state"
CHECKSUMS = Path(STATE) / "checksums.json"
NEEDED = (Path(STATE) / "trainer.json", Path(STATE) / "optimizer.safetensors")
"""The state that a stage resumes from, apart from the weights."""


@dataclass
class Progress:
    """The state of a stage, apart from tensors."""

    step: int = 0
    best: dict[str, Any] | None = None
    """`{"step", "metric", "value"}` of the best evaluation."""
    kept: int | None = None
    """The step whose policy is the stage's result, once that is decided."""
    scores: dict[str, Any] = field(default_factory=dict)
    """Scores for the closing table: of the policy at the `start`, at its `best` and its `last` step, of the `data` and
    of the `optimum`."""
    gate: dict[str, Any] = field(default_factory=dict)
    """See gate.GateState."""
    label: str = ""
    columns: list[str] = field(default_factory=list)
    """This stage's name in the closing table, and the scores to show."""
    ended: str | None = None
    """Why the stage ended with its best policy before its last step."""
    listeners: dict[str, Any] = field(default_factory=dict)
    """State of the listeners that have any, by name."""


def save(
    run: Run,
    stage: str,
    target: Path,
    recipe: Recipe,
    policy: Policy,
    objective: Objective,
    updater: Updater,
    source: Source,
    progress: Progress,
    optimizer: dict[str, torch.Tensor],
    weights: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write a checkpoint folder atomically. optimizer: its state, as `updater.tensors` gives it.
    weights: see `Policy.save`."""

    def write(folder: Path) -> None:
        policy.save(folder, weights)
        save_task(folder, recipe)
        (folder / STATE).mkdir()
        tensors = {name: tensor.contiguous() for name, tensor in optimizer.items()}
        save_file(tensors, folder / STATE / "optimizer.safetensors")
        source.save(folder / STATE)
        state = {"stage": stage, **asdict(progress), "objective": objective.state(), "updater": updater.state()}
        (folder / STATE / "trainer.json").write_text(json.dumps(state, indent=2) + "\n")
        write_checksums(folder)

    run.write_folder(target, write)


def save_task(folder: Path, recipe: Recipe) -> None:
    """Save the task with the weights, so that a checkpoint can be scored without its run."""
    saved = {
        "task": recipe.task and recipe.task.model_dump(mode="json"),
        "suite": None if recipe.evaluation.suite == OWN_TASK else recipe.evaluation.suite,
        "rollouts": recipe.rollouts.model_dump(mode="json"),
        "dtype": recipe.model.dtype,
    }
    (folder / TASK_FILE).write_text(json.dumps(saved, indent=2) + "\n")


def load(folder: Path, objective: Objective, updater: Updater, source: Source) -> Progress:
    """Restore a stage's state from a checkpoint, whose weights the policy has already."""
    updater.load_tensors(load_file(folder / STATE / "optimizer.safetensors"))
    source.load(folder / STATE)
    state = json.loads((folder / STATE / "trainer.json").read_text())
    objective.load_state(state["objective"])
    updater.load_state(state["updater"])
    names = [name for name in Progress.__dataclass_fields__ if name in state]  # older checkpoints lack newer ones
    return Progress(**{name: state[name] for name in names})


def optimizer_of(folder: Path) -> str:
    """The name of the optimizer whose state a checkpoint holds."""
    state = json.loads((folder / STATE / "trainer.json").read_text())["updater"]
    return str(state.get("optimizer", "adamw"))  # before it was written, recipes stated another one


def write_checksums(folder: Path) -> None:
    """Write the checksum of every file of a checkpoint into it."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    sums = {path.relative_to(folder).as_posix(): checksum(path) for path in files}
    (folder / CHECKSUMS).parent.mkdir(exist_ok=True)
    (folder / CHECKSUMS).write_text(json.dumps(sums, indent=2) + "\n")


def checksum(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def verify(folder: Path, older: Sequence[Path] = (), needed: Sequence[Path] = NEEDED) -> None:
    """Raise RunError if a checkpoint's files have changed; the message suggests one of the `older` ones (oldest
    first)."""
    found = damage(folder, needed)
    if found is None:
        return
    whole = next((one for one in reversed(older) if damage(one, needed) is None), None)
    advice = (
        f"{whole.name} is complete: delete {folder} and resume again to continue from there"
        if whole
        else f"no older checkpoint is complete: delete {folder.parent} and resume again to start the stage over"
    )
    raise RunError(f"checkpoint {folder}: {found}; {advice}")


def damage(folder: Path, needed: Sequence[Path] = NEEDED) -> str | None:
    """The first problem with a checkpoint's files, or None. The files of a checkpoint without checksums (from an older
    version) are only opened."""
    for name in needed:
        if not (folder / name).is_file():
            return f"'{name}' is missing"
    try:
        sums = json.loads((folder / CHECKSUMS).read_text()) if (folder / CHECKSUMS).is_file() else {}
        for name, own in sums.items():
            if not (folder / name).is_file():
                return f"'{name}' is missing"
            if checksum(folder / name) != own:
                return f"'{name}' is damaged (its checksum differs)"
        for name in needed:
            if name.suffix == ".json":
                json.loads((folder / name).read_text())
            elif name.suffix == ".safetensors":
                safe_open(folder / name, "pt")
    except (OSError, ValueError, AttributeError, SafetensorError) as error:
        return f"cannot be read: {str(error).splitlines()[0]}"
    return None


def roll_back(
    folder: Path,
    recipe: Recipe,
    policy: Policy,
    objective: Objective,
    updater: Updater,
    source: Source,
    strategy: Strategy,
) -> None:
    """Restore the weights, optimizer, objective and source of a running stage from a checkpoint."""
    strategy.load_weights(folder, recipe.model.trust_remote_code)
    updater.load_tensors(load_file(folder / STATE / "optimizer.safetensors"))
    source.load(folder / STATE)
    objective.load_state(json.loads((folder / STATE / "trainer.json").read_text())["objective"])


def final_state(run: Run, stage: str) -> dict[str, Any]:
    """The training state in a finished stage's result. Raises RunError if it cannot be read."""
    final = run.final(stage)
    try:
        state: dict[str, Any] = json.loads((final / STATE / "trainer.json").read_text())
        return state
    except (OSError, ValueError) as error:
        raise RunError(
            f"{final}: '{STATE}/trainer.json' is missing or damaged: delete {final} and resume again, to continue from the "
            "newest checkpoint"
        ) from error


def checkpoint_path(run: Run, stage: str, step: int) -> Path:
    return run.stage_folder(stage) / "checkpoints" / step_name(step)
