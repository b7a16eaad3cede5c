"""Base class of all sections of a recipe: a strict, torch-free pydantic model."""

from __future__ import annotations

import typing
from functools import cache
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationInfo, field_validator

from lmrl import objects

LARGEST = 2**63 - 1
"""Largest whole number in torch and numpy."""


RowsPath = Annotated[str, BeforeValidator(objects.by_name("rows"))]
ModelPath = Annotated[str, BeforeValidator(objects.by_name("model"))]
EnvironmentName = Annotated[str, BeforeValidator(objects.by_name("environment"))]
"""Text that names something; a Python object in its place is replaced by a name, see lmrl/objects.py."""


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
