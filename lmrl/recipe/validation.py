"""Validate plain data against the schema: report the first mistake in one line, with its key, its place and the nearest name."""

from __future__ import annotations

import re
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from lmrl.errors import RecipeError, did_you_mean
from lmrl.plugins import registry
from lmrl.recipe import CHOICES
from lmrl.recipe.document import Document, Keys, dotted
from lmrl.recipe.suggestions import suggest

Schema = TypeVar("Schema", bound=BaseModel)


def validate(schema: type[Schema], document: Document, prefix: Keys = ()) -> Schema:
    """Check plain data against a schema; the first mistake becomes one line with its key, place and nearest name."""
    try:
        valid = schema.model_validate(document.data)
    except ValidationError as error:
        mistakes = _merged(error.errors())
        more = f" (and {len(mistakes) - 1} more)" if len(mistakes) > 1 else ""
        raise RecipeError(_explain(schema, document, mistakes[0], prefix) + more) from error
    while document.notes:
        print(f"lmrl: note: {document.notes.pop(0)}", file=sys.stderr)
    return valid


def _merged(mistakes: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """One mistake for a value that fits none of several types, for which pydantic reports one per type."""
    merged: list[dict[str, Any]] = []
    for mistake in mistakes:
        above, alternative = mistake["loc"][:-1], "".join(map(str, mistake["loc"][-1:]))
        if re.match(r"literal\[|constrained-|(bool|int|float|str)$", alternative):
            mistake = {**mistake, "loc": above}
            if merged and merged[-1]["loc"] == above:
                merged[-1]["msg"] += f", or {mistake['msg'].removeprefix('Input should be ')}"
                continue
        merged.append(dict(mistake))
    return list(merged)


def _explain(schema: type[BaseModel], document: Document, mistake: Mapping[str, Any], prefix: Keys) -> str:
    keys: Keys = tuple(key for key in mistake["loc"] if not str(key).startswith("<"))
    place = document.place(prefix + keys)
    name = dotted(prefix + keys)
    kind = mistake["type"]
    if kind == "extra_forbidden":
        parent = _schema_at(schema, document.data, keys[:-1])
        valid = list(parent.model_fields) if parent else []
        hint = suggest(str(keys[-1]), valid, _sections(schema, document.data), dotted(keys[:-1]))
        if prefix:
            hint = hint.replace("mean '", f"mean '{dotted(prefix)}.")
        return f"unknown key '{name}' ({place}){hint}"
    if kind == "missing":
        return f"missing key '{name}' ({place})"
    if kind in ("union_tag_not_found", "union_tag_invalid"):
        choice = str(keys[-1])
        key, _, classes = CHOICES[choice]
        given = mistake["input"].get(key) if isinstance(mistake["input"], dict) else mistake["input"]
        valid = [tag.strip("<>") for tag in classes if tag not in ("<custom>", "<prompts>")]
        which = typing.cast(registry.Kind, choice if key == "name" else "environment")
        valid += [name for name in registry.names(which) if name not in valid]
        if given is not None and not isinstance(mistake["input"], dict):
            return _no_section(name, place, f"{key}={given if given in valid else '...'}", given)
        place = document.place((*prefix, *keys, key))
        if given is None:
            return f"missing key '{name}.{key}' ({place}){did_you_mean('', valid)}"
        return f"'{name}.{key}' names no known {keys[-1]}: '{given}' ({place}){did_you_mean(str(given), valid)}"
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        section = _schema_at(schema, document.data | {keys[0]: None}, keys[:1]) if len(keys) == 1 else None
        return _no_section(name, place, f"{next(iter(section.model_fields))}=..." if section else "", mistake["input"])
    message = re.sub(", unable to parse string as an? [a-z]+", "", mistake["msg"].removeprefix("Value error, "))
    if kind == "value_error":
        return f"{name + ': ' if name else ''}{message} ({place})"
    return f"wrong value for '{name}' ({place}): {message[0].lower()}{message[1:]}, got {_shown(mistake['input'])}"


def _no_section(name: str, place: str, example: str, given: Any) -> str:
    """The message for a section that is not one. example: one of its keys and a value; '': none is known."""
    example = f", for instance {name}.{example}" if example else ""
    return f"wrong value for '{name}' ({place}): expected keys with values{example}, got {_shown(given)}"


def _shown(value: Any) -> str:
    """A wrong value, shortened to fit a line."""
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def _sections(schema: Any, data: Any, above: Keys = ()) -> dict[str, list[str]]:
    """The keys of every section that `data` has or could have, by its dotted name ('' for the top level)."""
    section = _schema_at(schema, data, above)
    if section is None or len(above) > 2:
        return {}
    found = {dotted(above): list(section.model_fields)}
    for name in section.model_fields:
        found |= _sections(schema, data, (*above, name))
    return found


def _schema_at(schema: Any, data: Any, keys: Keys) -> type[BaseModel] | None:
    """The section class that describes `data` at `keys`, or None if it is free-form."""
    for key in keys:
        if isinstance(schema, type) and issubclass(schema, BaseModel):
            annotation = schema.model_fields[key].annotation if key in schema.model_fields else None
            data = data.get(key) if isinstance(data, dict) else None
            if key in CHOICES:
                _, choose, classes = CHOICES[key]
                schema = classes.get(choose(data) or "")
                continue
            schema = annotation
        elif typing.get_origin(schema) is list:
            schema = typing.get_args(schema)[0]
            data = data[key] if isinstance(data, list) and isinstance(key, int) else None
        if typing.get_origin(schema) in (types.UnionType, typing.Union):
            schema = next((arm for arm in typing.get_args(schema) if arm is not type(None)), None)
    return schema if isinstance(schema, type) and issubclass(schema, BaseModel) else None
