"""The policies that an evaluation scores: names, checkpoints of runs, weights of Q."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmrl.errors import RecipeError, RunError
from lmrl.recipe.overrides import listed
from lmrl.run_folders import checkpoint_names, checkpoint_of

ALONE = "policy"
"""The label of the only policy that is scored."""


@dataclass(frozen=True)
class Contender:
    """A policy to score. name: as the user wrote it. path: what is loaded. label: of its row in tables. folder: of its
    log, among those of the others."""

    label: str
    name: str
    path: str
    folder: str

    @property
    def is_alone(self) -> bool:
        return self.label == ALONE


def names_of(policies: Any) -> list[str]:
    """The names of one policy or of several. Raises RecipeError for anything else, such as the result of a run."""
    one = isinstance(policies, str | Path)
    found = [policies] if one else list(policies) if isinstance(policies, Iterable) else []
    if found and all(isinstance(name, str | Path) for name in found):
        return list(map(str, found))
    raise RecipeError(f"policies: expected a folder, a name, or a list of these, got {policies!r:.200}")


def contenders(policies: Sequence[str], checkpoint: str = "final", checkpoints: Sequence[str] = ()) -> list[Contender]:
    """The policies in order. checkpoint: of every run, see `checkpoint_of`. checkpoints: several of each run instead,
    or `all`. Raises DataError or RunError if something is not a policy, RecipeError for a policy that is named
    twice."""
    checkpoints = listed(checkpoints, "checkpoints", "all")
    if checkpoints and checkpoint != "final":
        raise RecipeError(f"--checkpoint {checkpoint}: --checkpoints names the checkpoints already: add it there")
    found: list[tuple[str, str, str]] = []
    for name in policies:
        for which in _expanded(name, checkpoints) or [checkpoint]:
            found.append((name, which, checkpoint_of(name, which)))
    if len(found) == 1:
        return [Contender(ALONE, found[0][0], found[0][2], ALONE)]
    several_policies, several_checkpoints = len(policies) > 1, bool(checkpoints)
    labels = [
        " ".join(part for part, shown in ((name, several_policies), (which, several_checkpoints)) if shown)
        for name, which, _ in found
    ]
    for label in labels:
        if labels.count(label) > 1:
            raise RecipeError(f"policy: '{label}' is named twice: name each once")
    return [
        Contender(label, name, path, folder)
        for label, (name, _, path), folder in zip(labels, found, folder_names(labels), strict=True)
    ]


def _expanded(name: str, checkpoints: Sequence[str]) -> list[str]:
    """`all` as the names of a run's checkpoints."""
    if list(checkpoints) != ["all"]:
        return list(checkpoints)
    found = checkpoint_names(Path(name).expanduser())
    if not found:
        raise RunError(f"--checkpoints all: '{name}' is not a run with checkpoints: leave it out")
    return found


def folder_name(label: str) -> str:
    """A label as the name of a folder."""
    return re.sub(r"[^\w.=@-]+", "-", label).strip("-.") or ALONE


def folder_names(labels: Sequence[str]) -> list[str]:
    """Labels as different names of folders: `m1` and `m1-2` for `m1` and `../m1`."""
    names: list[str] = []
    for name in map(folder_name, labels):
        tries = (name, *(f"{name}-{number}" for number in range(2, len(labels) + 1)))
        names.append(next(one for one in tries if one not in names))
    return names
