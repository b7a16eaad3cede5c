"""Contamination: which prompts of a suite share an n-gram with training data (Brown et al., arXiv 2005.14165, appendix
C).

The suite's n-grams are indexed, and training data is streamed, so its size does not matter.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lmrl.errors import RecipeError, RunError
from lmrl.evaluation.suites import Suite
from lmrl.recipe import DatasetOptions, PromptTask, Recipe
from lmrl.recipe.files import stages_of
from lmrl.rollouts.task import build_task, strings_in
from lmrl.run_folders import RECIPE_FILE, final_checkpoint, read_recipe
from lmrl.trajectories.files import Selection, open_rows
from lmrl.trajectories.readers import Malformed
from lmrl.trajectories.trajectory import Trajectory, prompt_text

WORD = re.compile(r"\w+")
WORDS = 13
"""Length of a word n-gram that two texts rarely share by chance."""


@dataclass
class Overlap:
    """What a suite's prompts share with training data. shared, short: indices of prompts (groups) that share an n-gram,
    and that have too few words for one."""

    against: list[str]
    words: int
    prompts: int
    shared: dict[int, str] = field(default_factory=dict)
    """The first n-gram that each shares."""
    short: list[int] = field(default_factory=list)

    def __str__(self) -> str:
        texts = f"{len(self.shared)} of {self.prompts} prompts share {self.words} words in a row with {', '.join(self.against)}"
        return texts + (f"; {len(self.short)} have fewer words, so nothing is known of them" if self.short else "")

    def clean(self, trajectories: Sequence[Trajectory]) -> list[Trajectory]:
        """The episodes of prompts that share nothing, as far as is known."""
        return [one for one in trajectories if one.group not in self.shared]

    def to_plain(self) -> dict[str, Any]:
        return vars(self) | {"shared": {str(group): text for group, text in self.shared.items()}}


def overlap_of(trajectories: Sequence[Trajectory], suite: Suite, against: Sequence[str], words: int = WORDS) -> Overlap:
    """Compare a suite's prompts with the training data of runs, or with the rows of files and hub datasets.

    If prompts are made from columns, the columns count, but not the few-shot examples before them, which are training
    data on purpose. Raises RecipeError for a suite that plays an environment, and RunError for a run without prompts or
    logged data.
    """
    if not isinstance(suite.task, PromptTask):
        raise RecipeError("--overlap: the suite plays an environment, which has no prompts to find in training data")
    made = suite.task.prompts.template is not None or suite.task.prompts.shots.count > 0
    index: dict[tuple[str, ...], list[int]] = {}
    found = Overlap(list(against), words, 0)
    for group, one in {one.group: one for one in trajectories}.items():
        found.prompts += 1
        longest = 0
        for text in texts_of(one, made):
            said = words_in(text)
            longest = max(longest, len(said))
            for stretch in stretches(said, words):
                index.setdefault(stretch, []).append(group)
        if longest < words:
            found.short.append(group)
    for place in against:
        for text in training_texts(place):
            for stretch in stretches(words_in(text), words):
                for group in index.get(stretch, ()):
                    found.shared.setdefault(group, " ".join(stretch))
    return found


def texts_of(one: Trajectory, made: bool) -> list[str]:
    """A prompt's own texts. made: True if its prompt was made from its columns."""
    if not made:
        return [prompt_text(one.messages or one.prompt)]
    computed = ("choices", "loglikelihoods", "right")
    return strings_in({name: value for name, value in one.columns.items() if name not in computed})


def words_in(text: str) -> list[str]:
    """Words of a text, without case and punctuation."""
    return WORD.findall(text.casefold())


def stretches(words: Sequence[str], count: int) -> Iterator[tuple[str, ...]]:
    return (tuple(words[first : first + count]) for first in range(len(words) - count + 1))


def training_texts(place: str) -> Iterator[str]:
    """Texts that a run learned from, or those of a file's rows."""
    folder = Path(place).expanduser()
    if (folder / RECIPE_FILE).is_file():
        found = False
        for recipe in stages_of(read_recipe(folder)).values():
            for text in stage_texts(recipe, folder):
                found = True
                yield text
        if not found:
            raise RunError(f"--overlap: {place} learned from no prompts or logged data, only from an environment")
        return
    yield from row_texts(open_rows(place).scan())


def stage_texts(recipe: Recipe, folder: Path) -> Iterator[str]:
    """Texts that a stage learned from: logged episodes, and prompts that it did not hold out."""
    source = recipe.source
    if isinstance(source, DatasetOptions) and source.path is not None:
        yield from row_texts(open_rows(source.path, Selection.of(source)).scan())
    if isinstance(recipe.task, PromptTask) and recipe.source.plays:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(final_checkpoint(folder))
        task = build_task(recipe.task.model_copy(update={"rewards": []}), tokenizer)
        rows = task.make().rows
        for number in task.training or ():
            yield from strings_in(rows[number])


def row_texts(rows: Iterable[Any]) -> Iterator[str]:
    """Texts of rows, including those inside fields that hold JSON; malformed rows are skipped, as in training."""
    for row in rows:
        if isinstance(row, Malformed):
            continue
        for text in strings_in(row):
            yield from _unpacked(text)


def _unpacked(text: str) -> list[str]:
    if text[:1] in ("{", "["):
        try:
            return strings_in(json.loads(text))
        except ValueError:
            pass
    return [text]
