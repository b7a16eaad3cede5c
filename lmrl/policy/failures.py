"""Why a model cannot be loaded, and the fix, in one line: libraries use many lines, and seldom name the file."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from lmrl.errors import ModelError
from lmrl.local_names import HUB_NAME
from lmrl.run_folders import RECIPE_FILE, checkpoints_in, run_of

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
TRUST = {
    "policy": "allow it with --trust-remote-code",
    "reward model": "allow it with trust_remote_code: true among the reward's options",
}
"""How each place allows a model's own code; in recipes it is model.trust_remote_code."""


def load_failure(path: str, key: str, error: Exception) -> str:
    """One line on a model that could not be loaded. key: what named it."""
    text = " ".join(str(error).split()) or type(error).__name__
    folder = Path(path)
    if "trust_remote_code" in text:
        how = TRUST.get(key, "allow it with model.trust_remote_code=true")
        return f"{key}: '{path}' comes with its own code, which is not run by default: read it, then {how}"
    if folder.is_dir():
        if reason := broken_file(folder):
            return f"{key}: '{path}' cannot be loaded: {reason}: {_fix(folder)}"
        if not any((folder / name).is_file() for name in TOKENIZERS):
            return (
                f"{key}: '{path}' cannot be loaded: it holds no tokenizer ({TOKENIZERS[0]}): save the one that the model "
                "was trained with into this folder"
            )
        return f"{key}: '{path}' cannot be loaded: {_first_sentence(text)}"
    if folder.exists():
        return f"{key}: '{path}' cannot be loaded: {_first_sentence(text)}"
    if HUB_NAME.fullmatch(path) is None:
        if path.startswith(("http:/", "https:/")):
            return f"{key}: '{path}' is an address, but weights are loaded here: name a run, a model's folder or one of the hub"
        return f"{key}: there is no '{path}' here"
    if "gated" in text.lower():
        return f"{key}: '{path}' is gated: ask for access on its page of the hub, and log in with `hf auth login`"
    if "not a valid model identifier" in text or "404" in text:
        return f"{key}: '{path}' is not a folder here, and the hub has no such model (or only after `hf auth login`)"
    if "connect" in text.lower() or "offline" in text.lower():
        return (
            f"{key}: '{path}' is not a folder here, and the hub cannot be reached: check the name, or your connection"
        )
    return f"{key}: '{path}' cannot be loaded: {_first_sentence(text)}"


def broken_file(folder: Path) -> str | None:
    """The first file of a model's folder that is missing or cannot be read, and why."""
    adapter = (folder / "adapter_config.json").is_file()
    config = "adapter_config.json" if adapter else "config.json"
    if not (folder / config).is_file():
        return f"'{config}' is missing"
    for path in sorted(folder.glob("*.json")):
        try:
            json.loads(path.read_bytes())
        except ValueError:
            return f"'{path.name}' is not valid JSON (damaged, or cut off)"
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        for name in sorted(set(json.loads(index.read_bytes()).get("weight_map", {}).values())):
            if not (folder / name).is_file():
                return f"'{name}' is missing"
    weights = sorted(folder.glob("*.safetensors"))
    for path in weights:
        try:
            safe_open(path, "pt")
        except (SafetensorError, OSError):
            return f"'{path.name}' is damaged or cut off"
    if not weights:
        if any(folder.glob("*.bin")):
            return "its weights are pickled (*.bin), which may run code and are not read; save them as safetensors"
        return f"'{'adapter_model' if adapter else 'model'}.safetensors' is missing"
    return None


def _fix(folder: Path) -> str:
    """The fix for a broken folder: another checkpoint of its run, if one is complete."""
    run = run_of(folder)
    if run is None:
        return "copy or download it again"
    stage = folder.parent if folder.name == "final" else folder.parent.parent
    whole = [one for one in [*checkpoints_in(stage), stage / "final"] if one.is_dir() and broken_file(one) is None]
    if not whole:
        return (
            f"no checkpoint of this run is complete; train it again: lmrl train {shlex.quote(str(run / RECIPE_FILE))}"
        )
    return f"{whole[-1]} is complete: use that"


def _first_sentence(text: str) -> str:
    end = text.find(". ")
    return text[: end if 0 < end < 300 else 300].rstrip(" .:")


def refuse_missing_weights(model: nn.Module, missing: Iterable[str], with_head: bool, key: str, path: str) -> None:
    """Raise ModelError if weights are missing, which would be random. with_head: also check the head, if it is not
    new."""
    trunk = f"{model.base_model_prefix}."
    lost = sorted(name for name in missing if with_head or name.startswith(trunk))
    if lost:
        more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
        raise ModelError(
            f"{key}: '{path}' has no weights for '{lost[0]}'{more}, which would be random: the folder is incomplete, "
            "or its config.json describes another model"
        )


def refuse_broken(model: Any, tokenizer: Any, key: str, path: str) -> None:
    """Raise ModelError for weights that are not finite, and for tokens without an embedding."""
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not bool(torch.isfinite(parameter.sum())):
            if not bool(torch.isfinite(parameter).all()):  # not of a sum, which may overflow
                raise ModelError(
                    f"{key}: '{path}' has NaN or infinity in '{name}': the file is damaged, or its training broke down"
                )
    embeddings = model.get_input_embeddings()
    rows, tokens = getattr(embeddings, "num_embeddings", None), len(tokenizer)
    if rows is not None and tokens > rows:
        raise ModelError(
            f"{key}: the tokenizer of '{path}' has {tokens} tokens, but the model embeds {rows}: save the "
            "tokenizer that belongs to it, or first call `model.resize_token_embeddings(len(tokenizer))`"
        )
