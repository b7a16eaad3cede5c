"""Sources: where a step's trajectories come from."""

from __future__ import annotations

from collections.abc import Collection
from typing import Protocol

from lmrl.errors import DataError, RecipeError
from lmrl.recipe import DatasetSource, Recipe, Rollouts
from lmrl.rollouts.engine import Sampling
from lmrl.rollouts.render import Renderer
from lmrl.rollouts.sampler import Sampler
from lmrl.rollouts.task import Task, starts_for
from lmrl.seeding import stream
from lmrl.trajectories.files import field_of, read_rows
from lmrl.trajectories.trajectory import Segment, Trajectory


class Source(Protocol):
    fresh: bool
    """Whether the current policy made the trajectories."""

    def next(self, step: int) -> list[Trajectory]:
        """The trajectories of a step, counted from 1: a function of the step (and the policy) alone."""
        ...


class FreshRollouts:
    """Episodes by the current policy."""

    fresh = True

    def __init__(self, sampler: Sampler, options: Rollouts, seed: int, stage: str):
        self.sampler, self.options, self.name = sampler, options, (seed, stage)
        self.sampling = Sampling.of(options)

    def next(self, step: int) -> list[Trajectory]:
        count = self.options.prompts
        starts = starts_for(self.sampler.task.training, (step - 1) * count, count, *self.name, "prompts")
        return self.sampler.play(starts, self.options.samples, self.sampling, (*self.name, "rollout", step))


class Logged:
    """Logged episodes, in shuffled passes."""

    fresh = False

    def __init__(self, trajectories: list[Trajectory], batch_size: int, seed: int, stage: str):
        self.trajectories, self.batch_size, self.name = trajectories, batch_size, (seed, stage)

    def next(self, step: int) -> list[Trajectory]:
        rows = list(range(len(self.trajectories)))
        chosen = starts_for(rows, (step - 1) * self.batch_size, self.batch_size, *self.name, "rows")
        return [self.trajectories[row] for row in chosen]


def build_source(recipe: Recipe, task: Task, sampler: Sampler, stage: str) -> Source:
    """The source of a stage's recipe."""
    seed = recipe.training.seed
    if not isinstance(recipe.source, DatasetSource):
        return FreshRollouts(sampler, recipe.rollouts, seed, stage)
    if recipe.source.player is not None:
        trajectories = play_logged(task, recipe.source.player, recipe.source.episodes, seed)
    else:
        trajectories = read_logged(recipe.source.path, recipe.source.split, task.renderer, task.heldout_prompts())
    return Logged(trajectories, recipe.source.batch_size, seed, stage)


def play_logged(task: Task, player: str, episodes: int, seed: int) -> list[Trajectory]:
    """Episodes of a scripted player from random start states."""
    players = getattr(task.make(), "players", ())
    if player not in players:
        raise RecipeError(
            f"source.player: the environment has no player '{player}' (it has {', '.join(players) or 'none'})"
        )
    rng = stream(seed, "logged", player)
    starts = task.training
    chosen = [None if starts is None else int(rng.choice(starts)) for _ in range(episodes)]
    return task.keep_judged(Sampler(task).play_scripted(player, chosen, (seed, "logged", player)))


def read_logged(path: str, split: str, renderer: Renderer, without: Collection[str] = ()) -> list[Trajectory]:
    """Episodes of one step from a file of `prompt` and `completion` (trl's prompt-completion format).

    without: prompts (as text) that are held out for evaluation.
    """
    trajectories = []
    for number, row in enumerate(read_rows(path, split), start=1):
        prompt = field_of(row, "prompt", (str, list), path, number)
        completion = field_of(row, "completion", (str, list), path, number)
        if str(prompt) in without:
            continue
        text = completion if isinstance(completion, str) else "".join(message["content"] for message in completion)
        if not text:
            raise DataError(f"{path}, row {number}: field 'completion' is empty")
        segment = Segment()
        segment.observe(renderer.first(prompt))
        segment.act(renderer.action(text), None, 0)
        trajectories.append(Trajectory([segment], str(prompt), text, reward=None, episode=number - 1))
    return trajectories
