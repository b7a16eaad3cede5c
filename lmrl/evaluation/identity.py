"""Hashes that identify a suite or a policy by content, not by location."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from lmrl.evaluation.suites import SAMPLING, Suite
from lmrl.named_files import file_hash, file_in
from lmrl.plugins.objects import content_of, is_object

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".gguf", ".json", ".model", ".txt", ".jinja")
"""Files of a model's folder that define the policy: weights, configuration, tokenizer, heads."""
NO_WEIGHTS = ("lmrl.json",)
"""Files that lmrl adds for people and for its own use."""
OF_THE_ENGINE = ("slots", "cache_tokens")
"""Sampling options that change only the speed."""
NOT_PLAYED = ("description", "metrics", "follows_run", "run_code")
"""Keys of a suite that do not change scores."""
NO_PART_OF_TASKS = ("call_timeout", "max_failed", "min_group", "workers", "environment")
"""Keys of a task that do not change what is played."""


def suite_version(suite: Suite, environment: dict[str, Any] | None = None) -> str:
    """A hash of what is played, how it is sampled and what judges it: 16 hexadecimal digits.

    Files and objects that it names count by their content. environment: what plays it, see `Task.environment`; its version and
    source count. Columns of tables, the engine and time limits do not count.
    """
    data = suite.model_dump(mode="json", exclude_defaults=True)
    sampling = data.pop("rollouts", {})
    data = {name: value for name, value in data.items() if name not in NOT_PLAYED}
    data["rollouts"] = {name: sampling[name] for name in SAMPLING if name in sampling and name not in OF_THE_ENGINE}
    data["task"] = _part(data["task"]) | {"environment": None if environment is None else _part(environment)}
    text = json.dumps(_by_content(data), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _part(section: dict[str, Any]) -> dict[str, Any]:
    """What changes what is played, of a task or an environment."""
    return {name: value for name, value in section.items() if name not in NO_PART_OF_TASKS}


def policy_hash(path: str, commit: str | None = None) -> str:
    """A hash of a policy's files: 16 hexadecimal digits. For a hub name, its commit or the name."""
    place = Path(path)
    if not place.exists():
        return commit or path
    digest = hashlib.sha256()
    for file in [place] if place.is_file() else policy_files(place):
        digest.update(file.name.encode() + b"\0" + file_hash(file).encode())
    return digest.hexdigest()[:16]


def policy_files(folder: Path) -> list[Path]:
    """The files of a model's folder that define the policy, by name."""
    files = (file for file in folder.iterdir() if file.is_file() and not file.name.startswith("."))
    return sorted(file for file in files if file.suffix in WEIGHT_SUFFIXES and file.name not in NO_WEIGHTS)


def _by_content(value: Any) -> Any:
    """Plain data with absolute file names, and names of objects, replaced by hashes of their content."""
    if isinstance(value, dict):
        return {name: _by_content(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_by_content(one) for one in value]
    if is_object(value):
        return content_of(value) or value
    if not isinstance(value, str) or not value.startswith("/"):
        return value
    if named := file_in(value):
        file, rest = named
        return file_hash(file) + rest
    return policy_hash(value) if Path(value).is_dir() else value
