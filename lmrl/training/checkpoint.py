"""Checkpoints: an ordinary model folder, and beside it all that decides the next step.

Weights are read back from the model folder itself. State is safetensors and JSON; nothing is unpickled. There is no
generator state, because every random stream is a function of (seed, stage, step).
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from lmrl.evaluation.api import TASK_FILE
from lmrl.objectives.base import Objective
from lmrl.policy.load import load_weights
from lmrl.policy.policy import Policy
from lmrl.recipe import Recipe
from lmrl.run import Run, step_name
from lmrl.training.sources import Source
from lmrl.training.updater import Updater
from lmrl.trajectories.batch import Batch, Sequence

STATE = "state"
CHAIN, BRANCHES = "chain", "branches"
"""Of the sequences of a kept minibatch, beside its fields."""


@dataclass
class Progress:
    """Where a stage stands, apart from tensors."""

    step: int = 0
    best: dict[str, Any] | None = None
    """`{"step", "metric", "value"}` of the best evaluation."""
    scores: dict[str, Any] = field(default_factory=dict)
    """`start` and `last` evaluation, `data` and `optimum`: for the closing table."""
    gate: dict[str, Any] = field(default_factory=dict)
    """See gate.GateState."""
    label: str = ""
    columns: list[str] = field(default_factory=list)
    """What the closing table calls this stage, and which scores it shows."""


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
    """Write a checkpoint folder; it appears whole or not at all. optimizer: its state, as `updater.tensors` gives it.
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

    run.write_folder(target, write)


def save_task(folder: Path, recipe: Recipe) -> None:
    """Leave the task beside the weights, so that a checkpoint can be scored without its run."""
    saved = {
        "task": recipe.task.model_dump(mode="json"),
        "suite": recipe.evaluation.suite,
        "dtype": recipe.model.dtype,
    }
    (folder / TASK_FILE).write_text(json.dumps(saved, indent=2) + "\n")


def load(folder: Path, objective: Objective, updater: Updater, source: Source) -> Progress:
    """Put a stage, whose policy has the checkpoint's weights already, back to where the checkpoint left it."""
    updater.load_tensors(load_file(folder / STATE / "optimizer.safetensors"))
    source.load(folder / STATE)
    state = json.loads((folder / STATE / "trainer.json").read_text())
    objective.load_state(state["objective"])
    updater.load_state(state["updater"])
    return Progress(**{name: state[name] for name in Progress.__dataclass_fields__})


def roll_back(folder: Path, recipe: Recipe, policy: Policy, updater: Updater) -> None:
    """Put the weights and optimizer of a stage under way back to where a checkpoint left them."""
    load_weights(policy, folder, recipe.model.trust_remote_code)
    updater.load_tensors(load_file(folder / STATE / "optimizer.safetensors"))


def checkpoint_path(run: Run, stage: str, step: int) -> Path:
    return run.stage_folder(stage) / "checkpoints" / step_name(step)


# -------------------------------------------------------------------------------------------------- non-finite minibatches
def save_nonfinite(
    run: Run,
    stage: str,
    step: int,
    policy: Policy,
    objective: Objective,
    minibatch: Batch,
    stats: dict[str, float],
    seed: int,
    weights: dict[str, torch.Tensor] | None = None,
) -> Path:
    """Keep a minibatch whose loss or gradient is not finite, with all that is needed to see it again."""
    target = run.folder / "nonfinite" / f"{stage}-{step_name(step)}"

    def write(folder: Path) -> None:
        policy.save(folder, weights)
        save_file(batch_tensors(minibatch), folder / "batch.safetensors")
        info = {
            "stage": stage,
            "step": step,
            "seed": seed,
            "objective": objective.state(),
            "stats": {name: str(value) for name, value in stats.items()},
            "reproduce": f"lmrl replay {target}",
        }
        (folder / "info.json").write_text(json.dumps(info, indent=2) + "\n")
        (folder / "recipe.yaml").write_text((run.folder / "recipe.yaml").read_text())

    run.write_folder(target, write)
    return target


def batch_tensors(batch: Batch) -> dict[str, torch.Tensor]:
    """A batch as named tensors; `batch_of` takes them back."""
    tensors: dict[str, torch.Tensor] = {}
    for index, sequence in enumerate(batch.sequences):
        own = {"tokens": sequence.tokens, "states": sequence.states, "targets": sequence.targets, **sequence.fields}
        if sequence.chain is not None:
            own[CHAIN] = torch.tensor(sequence.chain)
        if sequence.branches is not None:
            own[BRANCHES] = sequence.branches
        tensors |= {f"{index:05d}.{name}": tensor.clone().contiguous() for name, tensor in own.items()}
    return tensors


def batch_of(tensors: dict[str, torch.Tensor]) -> Batch:
    """A batch from what `batch_tensors` made of it."""
    groups: dict[str, dict[str, torch.Tensor]] = {}
    for full, tensor in tensors.items():
        index, _, name = full.partition(".")
        groups.setdefault(index, {})[name] = tensor
    sequences = []
    for _, group in sorted(groups.items()):
        chain, branches = group.pop(CHAIN, None), group.pop(BRANCHES, None)
        tokens, states, targets = (group.pop(name) for name in ("tokens", "states", "targets"))
        sequences.append(Sequence(tokens, states, targets, group, None if chain is None else int(chain), branches))
    return Batch(sequences)
