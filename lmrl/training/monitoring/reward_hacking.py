"""Detecting reward hacking: the trained reward rises while a reward that is only watched falls.

Gao et al., "Scaling laws for reward model overoptimization" (arXiv 2210.10760): the trained reward keeps rising while
the true objective falls. A reward of weight 0 is not trained on, so it shows the difference.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import mean, variance

WINDOW = 10
"""Steps in each of the two windows that are compared."""
THRESHOLD = 2.0
"""Standard errors by which the two windows must differ."""
COLUMNS = 6
TRAINED = "reward"


class RewardHackingDetector:
    """Keeps the metrics of every step's fresh episodes and says when they suggest reward hacking.

    watched: labels of the rewards that are not trained on.
    """

    def __init__(self, watched: Sequence[str]):
        self.watched = [f"reward/{name}" for name in watched]
        self.steps: list[int] = []
        self.series: dict[str, list[float]] = {}
        self.warned: set[str] = set()

    def add(self, step: int, measures: dict[str, float]) -> list[str]:
        """Add a step's metrics; returns new warnings."""
        for name, value in measures.items():
            self.series.setdefault(name, [math.nan] * len(self.steps)).append(value)
        self.steps.append(step)
        for series in self.series.values():
            series += [math.nan] * (len(self.steps) - len(series))
        return [text for name in self.watched if name not in self.warned and (text := self._warning(name))]

    def _warning(self, name: str) -> str | None:
        """Compare the newest window with the one in which the watched reward was highest."""
        rows = [
            row
            for row in zip(self.series.get(name, ()), self.series.get(TRAINED, ()), strict=True)
            if not any(map(math.isnan, row))
        ]
        if len(rows) < 2 * WINDOW:
            return None
        windows = [rows[first : first + WINDOW] for first in range(0, len(rows) - 2 * WINDOW + 1)]
        best = max(windows, key=lambda window: mean(row[0] for row in window))
        last = rows[-WINDOW:]
        fell = difference([row[0] for row in best], [row[0] for row in last])
        rose = difference([row[1] for row in best], [row[1] for row in last])
        if not (fell < -THRESHOLD and rose > THRESHOLD):
            return None
        self.warned.add(name)
        held = [mean(row[0] for row in window) for window in (best, last)]
        trained = [mean(row[1] for row in window) for window in (best, last)]
        return (
            f"{name} is watched and falls ({held[0]:.3g} -> {held[1]:.3g}) while the trained reward rises "
            f"({trained[0]:.3g} -> {trained[1]:.3g}): possible reward hacking; look at samples.jsonl"
        )

    def table(self) -> tuple[list[str], dict[str, list[float]]]:
        """The run in at most COLUMNS spans of steps: the spans' names, and each metric's mean in each span."""
        parts = min(COLUMNS, len(self.steps))
        bounds = [len(self.steps) * part // parts for part in range(parts + 1)]
        spans = list(zip(bounds, bounds[1:], strict=False))
        heads = [
            str(self.steps[low]) if high - low == 1 else f"{self.steps[low]}-{self.steps[high - 1]}"
            for low, high in spans
        ]
        rows = {}
        for name, series in self.series.items():
            known = [[value for value in series[low:high] if not math.isnan(value)] for low, high in spans]
            rows[name] = [mean(values) if values else math.nan for values in known]
        return heads, rows


def difference(one: Sequence[float], other: Sequence[float]) -> float:
    """The mean of `other` minus that of `one`, in standard errors of the difference (Welch)."""
    error = math.sqrt(variance(one) / len(one) + variance(other) / len(other))
    gap = mean(other) - mean(one)
    return gap / error if error > 0 else math.copysign(math.inf, gap) if gap else 0.0
