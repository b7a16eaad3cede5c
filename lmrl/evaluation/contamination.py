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
from lmrl.recipe import AgentTask, BlendSource, DatasetOptions, Prompts, PromptTask, Recipe, Shots
from lmrl.recipe.files import stages_of
from lmrl.rollouts.task import Task, build_task, strings_in
from lmrl.rollouts.templates import prompt_rows
from lmrl.run_folders import RECIPE_FILE, final_checkpoint, read_recipe
from lmrl.trajectories.files import Selection, open_rows
from lmrl.trajectories.readers import Malformed
from lmrl.trajectories.store import DatasetFile
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


def overlap_of(
    suite: Suite, task: Task, starts: Sequence[int | None], against: Sequence[str], words: int = WORDS
) -> Overlap:
    """Compare a suite's prompts with the training data of runs, or with the rows of files and hub datasets.

    task, starts: the suite's, of which prompts are numbered as groups are. Raises RecipeError for a suite that plays an
    environment, and RunError for a run without prompts or logged data.
    """
    if not isinstance(suite.task, PromptTask):
        raise RecipeError("--overlap: the suite plays an environment, which has no prompts to find in training data")
    index: dict[tuple[str, ...], list[int]] = {}
    found = Overlap(list(against), words, len(starts))
    for group, texts in enumerate(texts_of(suite.task.prompts, task, starts)):
        longest = 0
        for text in texts:
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


def texts_of(prompts: Prompts, task: Task, starts: Sequence[int | None]) -> Iterator[list[str]]:
    """Each prompt's own texts. If prompts are made from columns, these are the columns, without what is the same in all
    prompts, and without few-shot examples, which are training data on purpose."""
    plain = {"template": None, "opening": "", "shots": Shots()}
    is_made = any(getattr(prompts, name) != value for name, value in plain.items())
    columns: dict[str, list[str]] = {}
    if is_made:
        originals = prompt_rows(prompts.model_copy(update=plain))
        for row, original in zip(prompt_rows(prompts), originals, strict=True):
            columns.setdefault(row[prompts.column], []).extend(strings_in(original))
    rows = task.make().rows
    for start in starts:
        prompt = rows[start][prompts.column]
        yield columns[prompt] if is_made else [prompt_text(prompt)]


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
    """Texts that a stage learned from, logged and played, without what it held out."""
    for section, log in learned_from(recipe):
        task = None
        if isinstance(section, PromptTask | AgentTask):
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(final_checkpoint(folder))
            task = build_task(section.model_copy(update={"rewards": []}), tokenizer)
        if log is None and task is not None:
            rows = task.make().rows
            yield from row_texts(rows[number] for number in task.training or ())
        elif log is not None and log.path is not None:
            part, without = Selection.of(log), task.heldout_prompts() if task else set()
            if task is None or not without:
                yield from row_texts(open_rows(log.path, part).scan())
            else:
                file = DatasetFile(log.path, task.renderer, part=part, without=without, skip_bad_rows=True)
                yield from row_texts(file.kept_rows())


def learned_from(recipe: Recipe) -> Iterator[tuple[Any, DatasetOptions | None]]:
    """Tasks of a stage, each with its log, or None if it is played."""
    source = recipe.source
    if isinstance(source, BlendSource):
        yield from ((part.task or recipe.task, part.log) for part in source.parts)
        return
    if isinstance(source, DatasetOptions):
        yield recipe.task, source
    if source.plays:
        yield recipe.task, None


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
