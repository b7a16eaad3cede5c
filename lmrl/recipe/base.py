"""What every section of a recipe is: a strict, torch-free pydantic model."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A part of a recipe: unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class Plugin(Section):
    """A part that names code of one's own: further keys are that code's options, checked when it is loaded."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})
