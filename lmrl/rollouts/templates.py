"""Prompts made from a file's columns: templates, further columns, few-shot examples.

Templates come from a recipe or suite, and only they are compiled; the content of rows is inserted as text.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from lmrl.errors import DataError, RecipeError
from lmrl.recipe import Prompts, Shots
from lmrl.seeding import stream
from lmrl.trajectories.files import Selection, read_rows
from lmrl.trajectories.readers import Malformed, Row

BRACKETS = re.compile(r"\[.*?\]")


def prompt_rows(prompts: Prompts) -> list[Row]:
    """The rows of `task.prompts` with their prompt in its column. DataError names file and row of one that does not
    fit."""
    path = prompts.path or ""
    rows = read_rows(path, Selection.of(prompts), None if prompts.where else prompts.limit)
    fill = Filler(prompts)
    made = [located(path, number, fill.columns, row) for number, row in enumerate(rows, start=1)]
    kept = {number: row for number, row in enumerate(made, start=1) if located(path, number, fill.is_wanted, row)}
    if not kept:
        raise DataError(f"{path}: task.prompts.where='{prompts.where}' leaves no row")
    kept = dict(list(kept.items())[: prompts.limit])
    if prompts.template is not None or prompts.opening or prompts.shots.count:
        shots = Drawer(prompts, fill) if prompts.shots.count else None
        for number, row in kept.items():
            before = located(path, number, fill.opening, row) + (shots.before(row) if shots else "")
            row[prompts.column] = before + located(path, number, fill.prompt, row)
    return list(kept.values())


def located(path: str, number: int, work: Callable[[Row], Any], row: Row) -> Any:
    """work(row); an error in the row is raised with its place."""
    try:
        return work(row)
    except Malformed as error:
        raise DataError(f"{path}, row {number}: {error}") from error


class Filler:
    """Fills in the templates and expressions of `task.prompts` with a row's columns. Raises Malformed."""

    def __init__(self, prompts: Prompts):
        self.prompts = prompts
        key = "task.prompts"
        self._where = compiled(prompts.where, f"{key}.where") if prompts.where else None
        self._fields = {name: compiled(text, f"{key}.fields.{name}") for name, text in prompts.fields.items()}
        self._template = template(prompts.template, f"{key}.template") if prompts.template is not None else None
        self._opening = template(prompts.opening, f"{key}.opening")

    def is_wanted(self, row: Row) -> bool:
        return self._where is None or bool(self._where(row))

    def columns(self, row: Row) -> Row:
        """The row with its further columns."""
        row = dict(row)
        for name, expression in self._fields.items():
            row[name] = expression(row)
        return row

    def opening(self, row: Row) -> str:
        return str(self._opening(row))

    def prompt(self, row: Row) -> str:
        if self._template is not None:
            return str(self._template(row))
        found = row.get(self.prompts.column)
        if not isinstance(found, str):
            raise Malformed(f"field '{self.prompts.column}' is not text, so examples cannot be put before it")
        return found


class Drawer:
    """Draws the examples before each prompt; call it in the order of the prompts."""

    def __init__(self, prompts: Prompts, fill: Filler):
        self.shots = shots = prompts.shots
        self._template = template(shots.template, "task.prompts.shots.template")
        self._rng = random.Random(shots.seed)  # noqa: S311 - the generator that lm-eval draws by
        rows = shots.rows or read_rows(*source_of(prompts))[shots.skip :]
        self._texts: list[tuple[Any, str]] = []
        self._place = "task.prompts.shots.rows" if shots.rows else source_of(prompts)[0]
        for number, row in enumerate(rows, start=1 + shots.skip):
            text = located(self._place, number, lambda row: str(self._template(fill.columns(row))), row)
            self._texts.append((row.get(shots.same) if shots.same else None, text))

    def before(self, row: Row) -> str:
        """The examples of a prompt, as one text."""
        wanted = row.get(self.shots.same) if self.shots.same else None
        pool = [text for same, text in self._texts if same == wanted]
        if len(pool) < self.shots.count:
            where = f" with {self.shots.same}={wanted!r}" if self.shots.same else ""
            raise DataError(
                f"{self._place}: task.prompts.shots.count={self.shots.count} examples are wanted, but there are only "
                f"{len(pool)}{where}"
            )
        if self.shots.draw == "first":
            return "".join(pool[: self.shots.count])
        return "".join(self._rng.sample(pool, self.shots.count))


def source_of(prompts: Prompts) -> tuple[str, Selection]:
    """File or dataset of the examples. Raises RecipeError if the prompts are a file, which has no other split."""
    shots: Shots = prompts.shots
    path = shots.path or prompts.path or ""
    if shots.path is None and Path(path).exists():
        raise RecipeError(
            f"task.prompts.shots: the {shots.count} examples before each prompt come from another split ('{shots.split}') of the "
            "data, which a file does not have: name their file, examples=FILE (task.prompts.shots.path), or do without, "
            "shots=0 (task.prompts.shots.count)"
        )
    config = shots.config or (prompts.config if shots.path is None else None)
    revision = prompts.revision if shots.path is None else None
    return path, Selection(shots.split, config, revision)


# ------------------------------------------------------------------------------------------------------------------ jinja
@cache
def environment() -> jinja2.Environment:
    """Jinja's sandbox, in which an undefined name is an error."""
    found = ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    found.filters |= {"unbracketed": unbracketed, "shuffled": shuffled, "from_json": json.loads}
    return found


def unbracketed(text: str) -> str:
    """A text without its bracketed parts."""
    return BRACKETS.sub("", text)


def shuffled(items: Sequence[Any], name: str) -> list[Any]:
    """Items in a random order that depends only on `name`."""
    return [items[place] for place in stream("shuffled", name).permutation(len(items)).tolist()]


def compiled(text: str, key: str) -> Callable[[Row], Any]:
    """An expression, as a function of a row that raises Malformed. Raises RecipeError if it is invalid."""
    return _function(lambda: environment().compile_expression(text, undefined_to_none=False), key, text)


def template(text: str, key: str) -> Callable[[Row], Any]:
    """A template, as a function of a row that raises Malformed. Raises RecipeError if it is invalid."""
    return _function(lambda: environment().from_string(text).render, key, text)


def _function(compile_it: Callable[[], Callable[..., Any]], key: str, text: str) -> Callable[[Row], Any]:
    try:
        found = compile_it()
    except jinja2.TemplateError as error:
        raise RecipeError(f"{key}: '{text:.80}' cannot be read: {error}") from error

    def fill(row: Row) -> Any:
        names = {name: value for name, value in row.items() if name != "row"}
        try:
            value = found(names | {"row": row})
            if isinstance(value, jinja2.Undefined):
                value._fail_with_undefined_error()
        except Exception as error:  # a template may raise anything on an unexpected row
            raise Malformed(f"does not fit {key}: {error} (columns: {', '.join(row)})") from error
        return list(value) if isinstance(value, Iterator) else value

    return fill
