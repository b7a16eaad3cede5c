"""Contamination: which prompts of a suite share an n-gram with training data (Brown et al., arXiv 2005.14165, appendix
C).

The suite's n-grams are indexed, and training data is streamed, so its size does not matter.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from lmrl.errors import RecipeError, RunError
from lmrl.evaluation.suites import Suite
from lmrl.recipe import AgentTask, BlendSource, DatasetOptions, Prompts, PromptTask, Recipe, RewardModelObjective, Shots
from lmrl.recipe.files import stages_of
from lmrl.rollouts.task import Task, build_task, strings_in
from lmrl.rollouts.templates import prompt_rows
from lmrl.run_folders import RECIPE_FILE, final_checkpoint, read_recipe, run_of
from lmrl.trajectories.files import Selection, open_rows
from lmrl.trajectories.preference_pairs import read_pairs, split_pairs
from lmrl.trajectories.readers import Malformed
from lmrl.trajectories.store import DatasetFile
from lmrl.trajectories.trajectory import Trajectory, prompt_key, prompt_text

WORD = re.compile(r"\w+")
WORDS = 13
"""Length of a word n-gram that two texts rarely share by chance."""


@dataclass
class Overlap:
    """What a suite's prompts share with training data. prompts, shared, short: keys (see `prompt_key`) of those searched
    for, of those that share an n-gram, and of those that have too few words for one."""

    against: list[str]
    words: int
    prompts: list[str] = field(default_factory=list)
    shared: dict[str, str] = field(default_factory=dict)
    """The first n-gram that each shares."""
    short: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        texts = f"{len(self.shared)} of {len(self.prompts)} prompts share {self.words} words in a row with {', '.join(self.against)}"
        return texts + (f"; {len(self.short)} have fewer words, so nothing is known of them" if self.short else "")

    def clean(self, trajectories: Sequence[Trajectory]) -> list[Trajectory]:
        """The episodes of prompts that share nothing, as far as is known."""
        return [one for one in trajectories if prompt_key(one.turns[0].observation) not in self.shared]

    def to_plain(self) -> dict[str, Any]:
        return vars(self) | {"prompts": len(self.prompts)}


def find_overlap(found: Overlap, suite: Suite, task: Task, starts: Sequence[int | None]) -> None:
    """Compare a suite's prompts with the training data of runs, or with the rows of files and hub datasets, unless they
    are in `found` already; a policy's tokenizer decides which prompts it plays.

    task, starts: the suite's. Raises RecipeError for a suite that plays an environment, and RunError for a run without
    prompts or logged data.
    """
    if not isinstance(suite.task, PromptTask):
        raise RecipeError("--overlap: the suite plays an environment, which has no prompts to find in training data")
    texts = own_words(texts_of(suite.task.prompts, task, starts), found.words)
    known = set(found.prompts)
    fresh = [key for key in texts if key not in known]
    found.prompts += fresh
    found.short += [key for key in fresh if max(map(len, texts[key]), default=0) < found.words]
    index: dict[tuple[str, ...], list[str]] = {}
    for key in fresh:
        for said in texts[key]:
            for stretch in stretches(said, found.words):
                index.setdefault(stretch, []).append(key)
    for place in found.against if fresh else ():
        for text in training_texts(place):
            for stretch in stretches(words_in(text), found.words):
                for key in index.get(stretch, ()):
                    found.shared.setdefault(key, " ".join(stretch))


def own_words(texts: Mapping[str, Sequence[str]], count: int) -> dict[str, list[list[str]]]:
    """The words of each prompt's texts, cut where `count` words in a row are in all prompts, such as a system message:
    they say nothing about any of them."""
    said = {key: list(map(words_in, own)) for key, own in texts.items()}
    everywhere: set[tuple[str, ...]] = set()
    if len(said) > 1:
        everywhere = set.intersection(
            *({one for own in each for one in stretches(own, count)} for each in said.values())
        )
    return {key: [part for own in each for part in without(own, everywhere, count)] for key, each in said.items()}


def without(said: Sequence[str], removed: Set[tuple[str, ...]], count: int) -> list[list[str]]:
    """The parts of a text that remain without these stretches of `count` words."""
    is_removed = [False] * len(said)
    for first, stretch in enumerate(stretches(said, count)):
        if stretch in removed:
            is_removed[first : first + count] = [True] * count
    runs = groupby(zip(is_removed, said, strict=True), key=lambda one: one[0])
    return [[word for _, word in run] for gone, run in runs if not gone]


def texts_of(prompts: Prompts, task: Task, starts: Sequence[int | None]) -> dict[str, list[str]]:
    """Each prompt's own texts, by its key. If prompts are made from columns, these are the columns, without few-shot
    examples, which are training data on purpose."""
    plain = {"template": None, "opening": "", "shots": Shots()}
    is_made = any(getattr(prompts, name) != value for name, value in plain.items())
    columns: dict[str, list[str]] = {}
    if is_made:
        originals = prompt_rows(prompts.model_copy(update=plain))
        for row, original in zip(prompt_rows(prompts), originals, strict=True):
            columns.setdefault(row[prompts.column], []).extend(strings_in(original))
    rows = task.make().rows
    chosen = [rows[start][prompts.column] for start in starts]
    return {prompt_key(prompt): columns[prompt] if is_made else [prompt_text(prompt)] for prompt in chosen}


def words_in(text: str) -> list[str]:
    """Words of a text, without case and punctuation."""
    return WORD.findall(text.casefold())


def stretches(words: Sequence[str], count: int) -> Iterator[tuple[str, ...]]:
    return (tuple(words[first : first + count]) for first in range(len(words) - count + 1))


def training_texts(place: str) -> Iterator[str]:
    """Texts that a run learned from, those of the runs that it continues included, or those of a file's rows."""
    folder = Path(place).expanduser()
    if (folder / RECIPE_FILE).is_file():
        found = False
        for text in run_texts(folder):
            found = True
            yield text
        if not found:
            raise RunError(f"--overlap: {place} learned from no prompts or logged data, only from an environment")
        return
    yield from row_texts(open_rows(place).scan())


def run_texts(folder: Path) -> Iterator[str]:
    """Texts of all stages of a run, and of the run whose policy it began with."""
    recipe = read_recipe(folder)
    for stage in stages_of(recipe).values():
        yield from stage_texts(stage, folder)
    if recipe.model.path and (earlier := run_of(Path(recipe.model.path).expanduser())):
        yield from run_texts(earlier)


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
            if isinstance(recipe.objective, RewardModelObjective):
                yield from pair_texts(log.path, part, recipe.objective.holdout, task, without)
            elif task is None or not without:
                yield from row_texts(open_rows(log.path, part).scan())
            else:
                file = DatasetFile(log.path, task.renderer, part=part, without=without, skip_bad_rows=True)
                yield from row_texts(file.kept_rows())


def pair_texts(path: str, part: Selection, share: float, task: Task | None, without: Collection[str]) -> Iterator[str]:
    """Texts of the pairs that a reward model learned from: it holds out a share of the prompts by itself."""
    pairs, _ = read_pairs(path, part, skip_bad_rows=True)
    training, _ = split_pairs(
        pairs, share, lambda prompt: task is not None and not task.renderer.keys(prompt).isdisjoint(without)
    )
    yield from row_texts(vars(pairs[number]) for number in training)


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
