"""Sources: where a step's trajectories come from."""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lmrl import distributed
from lmrl.environments import limits_of
from lmrl.errors import DataError, ModelError
from lmrl.evaluation.evaluate import RESERVED, Scores, summarize_trajectories
from lmrl.evaluation.statistics import summarize
from lmrl.recipe import DatasetOptions, MixtureSource, Recipe, Rollouts, RolloutsSource
from lmrl.recipe.source import Players
from lmrl.rewards.scale import Scale
from lmrl.rollouts.collect import check_players, draw_starts, play_players
from lmrl.rollouts.engine import Sampling
from lmrl.rollouts.sampler import Sampler
from lmrl.rollouts.task import Task, starts_for
from lmrl.seeding import stream
from lmrl.trajectories.chain import piece
from lmrl.trajectories.store import DatasetFile, read_episodes, write_episodes
from lmrl.trajectories.trajectory import Trajectory, prompt_key

if TYPE_CHECKING:
    from lmrl.training.async_rollouts import AsyncRollouts

REPLAY_FILE, REWARDS_FILE, BAD_ROWS = "replay.parquet", "rewards.json", "bad_rows.jsonl"
PART = 64
CACHED = 4096
"""Logged episodes whose tokens are kept in memory."""


@dataclass
class SourceBatch:
    """A step's trajectories, of which each rank has its shard.

    learn: those to train on. played: fresh ones by the current policy, scored or not.
    """

    learn: list[Trajectory]
    played: list[Trajectory] = field(default_factory=list)
    failed: int = 0
    """Number of played ones that could not be scored."""


class Source:
    """Base of all sources. `next` depends only on the step, the policy and the saved state."""

    dataset: Dataset | None = None
    """Its logged episodes, if it has any."""

    def next(self, step: int) -> SourceBatch:
        """The trajectories of a step, counted from 1."""
        raise NotImplementedError

    def wait(self) -> list[Trajectory]:
        """Wait until no rollout is running in the background; returns the next step's episodes if they were sampled."""
        return []

    def stop(self, forget: bool = False) -> None:
        """Cancel rollouts that run in the background. forget: also drop finished episodes of the next step."""

    def save(self, folder: Path) -> None:
        """Write the source's state next to a checkpoint, for a resumed run."""

    def load(self, folder: Path) -> None:
        pass


