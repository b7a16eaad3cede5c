"""Base class of all sections of a recipe: a strict, torch-free pydantic model."""

from __future__ import annotations

import math
import typing
from functools import cache
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    ValidationInfo,
    field_validator,
    model_validator,
)

from lmrl.plugins import objects

LARGEST = 2**63 - 1
"""Largest whole number in torch and numpy."""


RowsPath = Annotated[str, BeforeValidator(objects.by_name("rows"))]
ModelPath = Annotated[str, BeforeValidator(objects.by_name("model"))]
EnvironmentName = Annotated[str, BeforeValidator(objects.by_name("environment"))]
"""Text that names something; a Python object in its place is replaced by a name, see lmrl/plugins/objects.py."""


def plain(value: Any, name: str = "") -> Any:
    """A free-form value as files keep it: a run that is resumed reads its options from there. Raises ValueError for one
    that would come back as something else. name: its dotted key, for messages."""
    above = f"{name}." if name else ""
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                raise ValueError(f"the key {above}{key} is not text: put it in quotes, and convert it where it is used")
        return {key: plain(one, f"{above}{key}") for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one, f"{above}{index}") for index, one in enumerate(value)]
    if isinstance(value, Path):
        return str(value)
    if value is None or isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    raise ValueError(
        f"{f'{name} is ' if name else ''}{repr(value)[:100]} ({type(value).__name__}), which recipe.yaml cannot keep: name functions as "
        "'file.py:name', and give finite numbers, text, lists and mappings as options"
    )


FreeForm = Annotated[dict[str, Any], AfterValidator(plain)]
"""Keys and values that only the code they are for knows."""


class Section(BaseModel):
    """A part of a recipe: unknown keys are errors, numbers are finite, and neither text nor `true` is a number."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=(), allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _numbers_are_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        kinds = _kinds(cls, info.field_name)
        if kinds & {int, float}:
            for one in value if isinstance(value, list | tuple) else [value]:
                if isinstance(one, bool) and bool not in kinds:
                    raise ValueError(f"expected a number, got {str(one).lower()}")
                if isinstance(one, int) and abs(one) > LARGEST:
                    raise ValueError(f"expected a number of at most {LARGEST}")
                if isinstance(one, str) and str not in kinds and _reads_as_number(one):
                    raise ValueError(f"expected a number, got the text {one!r}: leave out the quotes")
        return value


class Plugin(Section):
    """A section that names custom code: further keys are that code's options, checked when it is loaded."""

    model_config = ConfigDict(extra="allow", protected_namespaces=(), allow_inf_nan=False)

    @model_validator(mode="after")
    def _options_are_plain(self) -> typing.Self:
        (self.model_extra or {}).update(plain(self.options))
        return self

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


@cache
def _kinds(section: type[BaseModel], name: str) -> frozenset[type]:
    """The types that the annotation of a section's key is made of."""
    found, pending = set(), [section.model_fields[name].annotation]
    while pending:
        annotation = pending.pop()
        arms = typing.get_args(annotation)
        if typing.get_origin(annotation) is typing.Literal:
            found |= {type(arm) for arm in arms}
        elif arms:
            pending += arms
        elif annotation is Any:
            found |= {bool, str}
        elif isinstance(annotation, type):
            found.add(annotation)
    return frozenset(found)


def _reads_as_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
