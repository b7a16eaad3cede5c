"""Recipes and suites as YAML: plain data that records where each key was written."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lmrl.errors import RecipeError

Keys = tuple[str | int, ...]


class Loader(yaml.SafeLoader):
    """Reads `1e-4` as a number; YAML 1.1 reads it as a string."""


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


@dataclass
class Document:
    """Plain data read from YAML, with the place each key was written at."""

    data: dict[str, Any]
    path: Path | None = None
    places: dict[Keys, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    """Notes to print once the document has been validated."""

    @property
    def folder(self) -> Path:
        """The folder that relative paths refer to."""
        return Path.cwd() if self.path is None else self.path.parent

    def place(self, keys: Keys) -> str:
        """File and line of a key, of a key below it, or of its nearest written parent."""
        below = [place for known, place in self.places.items() if known[: len(keys)] == keys]
        if keys and keys not in self.places and below:
            return below[0]
        for end in range(len(keys), 0, -1):
            if keys[:end] in self.places:
                return self.places[keys[:end]]
        return str(self.path) if self.path else "the recipe"


def read_yaml(path: Path) -> Document:
    """Read a YAML mapping; duplicate keys and syntax errors name their line."""
    try:
        text = path.read_text(encoding="utf-8")
        root = yaml.compose(text, Loader=Loader)
        check_size(root, str(path))
        data = yaml.load(text, Loader=Loader)
    except RecursionError as error:
        raise RecipeError(f"{path}: is nested too deeply to be a recipe") from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: an invalid date, an integer with too many digits
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        reason = getattr(error, "problem", None) or " ".join(str(error).split())
        raise RecipeError(f"{path}{line}: not valid YAML: {reason}") from error
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error}") from error
    document = Document({}, path)
    if root is None:
        return document
    if not isinstance(root, yaml.MappingNode):
        raise RecipeError(
            f"{path}: contains a {type(root).__name__.removesuffix('Node').lower()}, but a recipe is a mapping of keys to values"
        )
    _note_places(root, (), document)
    document.data = data
    return document


MAX_VALUES = 100_000
"""Maximum number of values of a recipe, with aliases expanded."""


def check_size(root: yaml.Node | None, where: str) -> None:
    """Refuse YAML whose aliases are circular, or expand to more values than any recipe has."""
    sizes: dict[int, int | None] = {}

    def size(node: yaml.Node) -> int:
        known = sizes.get(id(node), 0)
        if known is None:
            raise RecipeError(f"{where}, line {node.start_mark.line + 1}: refers to itself by an alias")
        if known:
            return known
        sizes[id(node)] = None
        inner = [one for pair in node.value for one in pair] if isinstance(node, yaml.MappingNode) else node.value
        total = 1 + (0 if isinstance(node, yaml.ScalarNode) else sum(map(size, inner)))
        if total > MAX_VALUES:
            raise RecipeError(
                f"{where}, line {node.start_mark.line + 1}: has more than {MAX_VALUES} values when its aliases are "
                "written out"
            )
        sizes[id(node)] = total
        return total

    if root is not None:
        size(root)


def _note_places(node: yaml.Node, keys: Keys, document: Document) -> None:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            here = (*keys, key.value)
            place = f"{document.path}, line {key.start_mark.line + 1}"
            if here in document.places:
                raise RecipeError(
                    f"key '{dotted(here)}' is written twice ({document.places[here]} and {place}): keep one"
                )
            document.places[here] = place
            _note_places(value, here, document)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            document.places[(*keys, index)] = f"{document.path}, line {value.start_mark.line + 1}"
            _note_places(value, (*keys, index), document)


def dotted(keys: Keys) -> str:
    return ".".join(str(key) for key in keys)