class FreshRollouts(Source):
    """Episodes by the current policy; `best` below 1 keeps the share with the highest returns."""

    def __init__(
        self,
        sampler: Sampler,
        options: Rollouts,
        seed: int,
        stage: str,
        best: float = 1.0,
        by_prompt: bool = False,
        resample: int = 0,
    ):
        """by_prompt: keep that share of each prompt's episodes. resample: rounds in which prompts whose episodes all
        earned the same are replaced by further ones."""
        self.sampler, self.options, self.name = sampler, options, (seed, stage)
        self.best, self.by_prompt, self.resample = best, by_prompt, resample
        self.sampling = Sampling.of(options)

    def next(self, step: int) -> SourceBatch:
        before = self._statistics()
        try:
            return self._play(step)
        except BaseException:  # the step will be sampled again
            self._restore(before)
            raise

    def _play(self, step: int) -> SourceBatch:
        count, task = self.options.prompts, self.sampler.task
        starts = starts_for(task.training, (step - 1) * count, count, *self.name, "prompts")
        played = self.sampler.play(
            starts, self.options.samples, self.sampling, (*self.name, "rollout", step), shared=True
        )
        judged = task.keep_judged(played)
        failed = len(played) - len(judged)
        for again in range(1, self.resample + 1):
            zero_variance = distributed.all_gather(zero_variance_groups(judged))
            if not zero_variance:
                break
            name = (*self.name, "again", again)
            starts = starts_for(task.training, (step - 1) * count, len(zero_variance), *name)
            more = self.sampler.play(starts, self.options.samples, self.sampling, (*name, step), shared=True)
            for trajectory in more:
                trajectory.group += again * count
            kept = task.keep_judged(more)
            failed += len(more) - len(kept)
            spread = [one for one in kept if one.group not in zero_variance_groups(kept)]
            replaced = zero_variance[: len(set(distributed.all_gather([one.group for one in spread])))]
            judged = [one for one in judged if one.group not in replaced] + spread
            played = played + more
        best = best_among_all(judged, self.best, stream(*self.name, "best", step), self.by_prompt)
        return SourceBatch(best, played, failed)

    def save(self, folder: Path) -> None:
        if states := self._statistics():
            (folder / REWARDS_FILE).write_text(json.dumps(states) + "\n")

    def load(self, folder: Path) -> None:
        if self._running():
            self._restore(json.loads((folder / REWARDS_FILE).read_text()))

    def _statistics(self) -> dict[str, dict[str, Any]]:
        return {label: scale.state() for label, scale in self._running().items()}

    def _restore(self, states: dict[str, dict[str, Any]]) -> None:
        for label, scale in self._running().items():
            scale.load_state(states[label])

    def _running(self) -> dict[str, Scale]:
        """Rewards that are normalised by what was sampled so far."""
        return {one.label: one.scale for one in self.sampler.task.rewards if one.scale.is_running}


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
        groups: Sequence[int] | None = None,
        best_among: Sequence[Hashable] | None = None,
        scores: Callable[[], Scores | None] = lambda: None,
        heldout: Callable[[int | None], list[Trajectory]] = lambda count: [],
        notes: Sequence[str] = (),
    ):
        """returns: of all episodes (None: not judged). best: share of them, with the highest, that is learned from.
        best_among: of each episode the prompt among whose episodes it is ranked (None: among all).
        turns: learn from a piece of so many turns of each. groups: of each episode the group it belongs to, where whole
        groups are to be drawn, and only those whose returns differ; a batch then has so many groups.

        scores: means with intervals over all episodes, None where no return is known. heldout: gives the episodes of
        (that many) held-out prompts. notes: what a person should know.
        """
        self.returns, self.batch_size, self.name = returns, batch_size, (seed, stage)
        self.scores, self.heldout, self.notes, self.dataset = scores, heldout, list(notes), self
        self.units = [[row] for row in range(len(returns))] if groups is None else self._comparable(groups)
        if best_among is not None and len(set(best_among)) == len(returns):
            raise DataError(
                "source.best_among=prompt ranks the episodes of each prompt, but no prompt has two of them: leave it at all"
            )
        rng = stream(seed, stage, "best")
        self.kept = best_of(returns, best, rng, best_among) if groups is None else list(range(len(self.units)))
        self.grouped, self.turns = groups is not None, turns
        self._episode = lru_cache(CACHED)(episodes.__getitem__)

    def next(self, step: int) -> SourceBatch:
        return SourceBatch(self.take((step - 1) * self.batch_size, self.batch_size))

    def take(self, first: int, count: int) -> list[Trajectory]:
        """This process's share of `count` episodes (or groups) from position `first` of the endless sequence of shuffled
        passes."""
        units = starts_for(self.kept, first, count, *self.name, "rows")
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

    def _comparable(self, groups: Sequence[int]) -> list[list[int]]:
        """Rows of each group that has different returns; the others are counted in a note."""
        rows: dict[int, list[int]] = {}
        for row, group in enumerate(groups):
            rows.setdefault(group, []).append(row)
        if None in self.returns:
            raise DataError(f"episode {self.returns.index(None) + 1} has no reward, and pairs are ranked by rewards")
        units = [unit for unit in rows.values() if len({self.returns[row] for row in unit}) > 1]
        if not units:
            raise DataError(
                "no two episodes of a prompt have different rewards, so that there is no pair to learn from; expected "
                "chosen and rejected, or several episodes with rewards for each prompt"
            )
        if len(units) < len(rows):
            self.notes.append(
                f"left out {len(rows) - len(units)} of {len(rows)} prompts, whose episodes all earn the same"
            )
        return units

    def pieces(self, episodes: list[Trajectory], *name: int | str) -> list[Trajectory]:
        """A piece of `turns` turns of each episode, where they are to be cut. `name` names the random stream."""
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


