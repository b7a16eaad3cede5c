"""Logged episodes, from a file or by a scripted player."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

from lmrl import distributed
from lmrl.environments import limits_of
from lmrl.errors import DataError, ModelError, counted
from lmrl.evaluation.scoring import RESERVED, Scores, summarize_trajectories
from lmrl.evaluation.statistics import summarize
from lmrl.recipe import DatasetOptions, ObjectiveOptions
from lmrl.recipe.source import Players
from lmrl.rollouts.collect import check_players, draw_starts, play_players
from lmrl.rollouts.sampler import Sampler
from lmrl.rollouts.task import Task, starts_for
from lmrl.seeding import stream
from lmrl.sources.base import Source, SourceBatch, SourceRequest
from lmrl.sources.best import best_of
from lmrl.trajectories.chain import piece
from lmrl.trajectories.files import Selection
from lmrl.trajectories.formats import equal_pairs_note
from lmrl.trajectories.store import DatasetFile
from lmrl.trajectories.trajectory import Trajectory, start_key

BAD_ROWS = "bad_rows.jsonl"
PART = 64
CACHED = 4096
"""Number of logged episodes whose tokens are cached in memory."""


class Dataset(Source):
    """Logged episodes, in shuffled passes. The tokens of the CACHED most recently used episodes stay in memory."""

    def __init__(
        self,
        episodes: Sequence[Trajectory] | DatasetFile,
        returns: list[float | None],
        batch_size: int,
        seed: int,
        stage: str,
        best: float = 1.0,
        turns: int | None = None,
        groups: Sequence[Hashable] | None = None,
        best_among: Sequence[Hashable] | None = None,
        scores: Callable[[], Scores | None] = lambda: None,
        heldout: Callable[[int | None], list[Trajectory]] = lambda count: [],
        notes: Sequence[str] = (),
    ):
        """returns: of all episodes (None: not judged). best: share of episodes, those with the highest returns, to
        train on.
        best_among: for each episode the prompt within which it is ranked (None: among all).
        turns: train on a piece of this many turns of each episode. groups: each episode's group, to draw whole groups,
        and only those whose returns differ; `batch_size` then counts groups.

        scores: means with intervals over all episodes, None if no return is known. heldout: returns the episodes of
        (that many) held-out prompts. notes: notes for the user.
        """
        self.returns, self.batch_size, self.name = returns, batch_size, (seed, stage)
        self.scores, self.heldout, self.notes, self.dataset = scores, heldout, list(notes), self
        file = episodes if isinstance(episodes, DatasetFile) else None
        self.has_pairs = file is not None and file.has_pairs
        self._where = file.where if file else (lambda index: f"the log, episode {index + 1}")
        if best < 1:
            self._need_returns(f"source.best={best} ranks episodes by their returns")
        self.units = [[row] for row in range(len(returns))] if groups is None else self._comparable(groups, file)
        if best_among is not None and len(set(best_among)) == len(returns):
            raise DataError(
                "source.best_among=prompt ranks the episodes of each prompt and start state, but none has two: set it to all"
            )
        rng = stream(seed, stage, "best")
        self.kept = best_of(returns, best, rng, best_among) if groups is None else list(range(len(self.units)))
        self.grouped, self.turns = groups is not None, turns
        self._episode = lru_cache(CACHED)(episodes.__getitem__)

    @classmethod
    def build(cls, wanted: SourceRequest) -> Dataset:
        source = cast(DatasetOptions, wanted.recipe.source)
        found = build_dataset(source, wanted.task, wanted.seed, wanted.stage, wanted.bad_rows, wanted.compares)
        found.check_returns(source, wanted.recipe.objective)
        return found

    def check_returns(self, source: DatasetOptions, objective: ObjectiveOptions) -> None:
        """Raise DataError if returns are missing that the objective learns from; note returns that teach nothing."""
        log, returns = source.path or "the log", self.returns
        if objective.values_log:
            self._need_returns(
                f"'{objective.name}' learns from rewards", "add it, or imitate the data with objective.name=likelihood"
            )
        if objective.imitates and source.best == 1 and self.has_pairs:
            self.notes.append(
                f"warning: {log} holds pairs, and the rejected answers are imitated as well: source.best=0.5 "
                "source.best_among=prompt keeps the chosen ones"
            )
        if len(returns) > 1 and len(set(returns)) == 1 and (objective.values_log or source.best < 1):
            effect = "source.best chooses at random" if source.best < 1 else "at most the timing of rewards teaches"
            self.notes.append(f"warning: {log}: all {len(returns)} episodes return {returns[0]}, so {effect}")

    def _need_returns(self, why: str, fix: str = "add it") -> None:
        """Raise DataError with the place of the first episode that has no reward."""
        if None in self.returns:
            raise DataError(f"{self._where(self.returns.index(None))}: has no reward, but {why}: {fix}")

    def next(self, step: int) -> SourceBatch:
        return SourceBatch(self.take((step - 1) * self.batch_size, self.batch_size))

    def take(self, first: int, count: int) -> list[Trajectory]:
        """This process's share of `count` episodes (or groups) from position `first` of the endless sequence of
        shuffled passes."""
        units: list[Any] = starts_for(self.kept, first, count, *self.name, "rows")
        low, high = distributed.shard_bounds(count)
        if self.grouped:
            return [
                replace(self._episode(row), group=number)
                for number, unit in enumerate(units[low:high], start=low)
                for row in self.units[unit]
            ]
        if self.turns is None:
            return [self._episode(row) for row in units[low:high]]
        return self.pieces([self._episode(row) for row in units], "piece", first)[low:high]

    def _comparable(self, groups: Sequence[Hashable], file: DatasetFile | None) -> list[list[int]]:
        """Rows of each group that has different returns; the others are counted in a note."""
        rows: dict[Hashable, list[int]] = {}
        for row, group in enumerate(groups):
            rows.setdefault(group, []).append(row)
        self._need_returns("pairs are ranked by rewards", "add it, or give chosen and rejected")
        units = [unit for unit in rows.values() if len({self.returns[row] for row in unit}) > 1]
        if not units:
            reasons = "; ".join(["no two episodes of a prompt have different rewards", *self.notes])
            raise DataError(
                f"there is no pair to train on: {reasons}: add chosen and rejected, or several episodes with rewards for each prompt, or "
                "relax the options that leave episodes out"
            )
        if file is not None and file.equal_pairs:
            self.notes.append(equal_pairs_note(len(file.equal_pairs), file.rows.where(file.equal_pairs[0])))
        if len(units) < len(rows):
            self.notes.append(
                f"left out {len(rows) - len(units)} of {len(rows)} prompts without two episodes of different rewards"
            )
        return units

    def pieces(self, episodes: list[Trajectory], *name: int | str) -> list[Trajectory]:
        """A piece of `turns` turns of each episode, if episodes are to be cut. `name` names the random stream."""
        if self.turns is None:
            return episodes
        rng = stream(*self.name, *name)
        last = [sum(1 for segment in one.segments if segment.actions) - self.turns for one in episodes]
        return [
            piece(one, int(rng.integers(max(end, 0) + 1)), self.turns) for one, end in zip(episodes, last, strict=True)
        ]

    def parts(self) -> Iterator[list[Trajectory]]:
        """All episodes that training may use, in parts, then the held-out ones."""
        for first in range(0, len(self.kept), PART):
            yield [self._episode(row) for unit in self.kept[first : first + PART] for row in self.units[unit]]
        yield self.heldout(None)

    def probe(self, count: int) -> list[Trajectory]:
        """Up to `count` episodes, always the same, on every rank."""
        order = stream(*self.name, "probe").permutation(self.kept)
        return [self._episode(row) for unit in order[:count].tolist() for row in self.units[unit]]


def build_dataset(
    source: DatasetOptions, task: Task, seed: int, stage: str, bad_rows: Path | None = None, compares: bool = False
) -> Dataset:
    """The logged episodes that a recipe names: from a file, or by a scripted player."""
    by_prompt = source.best_among == "prompt"
    if source.player is not None:
        episodes, notes = within(play_dataset(task, source.player, source.episodes, seed), task.positions)
        returns = [episode.reward for episode in episodes]
        starts = [start_key(episode) for episode in episodes]
        return Dataset(
            episodes,
            returns,
            source.batch_size,
            seed,
            stage,
            source.best,
            source.turns,
            starts if compares else None,
            starts if by_prompt else None,
            lambda: summarize_trajectories(episodes, "start state", limits_of(task.make())),
            notes=notes,
        )
    file = open_dataset_file(source, task, bad_rows)
    return Dataset(
        file,
        file.returns,
        source.batch_size,
        seed,
        stage,
        source.best,
        source.turns,
        file.groups if compares else None,
        file.groups if by_prompt else None,
        lambda: summarize_file(file, task),
        file.heldout,
        file.notes,
    )


def play_dataset(task: Task, player: Players, episodes: int, seed: int) -> list[Trajectory]:
    """Episodes of scripted players from random start states."""
    check_players(task, player, "source.player")
    name = (seed, "logged", player if isinstance(player, str) else "players")
    starts = draw_starts(task, episodes, name)
    return task.with_turns(task.keep_judged(play_players(Sampler(task), player, starts, name)))


def within(episodes: list[Trajectory], positions: int | None) -> tuple[list[Trajectory], list[str]]:
    """The episodes that fit into a model's positions (None: all), and a note on the others. Raises DataError if none does."""
    if positions is None:
        return episodes, []
    fitting = [one for one in episodes if all(len(segment.tokens) <= positions for segment in one.segments)]
    beyond = f"{counted(len(episodes) - len(fitting), 'episode')} of more than the {positions} tokens that the model has positions for"
    if not fitting:
        raise DataError(
            f"source.player: no episode is left to train on; left out {beyond}: take a model with more, or set task.history=1"
        )
    return fitting, [f"source.player: left out {beyond}"] if len(fitting) < len(episodes) else []


