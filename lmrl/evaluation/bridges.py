"""Suites of other tools, named `TOOL:TASK`, and their options on the command line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import Field

from lmrl.errors import RecipeError
from lmrl.extras import need
from lmrl.recipe import Section
from lmrl.recipe.document import Document
from lmrl.recipe.overrides import apply_overrides
from lmrl.recipe.validation import validate

Options = TypeVar("Options", bound=Section)

HARNESS = "lm-eval:"
"""Prefix of an lm-eval task's name."""
INSPECT = "inspect:"
"""Prefix of an inspect_ai task's name."""


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
    """Seed of sampling, and of Python's generator, with which some tasks shuffle their choices."""
    shots_seed: int = Field(1234, ge=0)
    """Seed for drawing examples."""


class InspectOptions(Section):
    """How a task of inspect_ai is run: `lmrl eval M --suite inspect:FILE.py@TASK limit=100`."""

    limit: int | None = Field(None, ge=1)
    """Use only the first samples of the task's data."""
    samples: int | None = Field(None, ge=1)
    """How often each sample is played: inspect_ai's epochs (null: as the task says)."""
    args: dict[str, Any] = {}
    """Arguments of the task."""
    temperature: float | None = Field(None, ge=0)
    """Sampling temperature (null: the task's, else 1)."""
    max_tokens: int = Field(1024, ge=1)
    """Maximum tokens per answer, unless the task sets it."""
    seed: int | None = None
    """Sampling seed; requests with the same prompt then get the same answer (null: a new draw every time)."""
    engine: str = "hf"
    """The engine that samples."""
    connections: int = Field(16, ge=1)
    """Maximum requests in flight."""


def inspect_task(suite: str | Path | None) -> str | None:
    """The inspect_ai task that a suite's name stands for; None for other suites."""
    return _task(suite, INSPECT)


def inspect_options(overrides: Sequence[str]) -> InspectOptions:
    """Parse overrides. Raises RecipeError for an unknown option, or if inspect_ai or the openai package that it needs
    is missing."""
    options = _options(InspectOptions, overrides)
    if options.seed is not None and (options.samples or 1) > 1:
        raise RecipeError("seed: with a seed all `samples` of a prompt would be the same: leave one of the two out")
    for module in ("inspect_ai", "openai"):
        need(module, f"--suite {INSPECT}TASK", RecipeError)
    return options


def is_foreign(suite: str | Path | None) -> bool:
    """True for the name of another tool's suite."""
    return harness_task(suite) is not None or inspect_task(suite) is not None


def check_foreign(suite: str | Path | None, overrides: Sequence[str]) -> None:
    """Raise RecipeError for options that another tool's suite does not have."""
    if harness_task(suite) is not None:
        harness_options(overrides)
    elif inspect_task(suite) is not None:
        inspect_options(overrides)


def harness_task(suite: str | Path | None) -> str | None:
    """The task of lm-eval that a suite's name stands for; None for a suite of lmrl's."""
    return _task(suite, HARNESS)


def harness_options(overrides: Sequence[str]) -> HarnessOptions:
    """Parse overrides. Raises RecipeError for an unknown option, or if lm-eval is not installed."""
    options = _options(HarnessOptions, overrides)
    need("lm_eval", f"--suite {HARNESS}TASK", RecipeError)
    return options


def _task(suite: str | Path | None, prefix: str) -> str | None:
    name = "" if suite is None else str(suite)
    return name.removeprefix(prefix) if name.startswith(prefix) else None


def _options(section: type[Options], overrides: Sequence[str]) -> Options:
    document = Document({})
    apply_overrides(document, overrides)
    return validate(section, document)