class Mixture(Source):
    """Fresh episodes go into a replay buffer; a batch takes a share from it, and the rest from the log."""

    def __init__(
        self, fresh: FreshRollouts | AsyncRollouts, dataset: Dataset, options: MixtureSource, steps: int, tokenizer: Any
    ):
        self.fresh, self.dataset, self.options, self.steps = fresh, dataset, options, steps
        self.tokenizer = tokenizer
        self.replay: list[Trajectory] = []

    def online(self, step: int) -> int:
        """Episodes of a step's batch that come from the replay buffer."""
        options = self.options
        if step <= options.warmup_steps:
            return 0
        done = (step - 1 - options.warmup_steps) / max(self.steps - 1 - options.warmup_steps, 1)
        return round((options.online + (options.online_end - options.online) * done) * options.batch_size)

    def next(self, step: int) -> SourceBatch:
        options, source_batch = self.options, self.fresh.next(step)
        # The same buffer on every rank.
        self.replay = (self.replay + distributed.all_gather(source_batch.learn))[-options.replay :]
        if step <= options.warmup_steps:
            return SourceBatch([], source_batch.played, source_batch.failed)
        count = self.online(step)
        rows = stream(*self.fresh.name, "replay", step).integers(len(self.replay), size=count)
        first = sum(options.batch_size - self.online(earlier) for earlier in range(options.warmup_steps + 1, step))
        replayed = self.dataset.pieces([self.replay[row] for row in rows], "replayed", step)
        learn = [*distributed.shard(replayed), *self.dataset.take(first, options.batch_size - count)]
        return SourceBatch(learn, source_batch.played, source_batch.failed)

    def wait(self) -> list[Trajectory]:
        return self.fresh.wait()

    def stop(self, forget: bool = False) -> None:
        self.fresh.stop(forget)

    def save(self, folder: Path) -> None:
        self.fresh.save(folder)
        write_episodes(folder / REPLAY_FILE, self.replay, self.tokenizer)

    def load(self, folder: Path) -> None:
        self.fresh.load(folder)
        self.replay = read_episodes(folder / REPLAY_FILE, self.tokenizer)


def zero_variance_groups(trajectories: list[Trajectory]) -> list[int]:
    """Groups whose episodes all have the same reward, in order of appearance."""
    rewards: dict[int, set[float]] = {}
    for trajectory in trajectories:
        rewards.setdefault(trajectory.group, set()).add(trajectory.reward)
    return [group for group, earned in rewards.items() if len(earned) == 1]


def best_of(
    returns: Sequence[float | None], share: float, rng: np.random.Generator, groups: Sequence[Hashable] | None = None
) -> list[int]:
    """Positions of that share of episodes with the highest returns, at least one; which of equal ones, `rng` draws.

    groups: of each episode the group among which it is ranked, and of each of which a share is kept (None: all are one).
    """
    if share == 1:
        return list(range(len(returns)))
    if any(value is None for value in returns):
        row = returns.index(None)
        raise DataError(f"source.best={share} ranks episodes by their returns, but episode {row + 1} has no reward")
    lots = rng.permutation(len(returns))
    ranked: dict[Hashable, list[int]] = {}
    for position in sorted(range(len(returns)), key=lambda position: (-returns[position], lots[position])):
        ranked.setdefault(None if groups is None else groups[position], []).append(position)
    return sorted(position for rows in ranked.values() for position in rows[: max(round(share * len(rows)), 1)])


def best_among_all(
    trajectories: list[Trajectory], share: float, rng: np.random.Generator, by_prompt: bool = False
) -> list[Trajectory]:
    """This process's part of that share of all processes' episodes with the highest returns (see best_of).

    by_prompt: of each group's episodes that share. Which they are does not depend on how many processes share them.
    """
    if share == 1:
        return trajectories
    everyone = sorted(distributed.all_gather([(one.group, one.episode, one.reward) for one in trajectories]))
    groups = [group for group, _, _ in everyone] if by_prompt else None
    best = {everyone[place][:2] for place in best_of([earned for *_, earned in everyone], share, rng, groups)}
    return [one for one in trajectories if (one.group, one.episode) in best]


