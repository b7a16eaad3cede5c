"""Collapse: when a stage has certainly lost what it gained, and which checkpoint to go back to.

Nothing here judges by a single step. A window of steps has a mean and a standard error, which is the largest of three:
from the steps' scatter around their fitted line, from that scatter over the whole stage so far, and from the spread of
episodes within a step. It grows with the correlation of neighbouring steps, because ten correlated steps are worth less
than ten independent ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean as mean
from typing import Any

START, WINDOW = 5, 10
"""Number of steps that show how the stage began, and of steps in a window."""
LEAST = START + WINDOW
"""Minimum steps of a stage before it is judged."""
SURE = 5.0
"""Standard errors by which windows must differ. More than the usual 2, because the best of many windows is tested,
again at every step."""
BETTER = 2.0
"""Standard errors by which a checkpoint must be better than the kept one. A mistake only costs a checkpoint."""
KEEP, CONFIRM = 5, 3
"""Steps whose mean decides whether to keep a checkpoint, and steps for which its weights must hold up afterwards."""
FALL = 0.4
"""If nothing was gained: the drop below the start that counts as collapse, in standard deviations of an episode's
reward."""
SLIGHT, SLIGHT_YET = 0.5, 0.6
"""A loss of fewer of these standard deviations (the smallest one) is no collapse, whatever share of the gain it is; the
second applies as long as it is not known how the stage wanders."""
WANDERS = 8.0
"""Minimum loss as a multiple of the stage's usual wandering: from the best of many windows to the worst is already five
times."""
FEWEST, MEMORY = 4, 50
"""Minimum number of second differences of windows for estimating how a stage wanders, and how many are remembered."""
MOST_CORRELATED = 0.8
CLOSING = 3
"""Minimum steps of a window at the end of a stage, when no more will follow."""


@dataclass(frozen=True)
class Step:
    """A step's measurement: mean over its episodes, their standard deviation, and their number (0: unknown)."""

    mean: float
    spread: float = 0.0
    count: int = 0


@dataclass(frozen=True)
class Window:
    """Some steps together: mean, its standard error, and the standard deviation of an episode."""

    mean: float
    error: float
    spread: float


@dataclass
class Noise:
    """How steps scatter around their windows' lines, summed over all windows so far."""

    squares: float = 0.0
    products: float = 0.0
    """Sums of products of each residual with itself, and with the next."""
    steps: int = 0
    recent: list[float] = field(default_factory=list)
    """Means of the last two windows."""
    bends: list[float] = field(default_factory=list)
    """Squares of the newest second differences of window means."""

    def add(self, means: Sequence[float]) -> None:
        """Add the window that follows the previous one."""
        residuals = scatter(means)
        self.squares += math.fsum(one * one for one in residuals)
        self.products += math.fsum(one * other for one, other in zip(residuals, residuals[1:], strict=False))
        self.steps += len(residuals)
        self.recent.append(mean(means))
        if len(self.recent) == 3:
            bend = (self.recent[0] - 2 * self.recent[1] + self.recent[2]) ** 2
            self.bends = [*self.bends, bend][-MEMORY:]
            self.recent = self.recent[1:]

    @property
    def wander(self) -> float | None:
        """Standard deviation of windows around the stage's trend, from second differences, which are 0 for a steady
        rise. The two largest are left out, as the bends where learning begins and ends. None: too few windows yet."""
        if len(self.bends) < FEWEST:
            return None
        return math.sqrt(mean(sorted(self.bends)[:-2]) / 6)

    @property
    def variance(self) -> float:
        """Variance of a step around its window's line; a line costs two degrees of freedom."""
        return self.squares / self.steps * WINDOW / (WINDOW - 2) if self.steps else 0.0

    @property
    def correlation(self) -> float:
        """Correlation of neighbouring steps, in [0, MOST_CORRELATED]. Residuals of a line are correlated by about -2 /
        WINDOW if steps are not."""
        if self.steps < 2 * WINDOW or self.squares == 0:
            return 0.0
        found = self.products / self.squares * WINDOW / (WINDOW - 1)
        return min(max(found + (2 + 4 * max(found, 0.0)) / WINDOW, 0.0), MOST_CORRELATED)


