"""Names of local folders or files, or of something on the hub: a mistyped path is not looked up on the hub."""

from __future__ import annotations

import difflib
import re
from pathlib import Path

from lmrl.errors import DataError

HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)
OWN_FOLDERS = ("runs", "data")
"""Default folders of runs and collected episodes."""
MODEL_FILES = ("config.json", "adapter_config.json", "recipe.yaml", "stages")
FILES = (".jsonl", ".json", ".parquet", ".csv", ".gz", ".gguf")
NEAR = 0.66


def refuse_missing(name: str, key: str, kind: str = "model") -> None:
    """Raise DataError for a name that does not exist locally and is not meant for the hub: it is not a hub name, its
    parent folder exists, or it is close to the name of something local.

    kind: `model` or `dataset`.
    """
    path = Path(name)
    if path.exists():
        return
    parent = path.parent
    near = _near(path, kind)
    hint = f": did you mean '{near}'?" if near else ""
    is_hub_name = HUB_NAME.fullmatch(name) is not None and not name.startswith(".") and not name.endswith(FILES)
    if not is_hub_name or len(path.parts) == 2 and (parent.is_dir() or str(parent) in OWN_FOLDERS):
        raise DataError(f"{key}: there is no '{name}' here{hint} (a {kind} of the hub is named OWNER/NAME)")
    if len(path.parts) == 1 and near and not _cached(name, kind):
        raise DataError(f"{key}: there is no '{name}' here{hint} (a {kind} of the hub is named OWNER/NAME)")


def _near(path: Path, kind: str) -> str | None:
    """The path of a model or of data with a similar name, in the same folder or among the runs."""
    folders = [path.parent] if len(path.parts) > 1 else [path.parent, *map(Path, OWN_FOLDERS)]
    found = [one for folder in folders if folder.is_dir() for one in sorted(folder.iterdir()) if _is(one, kind)]
    known = {str(one): one.name if path.suffix else one.name.partition(".")[0] for one in found}
    names = difflib.get_close_matches(path.name, known.values(), n=1, cutoff=NEAR)
    return next((place for place, name in known.items() if [name] == names), None)


def _is(path: Path, kind: str) -> bool:
    if kind == "dataset":
        return path.name.endswith(FILES) or path.is_dir() and any(path.glob("*.parquet"))
    return path.suffix == ".gguf" or any((path / name).exists() for name in MODEL_FILES)


def _cached(name: str, kind: str) -> bool:
    """True if something with this hub name is in the local hub cache."""
    from huggingface_hub import constants

    return (Path(constants.HF_HUB_CACHE) / f"{kind}s--{name.replace('/', '--')}").is_dir()
