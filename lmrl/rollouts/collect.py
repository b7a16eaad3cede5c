"""Collecting episodes: by a policy, a scripted player, or several scripted players with a share each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from lmrl.engines.base import Key, Sampling
from lmrl.errors import RecipeError
from lmrl.recipe import Rollouts
from lmrl.recipe.source import Players
from lmrl.rollouts.sampler import Sampler
from lmrl.rollouts.task import Task
from lmrl.seeding import stream
from lmrl.trajectories.trajectory import Trajectory


def collect(
    sampler: Sampler,
    players: Players | None,
    rollouts: Rollouts,
    episodes: int,
    seed: int,
    check: Callable[[], Any] = lambda: None,
) -> Iterator[list[Trajectory]]:
    """Play `episodes` episodes from random start states, `rollouts.prompts` starts at a time; yields the judged ones.
    An episode of a self-play game yields one trajectory per side.

    players: None for the sampler's engine, which plays `rollouts.samples` episodes from each start. check: called
    between the parts; may raise to stop. Groups and episodes are numbered throughout.
    """
    task, samples = sampler.task, 1 if players else rollouts.samples
    for first in range(0, episodes, rollouts.prompts * samples):
        check()
        name = (seed, "collect", first)
        left = min(episodes - first, rollouts.prompts * samples)
        starts = draw_starts(task, -(-left // samples), name)
        if players:
            played = play_players(sampler, players, starts, name)
        else:
            played = sampler.play(starts, samples, Sampling.of(rollouts), name)
            played = [one for one in played if one.episode < left * task.sides]
        for trajectory in played:
            trajectory.episode += first * task.sides
            trajectory.group += first // samples * task.sides
        if task.judged_by == "reward" and not task.rewards:
            for trajectory in played:
                trajectory.reward = None  # prompts without a reward are not judged
            yield played
        else:
            yield task.with_turns(task.keep_judged(played))


def draw_starts(task: Task, count: int, name: Key) -> list[int | None]:
    """Random start states that the task trains on (None: drawn by the environment)."""
    if task.training is None:
        return [None] * count
    rng, starts = stream(*name), np.array(task.training)
    return [int(rng.choice(starts)) for _ in range(count)]


def check_players(task: Task, players: Players, key: str) -> None:
    """Raise RecipeError if the environment has no such scripted player."""
    known = getattr(task.make(), "players", ())
    for player in [players] if isinstance(players, str) else players:
        if player not in known:
            raise RecipeError(f"{key}: the environment has no player '{player}' (it has {', '.join(known) or 'none'})")


def play_players(sampler: Sampler, players: Players, starts: list[int | None], name: Key) -> list[Trajectory]:
    """An episode from every start state, each by the scripted player, or by one drawn according to the shares."""
    if isinstance(players, str):
        return sampler.play_scripted(players, starts, name)
    names, shares = list(players), np.array(list(players.values()), dtype=float)
    drawn = stream(*name, "players").choice(len(names), size=len(starts), p=shares / shares.sum())
    found: list[Trajectory] = []
    sides = sampler.task.sides
    for number, player in enumerate(names):
        chosen = np.flatnonzero(drawn == number).tolist()
        played = sampler.play_scripted(player, [starts[index] for index in chosen], (*name, player))
        for trajectory in played:
            game, side = divmod(trajectory.episode, sides)
            trajectory.group = trajectory.episode = chosen[game] * sides + side
        found += played
    return sorted(found, key=lambda trajectory: trajectory.episode)
