"""Seeing a non-finite minibatch again, from what the run kept of it."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from lmrl.errors import RunError
from lmrl.objectives import load_objective
from lmrl.policy.load import load_policy
from lmrl.recipe.rates import with_rates
from lmrl.recipe_files import stages_of
from lmrl.run import read_recipe
from lmrl.seeding import seed_everything
from lmrl.training.nonfinite import batch_of
from lmrl.training.updater import Updater


def replay(folder: Path) -> list[str]:
    """Loss and gradients of the kept minibatch, and every tensor that is not finite, as lines for people."""
    if not (folder / "info.json").is_file():
        raise RunError(f"{folder} holds no kept minibatch (expected a folder below RUN/nonfinite/)")
    info = json.loads((folder / "info.json").read_text())
    recipe = stages_of(read_recipe(folder))[info["stage"]]
    objective = load_objective(recipe.resolved_objective)
    policy = load_policy(recipe.model, folder, heads=objective.heads)
    policy.configure(recipe)
    objective.load_state(info["objective"])
    objective.begin(info["step"])
    batch = batch_of(load_file(folder / "batch.safetensors"))
    seed_everything(info["seed"], info["stage"], info["step"])
    updater = Updater(policy, with_rates(recipe, *policy.size), recipe.training.steps)
    policy.begin_update(objective.dropout)
    stats = updater.backward(policy, objective, batch)
    lines = [f"stage {info['stage']}, step {info['step']}, {len(batch.sequences)} sequences: loss {stats['loss']}"]
    for index, sequence in enumerate(batch.sequences):
        for name, tensor in sequence.fields.items():
            if not torch.isfinite(tensor).all():
                lines.append(
                    f"sequence {index}: {name} is not finite at {(~torch.isfinite(tensor)).nonzero()[:5, 0].tolist()}"
                )
    for name, parameter in updater.parameters.items():
        if not torch.isfinite(parameter).all():
            lines.append(f"weight {name} is not finite")
        elif parameter.grad is not None and not torch.isfinite(parameter.grad).all():
            lines.append(f"gradient of {name} is not finite")
    return lines if len(lines) > 1 else [*lines, "everything is finite this time"]
