"""Choosing a stage's result: the last policy, unless an earlier one was significantly better.

Two policies that have played the same episodes are compared by their differences: one per prompt or drawn start state,
since a policy should be better on new ones as well; or one per episode if all existing start states were played. The
earlier policy was picked as the best of several, so chance had that many tries to make it look better (Bonferroni's
correction).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from lmrl.evaluation.scoring import named_values
from lmrl.evaluation.t_distribution import upper_tail
from lmrl.trajectories.trajectory import Trajectory

LEVEL = 0.025
"""Probability of choosing an earlier policy that is no better than the last (the significance level)."""
PAIRS = 5
"""Minimum number of pairs; with fewer start states, their episodes are the pairs."""


def paired_values(trajectories: Sequence[Trajectory], metric: str, by_episode: bool = False) -> dict[str, float]:
    """A metric's mean for each start state, or its value for each episode if wanted or if there are fewer start states
    than PAIRS."""
    groups: dict[int, dict[int, float]] = {}
    for one in trajectories:
        value = dict(named_values(one)).get(metric)
        if value is not None:
            groups.setdefault(one.group, {})[one.episode] = value
    if by_episode or len(groups) < PAIRS:
        return {f"{group}/{episode}": value for group, found in groups.items() for episode, value in found.items()}
    return {str(group): sum(found.values()) / len(found) for group, found in groups.items()}


def certainly_better(earlier: Mapping[str, float], last: Mapping[str, float], tries: int) -> bool:
    """True if the earlier policy, the best of `tries`, scores significantly higher than the last, over the keys that
    both have."""
    gains = [value - last[name] for name, value in earlier.items() if name in last]
    return len(gains) >= PAIRS and chance(gains) < LEVEL / max(tries, 1)


def chance(gains: Sequence[float]) -> float:
    """One-sided p-value of Student's t-test that the mean of two or more values is above 0."""
    count = len(gains)
    mean = math.fsum(gains) / count
    variance = math.fsum((gain - mean) ** 2 for gain in gains) / (count - 1)
    if variance == 0:
        return 0.0 if mean > 0 else 1.0
    return upper_tail(mean / math.sqrt(variance / count), count - 1)