def scatter(values: Sequence[float]) -> list[float]:
    """Values minus their fitted line, or minus their mean if there are fewer than three."""
    count, middle = len(values), (len(values) - 1) / 2
    centre = math.fsum(values) / count
    slope = 0.0
    if count > 2:
        run = math.fsum((place - middle) ** 2 for place in range(count))
        slope = math.fsum((place - middle) * value for place, value in enumerate(values)) / run
    return [value - centre - slope * (place - middle) for place, value in enumerate(values)]


def window_of(steps: Sequence[Step], noise: Noise) -> Window:
    """Combine steps into a window; see the top of this file for the error."""
    count = len(steps)
    means = [one.mean for one in steps]
    own = math.fsum(one * one for one in scatter(means)) / (count - 2) if count > 2 else 0.0
    within = mean(one.spread**2 / one.count if one.count else 0.0 for one in steps)
    variance = max(own, noise.variance, within)
    spread = math.sqrt(mean(one.spread**2 for one in steps))
    grown = (1 + noise.correlation) / (1 - noise.correlation)
    return Window(mean(means), math.sqrt(variance * grown / count), spread)


def certainly_above(high: Window, low: Window, sure: float = SURE) -> bool:
    return high.mean - low.mean > sure * math.hypot(high.error, low.error)


def has_collapsed(start: Window, best: Window | None, last: Window, wander: float | None) -> bool:
    """True if most of what was certainly gained since the start is certainly lost: the last window lies below the
    middle of start and best. If nothing was gained: if it lies certainly below the start, and by FALL standard
    deviations of an episode's reward.

    best: the highest window so far (None: there is none yet). wander: see `Noise`.
    """
    spread = max(start.spread, last.spread)
    if best is not None and certainly_above(best, start):
        middle = Window((start.mean + best.mean) / 2, math.hypot(start.error, best.error) / 2, spread)
        least = (SLIGHT_YET if wander is None else SLIGHT) * min(start.spread, best.spread, last.spread)
        return best.mean - last.mean > max(least, WANDERS * (wander or 0.0)) and certainly_above(middle, last)
    fallen = start.mean - last.mean > max(FALL * spread, WANDERS * (wander or 0.0))
    return fallen and certainly_above(start, last)


def is_ruined(first: Sequence[Step], last: Sequence[Step]) -> bool:
    """True if each of the last steps is worse than every one of the first, certainly and by FALL standard deviations of
    an episode's reward.

    By the scatter of these steps alone: a sharp rise and fall between them would count as the stage's noise.
    """
    if max(one.mean for one in last) >= min(one.mean for one in first):
        return False
    start, newest = window_of(first, Noise()), window_of(last, Noise())
    return start.mean - newest.mean > FALL * max(start.spread, newest.spread) and certainly_above(start, newest)


@dataclass(frozen=True)
class RollbackPoint:
    """A checkpoint to roll back to: its step, and the window of steps before it (None: the start of the stage)."""

    step: int
    window: Window | None = None