def open_dataset_file(source: DatasetOptions, task: Task, bad_rows: Path | None = None) -> DatasetFile:
    """Episodes of a file, without the prompts that the task holds out for evaluation. source: has a path."""
    assert source.path is not None, "a player's episodes have no file"
    file = DatasetFile(
        source.path,
        task.renderer,
        task.history,
        Selection.of(source),
        task.heldout_prompts(),
        source.skip_bad_rows,
        bad_rows,
        source.max_tokens,
        task.scored,
        task.positions,
        as_shown=task.agent is None,  # a program shows what it likes
    )
    if file.needs_template and not task.renderer.tokenizer.chat_template:
        raise ModelError(f"{source.path}: holds dialogues, but the tokenizer has no chat template")
    return file


def summarize_file(file: DatasetFile, task: Task) -> Scores | None:
    """Return (for prompts, reward), components and metrics of logged episodes, each with its interval over prompts.

    None if no return is known, and for pairs: their 1 and -1 say which answer is preferred, not what a reward gives it.
    """
    known = [index for index, value in enumerate(file.returns) if value is not None]
    if file.has_pairs or not known:
        return None
    main, unit, clusters = (
        ("reward", "prompt", file.groups) if task.judged_by == "reward" else ("return", "start state", file.draws)
    )
    returns = [value for value in file.returns if value is not None]
    columns: dict[str, tuple[Sequence[float], Sequence[int]]] = {main: (returns, known)}
    for name, values in file.measures.items():
        columns[f"component/{name}" if name in RESERVED else name] = values, file.measured[name]
    limits = limits_of(task.make())
    return {
        name: summarize(values, [clusters[index] for index in episodes], limits.get(name), unit=unit)
        for name, (values, episodes) in columns.items()
    }
