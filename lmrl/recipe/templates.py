"""Sections that build prompts, few-shot examples and multiple choice from a file's columns.

Templates and expressions are Jinja's (https://jinja.palletsprojects.com), run in its sandbox; they see a row's columns by name, and
the row itself as `row`, for columns whose names contain spaces.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from lmrl.recipe.base import FreeForm, Section


class Shots(Section):
    """Solved examples before each prompt (few-shot)."""

    count: int = Field(0, ge=0)
    """Examples before each prompt."""
    template: str = ""
    """Jinja template of an example, including the separator to the next."""
    path: str | None = None
    """File or hub dataset of the examples (null: that of the prompts)."""
    split: str = "train"
    """Split of the hub dataset."""
    config: str | None = None
    """Configuration of the hub dataset (null: that of the prompts)."""
    rows: list[FreeForm] = []
    """The examples themselves, instead of a file."""
    draw: Literal["first", "random"] = "first"
    """`first`: the same examples for every prompt. `random`: drawn separately for each, in the order of lm-eval's sampler."""
    seed: int = Field(1234, ge=0)
    """Seed of `draw: random`."""
    skip: int = Field(0, ge=0)
    """Number of first rows of the file that are not used as examples."""
    same: str | None = None
    """Column in which an example has to match its prompt, such as the subject."""

    @model_validator(mode="after")
    def _sensible(self) -> Shots:
        if self.count and not self.template:
            raise ValueError("`count` examples need a `template`")
        if self.rows and self.path is not None:
            raise ValueError("`rows` already contains the examples: leave out `path`")
        if self.rows and self.count > len(self.rows):
            raise ValueError(f"`count` is more than the {len(self.rows)} examples in `rows`")
        return self


class Choices(Section):
    """Multiple choice: each answer is scored by its log-likelihood given the prompt; nothing is sampled."""

    texts: str
    """Jinja expression of the list of answers."""
    right: str
    """Jinja expression of the index of the right answer, from 0."""
    delimiter: str = " "
    """Text between prompt and answer; it is scored as part of the answer."""
