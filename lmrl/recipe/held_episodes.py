"""Memory of the episodes that a process holds as Python objects, estimated without torch."""

from __future__ import annotations

from lmrl.recipe.recipe import Recipe
from lmrl.recipe.source import DatasetOptions, MixtureSource
from lmrl.recipe.task import EnvironmentTask, RandomWalksTask

EPISODE = 610
"""Bytes of a `Trajectory` without segments and turns, in CPython 3.11, as are the following."""
SEGMENT = 500
"""Bytes of a `Segment` without tokens."""
TURN = 234
"""Bytes of a `Turn`: the object and its reward, 136, and the headers of two strings, 49 each."""
TOKEN = 36
"""Bytes of a token in a segment: a pointer in each of four lists, which grow an eighth ahead of need. What they point to
is shared: small integers, None and 0.0."""
CHARACTERS = 4
"""Characters of a token. They are held twice, as text of the turn and of the whole episode."""


def held_bytes(recipe: Recipe, turn_tokens: int) -> int:
    """Bytes of the episodes of environments that a stage holds at a time: those of a scripted player, those of a replay
    buffer and those of a step, each of the maximum number of turns. turn_tokens: tokens of a turn and what it answers.

    Episodes of files are read when they are needed, and those of prompts are a single turn: neither is counted.
    """
    if not isinstance(recipe.task, EnvironmentTask):
        return 0
    return held_episodes(recipe) * episode_bytes(turns_an_episode(recipe.task), recipe.task.history, turn_tokens)


def held_episodes(recipe: Recipe) -> int:
    source, fresh = recipe.source, recipe.rollouts.prompts * recipe.rollouts.samples
    logged = source.episodes if isinstance(source, DatasetOptions) and source.player is not None else 0
    if isinstance(source, MixtureSource):
        return logged + min(source.replay, fresh * recipe.training.steps)
    return logged + (fresh if source.plays else 0)


def turns_an_episode(task: EnvironmentTask) -> int:
    """Maximum turns of an episode."""
    if isinstance(task, RandomWalksTask):
        return min(task.max_length - 1, task.max_turns) if task.stepwise else 1
    return task.max_turns


def episode_bytes(turns: int, history: int | str, turn_tokens: int) -> int:
    """Bytes of an episode. history: see `EnvironmentTask`; with "all" there is one segment, else one for each turn, which
    repeats the turns before that it shows."""
    segments, shown = (1, 1) if history == "all" else (turns, int(history))
    tokens = turns * shown * turn_tokens
    text = 2 * CHARACTERS * turns * turn_tokens
    return EPISODE + segments * SEGMENT + turns * TURN + TOKEN * tokens + text
