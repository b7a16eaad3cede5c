"""Computing again what a run kept in a bundle (see bundle.py): an update, or a pass that ran out of memory."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from lmrl.accelerators import default_device
from lmrl.engines.base import Sampling
from lmrl.engines.hf import HFEngine
from lmrl.errors import MemoryShortError, RunError, counted
from lmrl.objectives import load_objective
from lmrl.objectives.base import Objective
from lmrl.objectives.correction import Correction
from lmrl.policy.load import load_policy
from lmrl.policy.passes import ForwardRequest
from lmrl.policy.policy import Policy
from lmrl.recipe import Recipe
from lmrl.recipe.custom import with_custom_options
from lmrl.recipe.files import stages_of
from lmrl.recipe.rates import with_rates
from lmrl.rollouts.task import task_texts
from lmrl.run import describe_machine
from lmrl.run_folders import RECIPE_FILE, read_recipe
from lmrl.seeding import seed_everything
from lmrl.training.monitoring.bundle import (
    BATCH_FILE,
    BUNDLES,
    INFO_FILE,
    RNG_FILE,
    batch_of,
    memory_limits,
    set_rng_state,
)
from lmrl.training.updater import Updater
from lmrl.trajectories.batch import Batch

TOLERANCE = 1e-4
"""Relative difference up to which two numbers count as the same: other threads or processes round otherwise."""


@dataclass
class Replayed:
    """The report of a replay. same: True if it came out as recorded (None: there is nothing to compare with)."""

    lines: list[str]
    same: bool | None


@dataclass
class _Parts:
    info: dict[str, Any]
    recipe: Recipe
    objective: Objective
    policy: Policy
    updater: Updater
    batch: Batch


def replay(folder: Path) -> Replayed:
    """Compute the update or pass of a bundle again."""
    parts = _load(folder)
    lines = _heading(parts)
    result = _memory(parts) if parts.info["event"] == "memory" else _update(parts)
    return Replayed([*lines, *result.lines], result.same)


# --------------------------------------------------------------------------------------------------------------- loading
def _load(folder: Path) -> _Parts:
    if not (folder / INFO_FILE).is_file():
        raise RunError(f"{folder} is not a bundle{_advice(folder)}")
    # Bundles of format 1 are of non-finite updates, and know neither generators nor the device.
    info: dict[str, Any] = {
        "event": "nonfinite",
        "pass": "update",
        "weights": ".",
        "options": {},
        "device": "cpu",
        "versions": {},
    }
    info |= json.loads((folder / INFO_FILE).read_text())
    recipe = with_custom_options(stages_of(read_recipe(folder))[info["stage"]])
    if recipe.training.threads is not None:
        torch.set_num_threads(recipe.training.threads)
    objective = load_objective(recipe.resolved_objective)
    objective.correction = Correction.of(recipe.rollouts)
    reference = bool(info["options"].get("reference"))
    policy = load_policy(
        recipe.model, _weights(folder, info), lambda: task_texts(recipe), heads=objective.heads, reference=reference
    )
    policy.to(default_device() if info["device"] != "cpu" else "cpu")
    policy.configure(recipe)
    policy.microbatch_tokens = info.get("microbatch_tokens", policy.microbatch_tokens)
    objective.load_state(info["objective"])
    objective.begin(recipe.training.steps if info["pass"] == "rehearsal" else info["step"])
    batch = batch_of(load_file(folder / BATCH_FILE))
    options = with_rates(recipe, *policy.size)
    objective.optimizer = options.name or objective.optimizer
    updater = Updater(policy, options, recipe.training.steps)
    seed_everything(info["seed"], info["stage"], info["step"])
    if (folder / RNG_FILE).is_file():
        set_rng_state(load_file(folder / RNG_FILE), policy.device)
    return _Parts(info, recipe, objective, policy, updater, batch)


def _weights(folder: Path, info: dict[str, Any]) -> Path | None:
    """The folder that holds a bundle's weights; None: the recipe's model."""
    if info["weights"] == ".":
        return folder
    if info["weights"] is None:
        return None
    found: Path = (folder.parent.parent / info["weights"]).resolve()
    if not found.is_dir():
        raise RunError(
            f"{folder}: its weights are in {found}, which does not exist: put a checkpoint of the stage there"
        )
    return found


def _advice(folder: Path) -> str:
    found = sorted(path.parent.name for path in (folder / BUNDLES).glob(f"*/{INFO_FILE}"))
    if found:
        return f": name one of those below {folder / BUNDLES}: {', '.join(found)}"
    if (folder / RECIPE_FILE).is_file():
        return ": this run has kept none; for an episode give --episode ID, an `id` in its samples.jsonl"
    return f" (expected a folder below RUN/{BUNDLES}/)"


# ------------------------------------------------------------------------------------------------------------- replaying
def _heading(parts: _Parts) -> list[str]:
    info = parts.info
    lines = [
        f"{info['event']} in stage {info['stage']}, step {info['step']}: {counted(len(parts.batch.sequences), 'sequence')}"
    ]
    if "collapse" in info:
        lines.append(f"{info['collapse']}; the best step was {info['best_step']}")
    here = describe_machine()["packages"]
    different = {name: old for name, old in info["versions"].items() if old != here.get(name)}
    lines += [f"{name} was {old} then, and is {here.get(name)} now" for name, old in different.items()]
    if info["device"] != parts.policy.device.type:
        lines.append(f"computed on {info['device']} then, and on {parts.policy.device.type} now")
    if info.get("processes", 1) > 1:
        lines.append(f"computed by {info['processes']} processes ({info['strategy']}) then, and by one now")
    return lines


def _update(parts: _Parts) -> Replayed:
    """Loss and gradient norm next to those recorded, and every tensor that is not finite."""
    policy, updater = parts.policy, parts.updater
    policy.begin_update(parts.objective.dropout)
    stats = updater.backward(policy, parts.objective, parts.batch)
    stats["grad_norm"] = updater.strategy.gradient_norm()
    recorded = {name: float(value) for name, value in parts.info["stats"].items()}
    lines, same = [], []
    for name in ("loss", "grad_norm"):
        line = f"{name} {stats[name]:.9g}"
        if name in recorded:
            same.append(alike(stats[name], recorded[name]))
            line += f", recorded {recorded[name]:.9g}: {'the same' if same[-1] else 'not the same'}"
        lines.append(line)
    faults = not_finite(parts)
    return Replayed([*lines, *(faults or ["everything is finite this time"])], all(same) if same else None)


def alike(one: float, other: float) -> bool:
    """True if two numbers are equal up to TOLERANCE, or neither is finite."""
    if not (math.isfinite(one) and math.isfinite(other)):
        return math.isfinite(one) == math.isfinite(other)
    return math.isclose(one, other, rel_tol=TOLERANCE, abs_tol=1e-7)


def not_finite(parts: _Parts) -> list[str]:
    """Fields of the minibatch, weights and gradients that are not finite, as lines for people."""
    lines = []
    for index, sequence in enumerate(parts.batch.sequences):
        for name, tensor in sequence.fields.items():
            if not torch.isfinite(tensor).all():
                places = (~torch.isfinite(tensor)).nonzero()[:5, 0].tolist()
                lines.append(f"sequence {index}: {name} is not finite at {places}")
    for name, parameter in parts.updater.parameters.items():
        if not torch.isfinite(parameter).all():
            lines.append(f"weight {name} is not finite")
        elif parameter.grad is not None and not torch.isfinite(parameter.grad).all():
            lines.append(f"gradient of {name} is not finite")
    return lines


def _memory(parts: _Parts) -> Replayed:
    """True if the pass runs out of memory again."""
    info, limits = parts.info, memory_limits(parts.policy.device)
    rows, width = info["shape"]
    lines = [
        f"{info['pass']} of {rows} x {width} tokens, microbatches of {info['microbatch_tokens']}: {info['reason']}",
        f"memory then: {_limits(info['limits'])}",
        f"memory now:  {_limits(limits)}",
    ]
    try:
        _run_pass(parts)
    except MemoryShortError as error:
        return Replayed([*lines, f"it runs out of memory again: {error}"], True)
    peak = memory_limits(parts.policy.device)["peak_mb"]
    return Replayed([*lines, f"it fits this time, with a peak of {peak:,} MB"], False)


def _limits(limits: dict[str, Any]) -> str:
    named = {
        name.removesuffix("_mb"): value for name, value in limits.items() if name != "device" and value is not None
    }
    return f"{limits['device']}, " + ", ".join(f"{name} {value:,} MB" for name, value in named.items())


def _run_pass(parts: _Parts) -> None:
    policy, objective, batch, options = parts.policy, parts.objective, parts.batch, parts.info["options"]
    match parts.info["pass"]:
        case "score":
            policy.score(batch, ForwardRequest(**options["want"]), options["reference"])
        case "generate":
            engine = HFEngine(policy, options["slots"], options["cache_tokens"])
            sampling = Sampling(**options["sampling"] | {"stop": tuple(options["sampling"]["stop"])})
            contexts = [sequence.tokens.tolist() for sequence in batch.sequences]
            engine.complete(contexts, sampling, [tuple(key) for key in options["keys"]])
        case "rehearsal":
            parts.updater.rehearse(policy, objective, batch)
        case _:
            parts.updater.begin(parts.info["step"])
            parts.updater.step(policy, objective, batch)
