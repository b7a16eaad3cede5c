"""Suites of other tools, named `TOOL:TASK`, and what can be said about them on the command line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import Field

from lmrl.errors import RecipeError
from lmrl.extras import need
from lmrl.recipe import Section
from lmrl.recipe.document import Document
from lmrl.recipe.overrides import apply_override
from lmrl.recipe.validation import validate

HARNESS = "lm-eval:"
"""Before the name of a task of lm-eval."""


class HarnessOptions(Section):
    """How a task of lm-eval is run: `lmrl eval M --suite lm-eval:TASK shots=5 limit=100`."""

    shots: int | None = Field(None, ge=0)
    """Examples before each document (null: as the task says)."""
    limit: int | None = Field(None, ge=1)
    """Use only the first documents of each task."""
    chat: bool = False
    """Put prompts through the model's chat template."""
    include: str | None = None
    """Folder with further tasks, as YAML."""
    engine: str = "hf"
    """The engine that samples; log-likelihoods are computed by the policy's own model."""
    seed: int = Field(0, ge=0)
    """Of sampling, and of Python's generator, by which some tasks order their choices."""
    shots_seed: int = Field(1234, ge=0)
    """Of drawing examples."""


def harness_task(suite: str | Path | None) -> str | None:
    """The task of lm-eval that a suite's name stands for; None for a suite of lmrl's."""
    name = "" if suite is None else str(suite)
    return name.removeprefix(HARNESS) if name.startswith(HARNESS) else None


def harness_options(overrides: Sequence[str]) -> HarnessOptions:
    """Raises RecipeError for an option that there is not, and where lm-eval is not installed."""
    document = Document({})
    for override in overrides:
        apply_override(document, override)
    options = validate(HarnessOptions, document)
    need("lm_eval", f"--suite {HARNESS}TASK", RecipeError)
    return options
