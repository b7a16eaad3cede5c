"""Sections by which prompts, examples before them and choices are made of a file's own columns.

Templates and expressions are Jinja's (https://jinja.palletsprojects.com), run in its sandbox; they see a row's columns by name, and
the row itself as `row`, for columns whose names have spaces.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from lmrl.recipe.base import Section


class Shots(Section):
    """Solved examples before each prompt (few-shot)."""

    count: int = Field(0, ge=0)
    """Examples before each prompt."""
    template: str = ""
    """Jinja template of an example, with what divides it from the next."""
    path: str | None = None
    """File or hub dataset of the examples (null: that of the prompts)."""
    split: str = "train"
    """Their split of a dataset on the hub."""
    config: str | None = None
    """Its configuration (null: that of the prompts)."""
    rows: list[dict[str, Any]] = []
    """The examples themselves, in place of a file."""
    draw: Literal["first", "random"] = "first"
    """`first`: the same for every prompt. `random`: drawn separately for each, in the order of lm-eval's sampler."""
    seed: int = Field(1234, ge=0)
    """Of `draw: random`."""
    skip: int = Field(0, ge=0)
    """First rows of the file that are not used as examples."""
    same: str | None = None
    """Column in which an example has to equal its prompt, such as the subject."""

    @model_validator(mode="after")
    def _sensible(self) -> Shots:
        if self.count and not self.template:
            raise ValueError("`count` examples need a `template`")
        if self.rows and self.path is not None:
            raise ValueError("`rows` are the examples already: leave out `path`")
        if self.rows and self.count > len(self.rows):
            raise ValueError(f"`count` is more than the {len(self.rows)} examples in `rows`")
        return self


class Choices(Section):
    """Multiple choice: each answer is scored by its log-likelihood after the prompt, and nothing is sampled."""

    texts: str
    """Jinja expression of the list of answers."""
    right: str
    """Jinja expression of the right one: its number, from 0."""
    delimiter: str = " "
    """Text between prompt and answer, part of what is scored."""