@dataclass
class Tracker:
    """Follows a measurement (higher is better), and says when it has collapsed and which checkpoint to roll back to."""

    every: int = KEEP
    """Minimum steps between checkpoints."""
    first: list[Step] = field(default_factory=list)
    last: list[Step] = field(default_factory=list)
    """The first START steps, and the last WINDOW since the stage began or was rolled back."""
    windows: list[Window] = field(default_factory=list)
    """The windows that still overlap with the last one."""
    best: Window | None = None
    noise: Noise = field(default_factory=Noise)
    older: list[float] = field(default_factory=list)
    """Means of steps that have left `last`, until they form a window for `noise`. Newer steps would hide a collapse."""
    kept: RollbackPoint = field(default_factory=lambda: RollbackPoint(0))
    candidate: RollbackPoint | None = None
    """A newer checkpoint, whose weights have not yet played for long enough."""
    seen: int = 0
    """Steps since the candidate."""

    def add(self, step: int, measured: Step) -> None:
        """Add a step's measurement, and decide on a checkpoint after it: if one is wanted, `candidate.step` is this
        step."""
        if len(self.first) < START:
            self.first.append(measured)
        self.last.append(measured)
        if len(self.last) > WINDOW:
            self.older.append(self.last.pop(0).mean)
        if len(self.older) == WINDOW:
            self.noise.add(self.older)
            self.older = []
        if len(self.last) == WINDOW:
            self.windows.append(window_of(self.last, self.noise))
            if len(self.windows) > WINDOW:
                ended = self.windows.pop(0)
                if self.best is None or ended.mean > self.best.mean:
                    self.best = ended
        self._confirm()
        self._propose(step)

    @property
    def start(self) -> Window:
        return window_of(self.first, self.noise)

    @property
    def gained(self) -> bool:
        """True if the newest window is certainly better than the start."""
        return len(self.last) == WINDOW and certainly_above(window_of(self.last, self.noise), self.start)

    def collapsed(self, closing: bool = False) -> bool:
        """True if the last window shows a collapse. closing: at the end of a stage, when fewer steps must suffice."""
        if len(self.first) < START:
            return False
        sizes = (CLOSING, (CLOSING + WINDOW) // 2, WINDOW) if closing else (WINDOW,)
        return any(self._has_collapsed(size) for size in sizes if len(self.last) >= size)

    def _has_collapsed(self, size: int) -> bool:
        best = self.best
        for window in self.windows[: len(self.windows) - size]:  # those that end before the newest window begins
            best = window if best is None or window.mean > best.mean else best
        last, wander = window_of(self.last[-size:], self.noise), self.noise.wander
        # The window before any update: the first update may already have been too much.
        begun = window_of(self.first[:1], self.noise)
        return (
            has_collapsed(self.start, best, last, wander)
            or has_collapsed(begun, None, last, wander)
            or (size == WINDOW and is_ruined(self.first, self.last))
        )

    def loss(self) -> str:
        """The loss, in words."""
        last = window_of(self.last[-WINDOW:], self.noise)
        best = max((one for one in (self.best, *self.windows) if one), key=lambda one: one.mean, default=self.start)
        return f"collapse from {best.mean:.3g} to {last.mean:.3g} (at the start {self.start.mean:.3g})"

    def taken_back(self, step: int) -> None:
        """The stage continues from a step's checkpoint: measurements of other weights are dropped."""
        if step != self.kept.step:  # another listener has rolled it back
            self.kept = RollbackPoint(step)
        self.last, self.older, self.windows, self.candidate, self.seen = [], [], [], None, 0
        self.best, self.noise.recent = self.kept.window, []

    def _confirm(self) -> None:
        """Accept the candidate once its weights have held up, or drop it if they have not."""
        if self.candidate is None:
            return
        self.seen += 1
        if self.seen < CONFIRM:
            return
        played = window_of(self.last[-CONFIRM:], self.noise)
        window = self.candidate.window
        assert window is not None, "a candidate has steps before it"
        if not certainly_above(window, played, BETTER):
            self.kept = self.candidate
        self.candidate, self.seen = None, 0

    def _propose(self, step: int) -> None:
        """Propose a checkpoint of this step if the last steps are certainly better than those of the kept one."""
        if self.candidate is not None or len(self.last) < KEEP or step - self.kept.step < self.every:
            return
        newest = window_of(self.last[-KEEP:], self.noise)
        if certainly_above(newest, self.kept.window or self.start, BETTER):
            self.candidate = RollbackPoint(step, newest)

    # ---------------------------------------------------------------------------------------------------------- state
    def state(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of(cls, state: dict[str, Any]) -> Tracker:
        """From the output of `state`, as JSON."""
        return cls(
            **state
            | {
                "first": [Step(**one) for one in state["first"]],
                "last": [Step(**one) for one in state["last"]],
                "windows": [Window(**one) for one in state["windows"]],
                "best": _window(state["best"]),
                "noise": Noise(**state["noise"]),
                "kept": _kept(state["kept"]),
                "candidate": state["candidate"] and _kept(state["candidate"]),
            }
        )


def _window(state: dict[str, float] | None) -> Window | None:
    return None if state is None else Window(**state)


def _kept(state: dict[str, Any]) -> RollbackPoint:
    return RollbackPoint(state["step"], _window(state["window"]))
