"""Choosing the best episodes to train on."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np

from lmrl import distributed
from lmrl.trajectories.trajectory import Trajectory


def best_of(
    returns: Sequence[float | None], share: float, rng: np.random.Generator, groups: Sequence[Hashable] | None = None
) -> list[int]:
    """Indices of the share of episodes with the highest returns, at least one; ties are broken by `rng`.

    groups: each episode's group; the share is kept within each group (None: all episodes are one group).
    """
    if share == 1:
        return list(range(len(returns)))
    known = [value for value in returns if value is not None]
    assert len(known) == len(returns), "unjudged episodes cannot be ranked"
    tie_breakers = rng.permutation(len(returns))
    ranked: dict[Hashable, list[int]] = {}
    for position in sorted(range(len(returns)), key=lambda position: (-known[position], tie_breakers[position])):
        ranked.setdefault(None if groups is None else groups[position], []).append(position)
    return sorted(position for rows in ranked.values() for position in rows[: max(round(share * len(rows)), 1)])


def best_among_all(
    trajectories: list[Trajectory], share: float, rng: np.random.Generator, by_prompt: bool = False
) -> list[Trajectory]:
    """This process's part of that share of all processes' episodes with the highest returns (see best_of).

    by_prompt: take the share of each group's episodes. The result does not depend on the number of processes.
    """
    if share == 1:
        return trajectories
    everyone = sorted(distributed.all_gather([(one.group, one.episode, one.reward) for one in trajectories]))
    groups = [group for group, _, _ in everyone] if by_prompt else None
    best = {everyone[place][:2] for place in best_of([earned for *_, earned in everyone], share, rng, groups)}
    return [one for one in trajectories if (one.group, one.episode) in best]
