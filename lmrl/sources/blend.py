"""Several tasks and logs in one run: prompts and logged episodes by weight, metrics by part."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

from lmrl import distributed
from lmrl.engines.base import Sampling
from lmrl.errors import RecipeError
from lmrl.evaluation.scoring import Scores
from lmrl.recipe import PromptTask
from lmrl.recipe.blend import BlendSource, Curriculum, Part
from lmrl.rewards.scale import Scale
from lmrl.rollouts.sampler import Sampler
from lmrl.rollouts.task import Task, build_task, starts_for
from lmrl.sources.base import Source, SourceBatch, SourceRequest
from lmrl.sources.curriculum import Schedule
from lmrl.sources.dataset import Dataset, build_dataset
from lmrl.trajectories.trajectory import Trajectory

STATE_FILE = "blend.json"


class Shares:
    """The division of a step's `total` units by weight.

    Every unit goes to the part that lags furthest behind, so over the steps each stays within one unit of its share. A
    step's units depend only on the step's number.
    """

    def __init__(self, weights: Sequence[float], total: int):
        self.weights, self.total = list(weights), total
        self._step, self._counts = 0, [0] * len(self.weights)

    def __call__(self, step: int) -> tuple[list[int], list[int]]:
        """For a step (from 1): the units of each part, and those that it had in earlier steps."""
        if step <= self._step:
            self._step, self._counts = 0, [0] * len(self.weights)
        while self._step < step - 1:
            self._advance()
        before = list(self._counts)
        self._advance()
        return [now - then for now, then in zip(self._counts, before, strict=True)], before

    def _advance(self) -> None:
        whole, done = sum(self.weights), self._step * self.total
        for unit in range(done + 1, done + self.total + 1):
            lag = [weight / whole * unit - count for weight, count in zip(self.weights, self._counts, strict=True)]
            self._counts[lag.index(max(lag))] += 1
        self._step += 1


class PlayedPart:
    """A task that is played."""

    def __init__(
        self, part: Part, task: Task, sampler: Sampler, name: tuple[int | str, ...], curriculum: Curriculum | None
    ):
        self.part, self.task, self.sampler, self.name = part, task, sampler, (*name, part.name)
        self.schedule: Schedule | None = None
        if curriculum is not None:
            if task.training is None:
                raise RecipeError(
                    f"source.curriculum: part '{part.name}' draws its start states (it has no num_starts), so none can be left "
                    "out: number them, or leave the curriculum out"
                )
            self.schedule = Schedule(task.training, curriculum, (*self.name, "prompts"))

    def play(self, step: int, before: int, count: int, samples: int, sampling: Sampling) -> list[Trajectory]:
        """This process's share of the episodes from `count` start states, judged or not. before: start states of
        earlier steps."""
        if self.schedule is not None:
            starts: list[int | None] = [*self.schedule.next(step, count)]
        else:
            starts = starts_for(self.task.training, before, count, *self.name, "prompts")
        played = self.sampler.play(starts, samples, sampling, (*self.name, "rollout", step), shared=True)
        if self.schedule is not None:
            known = [(one.start, one.reward) for one in played if one.start is not None and one.reward is not None]
            self.schedule.record(step, distributed.all_gather(known))
        return played

    def scales(self) -> dict[str, Scale]:
        """Rewards that are normalised by running statistics."""
        return {one.label: one.scale for one in self.task.rewards if one.scale.is_running}

    def state(self) -> dict[str, Any]:
        found: dict[str, Any] = {"scales": {label: scale.state() for label, scale in self.scales().items()}}
        return found | ({"schedule": self.schedule.state()} if self.schedule else {})

    def load_state(self, state: dict[str, Any]) -> None:
        for label, scale in self.scales().items():
            scale.load_state(state["scales"][label])
        if self.schedule:
            self.schedule.load_state(state["schedule"])


class Logs:
    """The logs of a blend, behind the interface of a single one."""

    def __init__(self, logs: Sequence[Dataset], names: Sequence[str]):
        self.logs = list(logs)
        self.notes = [f"{name}: {note}" for name, one in zip(names, logs, strict=True) for note in one.notes]

    def parts(self) -> Iterator[list[Trajectory]]:
        for one in self.logs:
            yield from one.parts()

    def probe(self, count: int) -> list[Trajectory]:
        return [episode for one in self.logs for episode in one.probe(-(-count // len(self.logs)))]

    def heldout(self, count: int | None) -> list[Trajectory]:
        """Held-out episodes of all logs, with distinct numbers."""
        found: list[Trajectory] = []
        for one in self.logs:
            found += _offset(one.heldout(count), 1 + max((episode.group for episode in found), default=-1), 0)
        return found

    def scores(self) -> Scores | None:
        """None: scores of several tasks have no common row."""
        return self.logs[0].scores() if len(self.logs) == 1 else None


class Blend(Source):
    """Episodes of several parts in one batch. Groups and episodes are numbered throughout."""

    def __init__(
        self,
        played: list[PlayedPart],
        logged: list[tuple[Part, Dataset]],
        prompts: int,
        samples: int,
        sampling: Sampling,
        batch_size: int,
    ):
        self.played, self.logged = played, logged
        self.prompts, self.samples, self.sampling, self.batch_size = prompts, samples, sampling, batch_size
        self._of_prompts = Shares([one.part.weight for one in played], prompts) if played else None
        self._of_logs = Shares([part.weight for part, _ in logged], batch_size) if logged else None
        self.task_notes = [
            f"{one.part.name}: {note}" for one in played if one.part.task is not None for note in one.task.notes
        ]
        if logged:
            self.dataset = Logs([one for _, one in logged], [part.name for part, _ in logged])  # type: ignore[assignment]

    @classmethod
    def build(cls, wanted: SourceRequest) -> Blend:
        recipe, options = wanted.recipe, cast(BlendSource, wanted.recipe.source)
        name = (wanted.seed, wanted.stage)
        played, logged = [], []
        for part in options.parts:
            task = wanted.task if part.task is None else part_task(part, wanted.task)
            if part.log is None:
                task.check_prompts_fit(recipe.rollouts.max_new_tokens)
                if isinstance(part.task, PromptTask) and not part.task.rewards:
                    raise RecipeError(f"source.parts '{part.name}': a task of prompts needs rewards: list at least one")
                sampler = (
                    wanted.sampler
                    if part.task is None
                    else Sampler(task, wanted.sampler.samples_from, wanted.sampler.decode, wanted.sampler.deterministic)
                )
                played.append(PlayedPart(part, task, sampler, name, options.curriculum))
            else:
                stage = f"{wanted.stage}/{part.name}"
                log = build_dataset(part.log, task, wanted.seed, stage, wanted.bad_rows, wanted.compares)
                log.check_returns(part.log, recipe.objective)
                logged.append((part, log))
        rollouts = recipe.rollouts
        return cls(played, logged, rollouts.prompts, rollouts.samples, Sampling.of(rollouts), options.batch_size)

    def next(self, step: int) -> SourceBatch:
        before = copy.deepcopy(self._state())
        try:
            return self._next(step)
        except BaseException:  # the step will be sampled again
            self._load_state(before)
            raise

    def _next(self, step: int) -> SourceBatch:
        batch, groups = SourceBatch([]), 0
        counts, earlier = self._of_prompts(step) if self._of_prompts else ([], [])
        for one, count, first in zip(self.played, counts, earlier, strict=True):
            played = one.play(step, first, count, self.samples, self.sampling) if count else []
            judged = one.task.keep_judged(played) if count else []
            self._measure(batch, one.part.name, judged, one.schedule.resting(step + 1) if one.schedule else None)
            batch.played += _offset(played, groups, groups * self.samples)
            kept = one.task.keep_groups(judged)
            batch.learn += kept
            batch.failed += len(played) - len(judged)
            batch.dropped += len(judged) - len(kept)
            groups += count * one.task.sides
        counts, earlier = self._of_logs(step) if self._of_logs else ([], [])
        for (part, log), count, first in zip(self.logged, counts, earlier, strict=True):
            taken = log.take(first, count) if count else []
            self._measure(batch, part.name, taken)
            # For a log, groups matter only if whole ones are drawn; these are numbered by their place in the batch.
            batch.learn += _offset(taken, groups, 0) if log.grouped else taken
            groups += count
        return batch

    @staticmethod
    def _measure(batch: SourceBatch, name: str, episodes: list[Trajectory], resting: int | None = None) -> None:
        from lmrl.training.monitoring.measures import measure

        found = measure(episodes) | {"episodes": float(round(distributed.all_sum([len(episodes)])[0]))}
        found |= {} if resting is None else {"resting": float(resting)}
        batch.measures |= {f"{name}/{key}": value for key, value in found.items()}

    # ----------------------------------------------------------------------------------------------------- checkpoints
    def save(self, folder: Path) -> None:
        (folder / STATE_FILE).write_text(json.dumps(self._state()) + "\n")

    def load(self, folder: Path) -> None:
        self._load_state(json.loads((folder / STATE_FILE).read_text()))

    def _state(self) -> dict[str, Any]:
        return {one.part.name: one.state() for one in self.played}

    def _load_state(self, state: dict[str, Any]) -> None:
        for one in self.played:
            one.load_state(state[one.part.name])


def part_task(part: Part, main: Task) -> Task:
    """A part's own task, ready to be played."""
    task = build_task(part.task, main.renderer.tokenizer)
    task.learning, task.positions = True, main.positions
    return task


def _offset(episodes: list[Trajectory], groups: int, numbers: int) -> list[Trajectory]:
    """Renumber these episodes, in place: they belong to this part only."""
    for one in episodes:
        one.group += groups
        one.episode += numbers
    return episodes
