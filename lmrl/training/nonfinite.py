"""Updates whose loss or gradient is not finite: how many are borne, and what is kept to see one again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file

from lmrl.errors import NonFiniteError
from lmrl.objectives.base import Objective
from lmrl.objectives.groups import gathered
from lmrl.policy.policy import Policy
from lmrl.run import Run, step_name
from lmrl.trajectories.batch import Batch, Sequence

if TYPE_CHECKING:
    from lmrl.training.stage import Stage

CHAIN, BRANCHES = "chain", "branches"
"""Of the sequences of a kept minibatch, beside its fields."""


def stop_on_nonfinite(stage: Stage, step: int, minibatch: Batch, stats: dict[str, float]) -> None:
    """After an update: say it where it was skipped; raise NonFiniteError where that was one too many in a row."""
    in_a_row, limit = stage.updater.skipped_in_a_row, stage.recipe.training.max_nonfinite
    if in_a_row == 0:
        return
    if in_a_row < limit:
        stage.display.say(
            f"step {step}: loss {stats['loss']} and gradient norm {stats['grad_norm']} are not both finite; "
            f"update skipped ({in_a_row} in a row, the run stops at {limit})"
        )
        return
    minibatch.sequences = gathered(minibatch.sequences)
    weights = stage.strategy.weights()
    with stage.strategy.whole():
        kept = save_nonfinite(
            stage.run, stage.name, step, stage.policy, stage.objective, minibatch, stats, stage.seed, weights
        )
    raise NonFiniteError(
        f"stage {stage.name}, step {step}: {in_a_row} updates in a row had a non-finite loss or gradient; batch, seed "
        f"and recipe are in {kept}; reproduce with: lmrl replay {kept}"
    )


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
