"""Loaded models that a Python program passes in: saved as a folder, so that a run can start from them again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers

from lmrl.errors import ModelError


def save_given(thing: Any, folder: Path) -> None:
    """Write a transformers or peft model, or (model, tokenizer), as a folder. Raises ModelError for anything else.

    For a model without a tokenizer, the tokenizer of its hub name or folder is taken.
    """
    model, tokenizer = thing if isinstance(thing, tuple) and len(thing) == 2 else (thing, None)
    if not hasattr(model, "save_pretrained") or not hasattr(model, "config"):
        raise ModelError(f"model: expected a transformers model or (model, tokenizer), got a {type(model).__name__}")
    if tokenizer is None:
        tokenizer = _tokenizer_of(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _tokenizer_of(model: Any) -> Any:
    name = getattr(model.config, "_name_or_path", "")
    try:
        return transformers.AutoTokenizer.from_pretrained(name)
    except Exception as error:  # many types: no name, no such folder, not on the hub
        raise ModelError(
            f"model: a {type(model).__name__} comes without a tokenizer, and '{name}' has none: pass model=(model, tokenizer)"
        ) from error
