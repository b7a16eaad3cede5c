"""Sizes of a model, read without torch from its configuration and the headers of its files."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

from lmrl.recipe.model import Model


def model_shape(model: Model) -> dict[str, int] | None:
    """Sizes of the model, from its config and, if it is on disk, from its file headers. None: not on this machine."""
    try:
        if model.config is not None:
            return _sensible(_shape_of_config(model.config, None))
        path = model.path or ""
        folder = Path(path) if Path(path).exists() else _cached(path, model.revision)
        if folder is None or not (folder / "config.json").is_file():
            return None
        config = json.loads((folder / "config.json").read_text())
        return _sensible(_shape_of_config(config, _count_parameters(folder)))
    except (TypeError, ValueError, ZeroDivisionError, struct.error):
        return None  # the model loader explains invalid sizes


def _sensible(shape: dict[str, int]) -> dict[str, int] | None:
    """The sizes, or None if one is not positive."""
    return shape if all(size > 0 for size in shape.values()) else None


def _shape_of_config(config: dict[str, Any], parameters: int | None) -> dict[str, int]:
    def get(default: int, *names: str) -> int:
        return next((config[name] for name in names if config.get(name) is not None), default)

    hidden = get(768, "hidden_size", "n_embd")
    layers = get(12, "num_hidden_layers", "n_layer")
    heads = get(12, "num_attention_heads", "n_head")
    kv = get(heads, "num_key_value_heads") * get(hidden // heads, "head_dim")
    intermediate = get(4 * hidden, "intermediate_size", "n_inner")
    vocabulary = get(64, "vocab_size")
    attention, mlp = 2 * hidden * hidden + 2 * hidden * kv, 3 * hidden * intermediate
    embeddings = vocabulary * hidden * (1 if config.get("tie_word_embeddings") else 2)
    return {
        "hidden": hidden,
        "layers": layers,
        "keys": kv,
        "intermediate": intermediate,
        "vocabulary": vocabulary,
        "embeddings": embeddings,
        "parameters": parameters or layers * (attention + mlp) + embeddings,
        # rank 1 adds input + output width to each linear layer: q, o, k, v, gate, up, down
        "lora_per_rank": layers * (2 * 2 * hidden + 2 * (hidden + kv) + 3 * (hidden + intermediate)),
        # DoRA adds a number for each output: q and o, k and v, gate and up, down
        "dora": layers * (2 * hidden + 2 * kv + 2 * intermediate + hidden),
    }


def _count_parameters(folder: Path) -> int | None:
    """Parameters in a folder's safetensors files, from their headers."""
    total = 0
    for file in folder.glob("model*.safetensors"):
        with open(file, "rb") as data:
            header = json.loads(data.read(struct.unpack("<Q", data.read(8))[0]))
        total += sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")
    return total or None


def _cached(name: str, revision: str | None) -> Path | None:
    """Snapshot folder of a hub model's branch, tag or commit (None: main) in the local cache; None if it is not there."""
    from huggingface_hub import constants  # only these: the library itself takes 0.4 s to import

    folder = Path(constants.HF_HUB_CACHE) / constants.REPO_ID_SEPARATOR.join(["models", *name.split("/")])
    reference = folder / "refs" / (revision or constants.DEFAULT_REVISION)
    commit = reference.read_text().strip() if reference.is_file() else revision
    snapshot = folder / "snapshots" / commit if commit else None
    return snapshot if snapshot is not None and snapshot.is_dir() else None