def build_source(
    recipe: Recipe, task: Task, sampler: Sampler, stage: str, bad_rows: Path | None = None, compares: bool = False
) -> Source:
    """The source of a stage's recipe.

    bad_rows: where malformed rows are reported, if they are to be skipped. compares: sample logged episodes in groups
    of one prompt.
    """
    seed = recipe.training.seed
    if isinstance(recipe.source, RolloutsSource):
        options = recipe.source
        by_prompt = options.best_among == "prompt"
        fresh = FreshRollouts(sampler, recipe.rollouts, seed, stage, options.best, by_prompt, options.resample)
        return _maybe_async(fresh, recipe)
    dataset = build_dataset(recipe.source, task, seed, stage, bad_rows, compares)
    if not isinstance(recipe.source, MixtureSource):
        return dataset
    fresh = _maybe_async(FreshRollouts(sampler, recipe.rollouts, seed, stage), recipe)
    return Mixture(fresh, dataset, recipe.source, recipe.training.steps, task.renderer.tokenizer)


def _maybe_async(fresh: FreshRollouts, recipe: Recipe) -> FreshRollouts | AsyncRollouts:
    """Fresh episodes, sampled asynchronously if the recipe sets `rollouts.ahead`."""
    from lmrl.training.async_rollouts import AsyncRollouts  # builds on this file

    return AsyncRollouts(fresh, recipe.training.steps) if recipe.rollouts.ahead else fresh


def build_dataset(
    source: DatasetOptions, task: Task, seed: int, stage: str, bad_rows: Path | None = None, compares: bool = False
) -> Dataset:
    """The logged episodes that a recipe names: from a file, or by a scripted player."""
    by_prompt = source.best_among == "prompt"
    if source.player is not None:
        episodes = play_dataset(task, source.player, source.episodes, seed)
        returns = [episode.reward for episode in episodes]
        return Dataset(
            episodes,
            returns,
            source.batch_size,
            seed,
            stage,
            source.best,
            source.turns,
            [episode.group for episode in episodes] if compares else None,
            [prompt_key(episode.turns[0].observation) for episode in episodes] if by_prompt else None,
            lambda: summarize_trajectories(episodes, "start state", limits_of(task.make())),
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
    return task.keep_judged(play_players(Sampler(task), player, starts, name))


def open_dataset_file(source: DatasetOptions, task: Task, bad_rows: Path | None = None) -> DatasetFile:
    """Episodes of a file, without the prompts that the task holds out for evaluation."""
    file = DatasetFile(
        source.path,
        task.renderer,
        task.history,
        source.split,
        task.heldout_prompts(),
        source.skip_bad_rows,
        bad_rows,
        source.max_tokens,
        task.scored,
        task.positions,
    )
    if file.needs_template and not task.renderer.tokenizer.chat_template:
        raise ModelError(f"{source.path}: holds dialogues, but the tokenizer has no chat template")
    return file


def summarize_file(file: DatasetFile, task: Task) -> Scores | None:
    """Return (of prompts, reward), components and metrics of logged episodes, each with its interval over prompts."""
    known = [index for index, value in enumerate(file.returns) if value is not None]
    if not known:
        return None
    main, unit = ("reward", "prompt") if task.judged_by == "reward" else ("return", "start state")
    columns = {main: ([file.returns[index] for index in known], known)}
    for name, values in file.measures.items():
        columns[f"component/{name}" if name in RESERVED else name] = values, file.measured[name]
    limits = limits_of(task.make())
    return {
        name: summarize(values, [file.groups[index] for index in episodes], limits.get(name), unit=unit)
        for name, (values, episodes) in columns.items()
    }
