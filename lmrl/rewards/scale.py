"""Normalising and clipping the scores of a reward."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal


class Scale:
    """(score - mean) / std with fixed or running statistics, then clipping.

    Running statistics are those of all training samples so far, including the current ones (Welford's method in
    batches, Chan et al., 1983). Evaluation samples neither update them nor are they scaled: comparisons over time need
    a fixed scale.
    """

    def __init__(
        self,
        normalize: Literal["running"] | tuple[float, float] | None = None,
        clip: tuple[float, float] | None = None,
    ):
        self.normalize, self.clip = normalize, clip
        self.count, self.mean, self.squares = 0, 0.0, 0.0
        """Samples so far, their mean, and the sum of squared deviations from it."""
        self.first: tuple[float, float] | None = None
        """Mean and standard deviation of the first step's samples."""

    @property
    def is_running(self) -> bool:
        return self.normalize == "running"

    def __call__(self, scores: Sequence[float | None], learning: bool = False) -> list[float | None]:
        """Scores on the new scale; None stays None."""
        if self.is_running and not learning:
            return list(scores)
        mean, std = 0.0, 1.0
        if self.is_running:
            from lmrl import distributed  # imports torch, which reward workers do without

            self._follow(distributed.all_gather([score for score in scores if score is not None]))
            mean, std = self.mean, math.sqrt(self.squares / self.count) if self.squares > 0 else 1.0
            if self.first is None and self.count:
                self.first = mean, std
        elif isinstance(self.normalize, tuple):
            mean, std = self.normalize
        return self._scaled(scores, mean, std)

    def steady(self, scores: Sequence[float | None]) -> list[float | None]:
        """Training samples by the statistics of the first step, so that steps can be compared."""
        return self._scaled(scores, *(self.first or (0.0, 1.0)))

    def _scaled(self, scores: Sequence[float | None], mean: float, std: float) -> list[float | None]:
        low, high = self.clip or (-math.inf, math.inf)
        return [None if score is None else min(max((score - mean) / std, low), high) for score in scores]

    def _follow(self, scores: list[float]) -> None:
        if not scores:
            return
        mean = math.fsum(scores) / len(scores)
        squares = math.fsum((score - mean) ** 2 for score in scores)
        total, gap = self.count + len(scores), mean - self.mean
        self.squares += squares + gap * gap * self.count * len(scores) / total
        self.mean += gap * len(scores) / total
        self.count = total

    def state(self) -> dict[str, Any]:
        return {"count": self.count, "mean": self.mean, "squares": self.squares, "first": self.first}

    def load_state(self, state: dict[str, Any]) -> None:
        self.count, self.mean, self.squares = state["count"], state["mean"], state["squares"]
        self.first = tuple(state["first"]) if state.get("first") else None
