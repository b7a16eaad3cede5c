"""Bundles: what a run saves of a failed update or pass, so that `lmrl replay` can compute it again.

A bundle is a folder `RUN/bundles/STAGE-step-000012-EVENT/`, the same for each event (`nonfinite`, `memory`,
`collapse`):

    info.json            event, stage, step, seed, objective's state, measurements, versions, environment
    recipe.yaml          the resolved recipe
    batch.safetensors    the minibatch (or the batch of the pass)
    rng.safetensors      torch's random generators as the passes began
    model.safetensors    and the rest of a checkpoint folder: the weights. If one of several processes ran out of memory,
                         `weights` in info.json names a checkpoint instead
"""

from __future__ import annotations

import json
import os
import resource
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

from lmrl import distributed
from lmrl.accelerators import has_memory
from lmrl.objectives.groups import gathered
from lmrl.policy.memory import FailedPass, free_frames
from lmrl.process_memory import physical_bytes
from lmrl.recipe.files import to_yaml
from lmrl.run import describe_machine
from lmrl.run_folders import RECIPE_FILE, step_name
from lmrl.training.monitoring.measures import peak_memory_mb
from lmrl.trajectories.allowed import AllowedTokens
from lmrl.trajectories.batch import Batch, Sequence

if TYPE_CHECKING:
    from lmrl.errors import MemoryShortError
    from lmrl.training.stage import Stage

BUNDLES, INFO_FILE, BATCH_FILE, RNG_FILE = "bundles", "info.json", "batch.safetensors", "rng.safetensors"
CHAIN, BRANCHES, ZERO_GRADIENT, ALLOWED = "chain", "branches", "weightless", "allowed"
"""Attributes of the sequences of a saved minibatch, besides its fields."""


@dataclass
class Attempt:
    """A minibatch and torch's random generators as its update begins."""

    minibatch: Batch
    rng: dict[str, torch.Tensor]


def keep_update(
    stage: Stage,
    step: int,
    event: str,
    attempt: Attempt,
    stats: dict[str, float],
    details: dict[str, Any] | None = None,
) -> tuple[Path, str]:
    """Write a bundle of an update. Called by all processes of a run.

    stats: what its passes measured with the current weights. details: further entries of info.json. Returns the folder,
    and a line to show; a bundle that cannot be written does not stop the run.
    """
    minibatch = Batch(gathered(attempt.minibatch.sequences))
    target = bundle_path(stage, step, event)
    weights = stage.strategy.weights()
    info = {"pass": "update", "stats": {name: str(value) for name, value in stats.items()}, "weights": "."}
    with stage.strategy.gathered_weights():
        problem = distributed.broadcast(
            write_bundle(stage, target, step, event, info | (details or {}), minibatch, attempt.rng, weights)
        )
    return target, where_kept("batch, weights, seed and recipe are", target, problem)


def keep_pass(stage: Stage, step: int, error: MemoryShortError) -> str:
    """Write a bundle of the pass that ran out of memory. Called only by the process in which it happened."""
    failed: FailedPass | None = error.failed
    if failed is None:
        return "no bundle: the failed pass is not known"
    alone = distributed.size() == 1
    target = bundle_path(stage, step, "memory" if alone else f"memory-rank{distributed.rank()}")
    limits = memory_limits(stage.policy.device)
    free_frames(error)  # the frames hold the tensors of the failed pass
    info = {
        "pass": failed.kind,
        "options": failed.options,
        "stats": {},
        "shape": list(failed.shape),
        "reason": str(error),
        "limits": limits,
        "weights": "." if alone else newest_weights(stage),
    }
    if target.exists():  # from an earlier try, with other settings
        shutil.rmtree(target, ignore_errors=True)
    rng = rng_state(stage.policy.device)
    problem = write_bundle(stage, target, step, "memory", info, failed.batch, rng, tokens=failed.microbatch_tokens)
    return where_kept("the pass is", target, problem)


def write_bundle(
    stage: Stage,
    target: Path,
    step: int,
    event: str,
    info: dict[str, Any],
    batch: Batch,
    rng: dict[str, torch.Tensor],
    weights: dict[str, torch.Tensor] | None = None,
    tokens: int | None = None,
) -> str | None:
    """Write a bundle folder atomically; returns why it could not be written, or None.

    weights: see `Policy.save`. tokens: microbatch size (None: the policy's).
    """
    policy = stage.policy
    entries = {
        "format": 2,
        "event": event,
        "stage": stage.name,
        "step": step,
        "seed": stage.seed,
        "objective": stage.objective.state(),
        "microbatch_tokens": policy.microbatch_tokens if tokens is None else tokens,
        "device": policy.device.type,
        "processes": distributed.size(),
        "strategy": stage.strategy.name,
        "versions": describe_machine()["packages"],
        "environment": stage.task.environment,
        "reproduce": _command(target),
        **info,
    }

    def write(folder: Path) -> None:
        if info["weights"] == ".":
            policy.save(folder, weights)
        save_file(batch_tensors(batch), folder / BATCH_FILE)
        save_file(rng, folder / RNG_FILE)
        (folder / INFO_FILE).write_text(json.dumps(entries, indent=2) + "\n")
        (folder / RECIPE_FILE).write_text(to_yaml(stage.run.recipe))

    try:
        stage.run.write_folder(target, write, anyone=event == "memory")
    except (OSError, RuntimeError, MemoryError) as error:  # a full disk, or too little memory here, too
        return f"{type(error).__name__}: {error}"
    return None


