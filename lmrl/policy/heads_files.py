"""The files of a policy's heads, next to the model in a checkpoint folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from lmrl.policy.heads import HeadsSpec, Values

HEADS_FILE, HEADS_CONFIG = "heads.safetensors", "heads.json"


def save_heads(values: Values, folder: Path, weights: dict[str, torch.Tensor] | None = None) -> None:
    """Write the heads into a folder. weights: as `state_dict` names them, if this process holds only a part of each."""
    save_file(unshared(values.state_dict() if weights is None else weights), folder / HEADS_FILE)
    (folder / HEADS_CONFIG).write_text(json.dumps(asdict(values.spec)) + "\n")


def load_heads(values: Values, folder: Path, put: Callable[[torch.Tensor, torch.Tensor], Any]) -> bool:
    """Copy a folder's heads into these by `put(own, saved)`; returns False if it holds none, or other ones."""
    spec = saved_heads(folder)
    if spec is None or not _same_heads(spec, values.spec):
        return False
    own, saved = values.state_dict(), load_file(folder / HEADS_FILE)
    with torch.no_grad():
        # The same order on every rank; a name that only one side has is an error.
        for name in dict.fromkeys([*own, *saved]):
            put(own[name], saved[name])
    return True


def saved_heads(folder: Path) -> HeadsSpec | None:
    """The heads that a checkpoint folder holds."""
    file = folder / HEADS_CONFIG
    return HeadsSpec(**json.loads(file.read_text())) if file.exists() else None


def below(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors whose names begin with the prefix, named without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def unshared(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors as a file can hold them: contiguous, and copied if one shares its memory with an earlier one."""
    found, seen = {}, set()
    for name, tensor in tensors.items():
        place = tensor.untyped_storage().data_ptr()
        found[name] = (tensor.detach().clone() if place in seen else tensor.detach()).contiguous()
        seen.add(place)
    return found


def _same_heads(one: HeadsSpec, other: HeadsSpec) -> bool:
    parts = ("value", "q", "twins", "bins", "value_target")
    same_trunk = (one.trunk == "separate") == (other.trunk == "separate")
    return same_trunk and all(getattr(one, part) == getattr(other, part) for part in parts)
