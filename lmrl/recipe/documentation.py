"""Documentation of the recipe's keys, from the schema and the docstrings beneath its attributes."""

from __future__ import annotations

import ast
import inspect
import json
import textwrap
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from lmrl.recipe import CHOICES, Recipe


@dataclass(frozen=True)
class Key:
    """A key of a section: its type and default as in a recipe, and its docstring."""

    name: str
    kind: str
    default: str
    text: str


def keys_of(section: type[BaseModel]) -> list[Key]:
    """All keys of a section, those of its base classes first."""
    texts: dict[str, str] = {}
    for cls in reversed(section.__mro__):
        if issubclass(cls, BaseModel) and cls is not BaseModel:
            texts |= docstrings(cls)
    return [
        Key(name, _kind(field.annotation), _default(field), texts.get(name, ""))
        for name, field in section.model_fields.items()
    ]


def docstrings(cls: type) -> dict[str, str]:
    """Docstrings of a class's own attributes, by name, each as one line."""
    try:
        (node,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    except (OSError, TypeError, SyntaxError, ValueError):
        return {}
    found: dict[str, str] = {}
    if not isinstance(node, ast.ClassDef):
        return {}
    for part, after in zip(node.body, node.body[1:], strict=False):
        text = after.value.value if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) else None
        if isinstance(text, str) and isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name):
            found[part.target.id] = " ".join(text.split())
    return found


def sections() -> Iterator[tuple[str, str | None, type[BaseModel]]]:
    """Yield every possible section of a recipe: its dotted key, the name that selects it (None: no choice), its class."""
    for key, field in Recipe.model_fields.items():
        if key in CHOICES:
            for tag, cls in CHOICES[key][2].items():
                if tag != "<custom>":
                    yield key, tag.strip("<>"), cls
            for cls in dict.fromkeys(CHOICES[key][2].values()):
                for name, inner in cls.model_fields.items():
                    yield from _nested(f"{key}.{name}", inner.annotation)
        else:
            yield from _nested(key, field.annotation)


def _nested(key: str, annotation: Any) -> Iterator[tuple[str, None, type[BaseModel]]]:
    for cls in _classes(annotation):
        yield key, None, cls
        for name, field in cls.model_fields.items():
            yield from _nested(f"{key}.{name}", field.annotation)


def _classes(annotation: Any) -> list[type[BaseModel]]:
    arms = typing.get_args(annotation) or (annotation,)
    return [arm for arm in arms if isinstance(arm, type) and issubclass(arm, BaseModel)]


def _kind(annotation: Any) -> str:
    """A type in words: `number`, `text`, `one of a, b`, `list of text`."""
    origin, arms = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return "one of " + ", ".join(json.dumps(arm) if not isinstance(arm, str) else arm for arm in arms)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys("null" if arm is type(None) else _kind(arm) for arm in arms))
    if origin is typing.Annotated:
        return _kind(arms[0])
    if origin is list:
        return f"list of {_kind(arms[0])}"
    if origin is tuple:
        return f"[{', '.join(_kind(arm) for arm in arms)}]"
    if origin is dict:
        return "mapping"
    names = {
        int: "whole number",
        float: "number",
        str: "text",
        bool: "true or false",
        type(None): "null",
        Any: "anything",
    }
    return names.get(annotation, "section")


def _default(field: Any) -> str:
    if field.default is PydanticUndefined:
        return "required" if field.default_factory is None else ""
    if isinstance(field.default, BaseModel):
        return ""
    return json.dumps(field.default, default=str)


def describe(section: type[BaseModel], width: int = 100) -> Iterator[str]:
    """Describe a section for a terminal of this width: its docstring, then each key."""
    yield inspect.cleandoc(section.__doc__ or "")
    for key in keys_of(section):
        yield f"\n{key.name}: {key.kind}" + (f" (default {key.default})" if key.default not in ("", "required") else "")
        if key.text:
            yield textwrap.fill(key.text, width, initial_indent="    ", subsequent_indent="    ")


def reference() -> str:
    """The whole reference as Markdown."""
    lines = [
        "# Recipe keys",
        "",
        "Every key of a recipe, generated from the schema. If a section depends on a name in it (`objective.name: ppo`), each name "
        "has its own table. `lmrl show RECIPE` prints a recipe with all defaults; `lmrl ls objectives ppo` prints one section.",
    ]
    top: tuple[str, str | None, type[BaseModel]] = ("", None, Recipe)
    for key, name, cls in [top, *sections()]:
        title = f"`{key}`" + (f": {name}" if name else "") if key else "Top level"
        lines += ["", f"## {title}", "", " ".join(inspect.cleandoc(cls.__doc__ or "").split()), ""]
        lines += ["| key | type | default | |", "|---|---|---|---|"]
        for one in keys_of(cls):
            kind, text = (part.replace("|", "\\|") for part in (one.kind, one.text))
            lines.append(f"| `{one.name}` | {kind} | {f'`{one.default}`' if one.default else ''} | {text} |")
    return "\n".join(lines) + "\n"


def json_schema() -> dict[str, Any]:
    """JSON schema of a recipe, with the docstrings as descriptions."""
    schema = Recipe.model_json_schema()
    schema["properties"]["arguments"] = {"type": "object", "description": "Arguments that a recipe by method requires."}
    for key, _, by_tag in CHOICES.values():  # custom code may have any name except the shipped ones
        taken = [tag.strip("<>") for tag in by_tag if tag != "<custom>"]
        schema["$defs"][by_tag["<custom>"].__name__]["properties"][key]["not"] = {"enum": taken}
    classes: dict[str, type[BaseModel]] = {cls.__name__: cls for _, _, cls in sections()} | {"Recipe": Recipe}
    for name, part in [*schema["$defs"].items(), ("Recipe", schema)]:
        for one in keys_of(classes[name]) if name in classes else ():
            if one.text and one.name in part.get("properties", {}):
                part["properties"][one.name]["description"] = one.text
    return schema