def where_kept(what: str, target: Path, problem: str | None) -> str:
    if problem is not None:
        return f"no bundle: {target} cannot be written ({problem})"
    return f"{what} in {target}; reproduce with: {_command(target)}"


def _command(bundle: Path) -> str:
    return f"lmrl replay {shlex.quote(str(bundle))}"


def bundle_path(stage: Stage, step: int, event: str) -> Path:
    return stage.run.folder / BUNDLES / f"{stage.name}-{step_name(step)}-{event}"


def newest_weights(stage: Stage) -> str | None:
    """The newest checkpoint of the stage, or what it started from, relative to the run folder; None: the recipe's
    model."""
    run = stage.run
    folders = [*run.checkpoints(stage.name)[-1:], run.stage_folder(stage.name) / "start", stage.start]
    found = next((folder for folder in folders if folder is not None and folder.exists()), None)
    return None if found is None else os.path.relpath(found, run.folder)


def memory_limits(device: torch.device) -> dict[str, Any]:
    """A device's memory and its peak use, in MB; null: no limit."""
    if device.type != "cpu" and has_memory():
        free, total = torch.accelerator.get_memory_info(device)
        name = torch.get_device_module(device).get_device_name(device)
        return {"device": name, "total_mb": total >> 20, "free_mb": free >> 20, "peak_mb": peak_memory_mb()}
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    limit_mb = None if limit == resource.RLIM_INFINITY else limit >> 20
    return {
        "device": device.type,
        "total_mb": physical_bytes() >> 20,
        "limit_mb": limit_mb,
        "peak_mb": peak_memory_mb(),
    }


# ------------------------------------------------------------------------------------------------------------ generators
def rng_state(device: torch.device) -> dict[str, torch.Tensor]:
    """torch's random generators, of the CPU and of the device, by its type."""
    own = {"cpu": torch.get_rng_state()}
    if device.type in ("cpu", "mps"):  # mps has one generator per process, with another signature
        return own
    return own | {device.type: torch.get_device_module(device).get_rng_state(device)}


def set_rng_state(state: dict[str, torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type in state and device.type != "cpu":
        torch.get_device_module(device).set_rng_state(state[device.type], device)


# ------------------------------------------------------------------------------------------------------------ minibatches
def batch_tensors(batch: Batch) -> dict[str, torch.Tensor]:
    """A batch as named tensors; `batch_of` takes them back."""
    tensors: dict[str, torch.Tensor] = {}
    for index, sequence in enumerate(batch.sequences):
        own = {"tokens": sequence.tokens, "states": sequence.states, "targets": sequence.targets, **sequence.fields}
        if sequence.chain is not None:
            own[CHAIN] = torch.tensor(sequence.chain)
        if sequence.branches is not None:
            own[BRANCHES] = sequence.branches
        if sequence.zero_gradient:
            own[ZERO_GRADIENT] = torch.tensor(True)
        if sequence.allowed:
            own[ALLOWED] = allowed_pairs(sequence)
        tensors |= {f"{index:05d}.{name}": tensor.clone().contiguous() for name, tensor in own.items()}
    return tensors


def batch_of(tensors: dict[str, torch.Tensor]) -> Batch:
    """A batch from the output of `batch_tensors`."""
    groups: dict[str, dict[str, torch.Tensor]] = {}
    for full, tensor in tensors.items():
        index, _, name = full.partition(".")
        groups.setdefault(index, {})[name] = tensor
    return Batch([_sequence(group) for _, group in sorted(groups.items())])


def _sequence(named: dict[str, torch.Tensor]) -> Sequence:
    chain, branches, zero_gradient, pairs = (
        named.pop(name, None) for name in (CHAIN, BRANCHES, ZERO_GRADIENT, ALLOWED)
    )
    tokens, states, targets = (named.pop(name) for name in ("tokens", "states", "targets"))
    number = None if chain is None else int(chain)
    allowed = {} if pairs is None else allowed_of(pairs)
    return Sequence(tokens, states, targets, named, number, branches, zero_gradient is not None, allowed)


def allowed_pairs(sequence: Sequence) -> torch.Tensor:
    """The tokens that restricted actions of a sequence were chosen from: rows of (action index, token), (P, 2)."""
    return torch.tensor([(action, token) for action, tokens in sequence.allowed.items() for token in tokens])


def allowed_of(pairs_P2: torch.Tensor) -> dict[int, AllowedTokens]:
    """The inverse of `allowed_pairs`."""
    found: dict[int, list[int]] = {}
    for action, token in pairs_P2.tolist():
        found.setdefault(action, []).append(token)
    return {action: tuple(tokens) for action, tokens in found.items()}
