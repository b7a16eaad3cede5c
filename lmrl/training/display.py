"""The terminal during a run: a live display, or plain lines without a terminal."""

from __future__ import annotations

import html
import math
import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column, Table
from rich.text import Text

from lmrl.trajectories.trajectory import Trajectory
from lmrl.visible import plain_console, visible

SHOWN = ("reward", "kl", "nll", "entropy", "approx_kl", "accuracy", "margin", "length")
TROUBLES = ("failed", "skipped")
"""Counts that are shown only if they are not 0."""
PLAIN_EVERY_SECONDS = 2.0
NARROW, WIDE = 80, 110
"""Minimum terminal widths, in columns, for a bar next to measures, and for one of full length."""
ROUNDING = 1e-12
"""Share of a number below which its error is only that of float arithmetic."""
LOPSIDED = 0.2
"""Asymmetry of an interval, as a share of its width, from which on both ends are shown."""


class Display:
    """Progress, scores, samples and tables of a run."""

    def __init__(self, console: Console | None = None):
        self.console = console or plain_console()
        self._progress: Progress | None = None
        self._task: Any = None
        self._stage, self._steps, self._last = "", 0, 0.0
        self._began, self._done = 0.0, 0
        self._bar: NotebookBar | None = None

    def say(self, text: str, whole: bool = False, style: str = "") -> None:
        """Print a line, wrapped between words in a terminal. whole: do not wrap, so that commands and paths can be
        copied."""
        self.console.print(Text(visible(text), style=style), soft_wrap=whole or not self.console.is_terminal)

    def begin(self, stage: str, label: str, steps: int, done: int) -> None:
        self._stage, self._steps = f"{stage} ({label})", steps
        self._began, self._done = time.monotonic(), done
        if self.console.is_jupyter:
            self._bar = NotebookBar(self._stage, steps, done)
        elif self.console.is_terminal and not self.console.is_dumb_terminal and self.console.width >= NARROW:
            self._progress = Progress(
                TextColumn("[bold]{task.description}", table_column=Column(no_wrap=True)),
                BarColumn(bar_width=24 if self.console.width >= WIDE else 8),
                MofNCompleteColumn(table_column=Column(no_wrap=True)),
                TimeElapsedColumn(table_column=Column(no_wrap=True)),
                TextColumn("{task.fields[left]}", table_column=Column(no_wrap=True)),
                # This column wraps onto a second line if there is no room.
                TextColumn("{task.fields[metrics]}", table_column=Column(no_wrap=False)),
                console=self.console,
            )
            self._task = self._progress.add_task(self._stage, total=steps, completed=done, left="", metrics="")
            self._progress.start()

    def steps_begin(self) -> None:
        """Measure the pace from here: what a stage does first, such as an evaluation, is done once."""
        self._began = time.monotonic()

    def end(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
        self._bar = None

    def step(self, step: int, metrics: dict[str, Any]) -> None:
        shown = [name for name in SHOWN if metrics.get(name) is not None] + [
            one for one in TROUBLES if metrics.get(one)
        ]
        text = "  ".join(f"{name} {short(metrics[name])}" for name in shown)
        now = time.monotonic()
        left = f"{time_left(now - self._began, step - self._done, self._steps - step)} left"
        if self._bar is not None:
            self._bar.update(step, f"{left}  {text}")
        elif self._progress is not None:
            self._progress.update(self._task, completed=step, left=left, metrics=text)
        elif step in (1, self._steps) or now - self._last > PLAIN_EVERY_SECONDS:
            self._last = now
            self.say(f"{self._stage} {step}/{self._steps}  {left}  {text}")

    def score(self, step: int, metrics: dict[str, dict[str, Any]]) -> None:
        text = "  ".join(f"{name} {interval(score)}" for name, score in metrics.items())
        self.say(f"{self._stage} evaluation at step {step}: {text}")

    def samples(self, trajectories: list[Trajectory], count: int) -> None:
        """Show some of these episodes, from different prompts if there are several."""
        for trajectory in spread_out(trajectories, count):
            reward = "not judged" if trajectory.reward is None else fixed(trajectory.reward)
            line = Text(f"  [{reward}] ", style="cyan")
            line.append(shorten(trajectory.prompt, 200), style="dim")
            line.append(" -> ", style="dim")
            line.append(shorten(trajectory.completion, 400), style="default")
            self.console.print(line, soft_wrap=True)

    def table(self, title: str, rows: dict[str, dict[str, dict[str, Any]]]) -> None:
        """Rows of scores side by side, each with its 95 % interval."""
        self.grid(title, score_lines(rows), "mean ± half width of the 95 % interval, or its ends")
        if scope := scope_of(rows):
            self.say(f"95 % intervals hold for {scope}")

    def number_table(self, title: str, heads: list[str], rows: dict[str, list[float]]) -> None:
        """A table of numbers, with one column per heading."""
        lines = [[name, *("" if math.isnan(value) else short(value) for value in row)] for name, row in rows.items()]
        self.grid(title, [["", *heads], *lines])

    def grid(self, title: str, lines: list[list[str]], caption: str = "") -> None:
        """A table whose first line and first column are names. Where it is too wide for its cells to stay in one piece,
        its lines become columns, if that helps."""
        wide, upright = grid(lines), grid(list(map(list, zip(*lines, strict=True))))
        unlimited, room = self.console.options.update(max_width=10_000), self.console.width
        least, whole = self.console.measure(wide, options=unlimited)
        turns = whole > room and self.console.measure(upright, options=unlimited).maximum <= room
        # Title and caption are lines of their own: a table's would wrap at its width.
        self.say(title, style="italic")
        self.console.print(upright if turns or least > room else wide)
        if caption:
            self.say(caption, style="dim italic")


class NotebookBar:
    """The progress of a stage in a notebook's cell: one output that is replaced at each step (rich would need
    ipywidgets)."""

    def __init__(self, label: str, steps: int, done: int):
        from IPython.display import HTML, display

        self.label, self.steps, self.html = label, steps, HTML
        self.output = display(HTML(self.drawn(done, "")), display_id=True)

    def update(self, step: int, text: str) -> None:
        self.output.update(self.html(self.drawn(step, text)))

    def drawn(self, step: int, text: str) -> str:
        """The bar as HTML."""
        words = html.escape(f"{self.label} {step}/{self.steps}  {text}")
        return f'<pre><progress value="{step}" max="{self.steps}"></progress> {words}</pre>'


def spread_out(trajectories: Sequence[Trajectory], count: int) -> list[Trajectory]:
    """Some of these episodes, from different prompts if there are several."""
    stride = max(len(trajectories) // max(count, 1), 1)
    return list(trajectories[::stride][:count])


def score_lines(rows: dict[str, dict[str, dict[str, Any]]]) -> list[list[str]]:
    """Rows of scores as lines of cells, the heading first. n: the number of values of a row's first metric; others show
    their own."""
    names = list(dict.fromkeys(name for scores in rows.values() for name in scores))
    lines = [["", *names, "n"]]
    for label, scores in rows.items():
        count = next((score["n"] for score in scores.values()), "")
        cells = [counted_interval(scores.get(name), count) for name in names]
        lines.append([label, *cells, str(count)])
    return lines


def counted_interval(score: dict[str, Any] | None, count: int | str) -> str:
    """A cell of a score, with its number of values if that is not `count`; empty without a score."""
    if score is None:
        return ""
    return interval(score) + (f" (n {score['n']})" if score["n"] != count else "")


def grid(lines: list[list[str]]) -> Table:
    """Lines of cells as a table, the heading first."""
    head, *body = lines
    table = Table()
    for name in head:
        table.add_column(name, justify="right" if name else "left", overflow="fold")
    for line in body:
        table.add_row(*line)
    return table


def scope_of(rows: dict[str, dict[str, dict[str, Any]]]) -> str:
    """The population that a table's intervals hold for, by row if rows differ; scores of older runs lack it."""
    scopes = {
        label: " or ".join(dict.fromkeys(score["holds_for"] for score in scores.values() if "holds_for" in score))
        for label, scores in rows.items()
    }
    scopes = {label: scope for label, scope in scopes.items() if scope}
    if len(set(scopes.values())) <= 1:
        return next(iter(scopes.values()), "")
    labels = {scope: " / ".join(label for label, own in scopes.items() if own == scope) for scope in scopes.values()}
    return "; ".join(f"{scope} ({own})" for scope, own in labels.items())


def interval(score: dict[str, Any]) -> str:
    """Mean ± half width of its interval; both ends if the mean is not in the middle, for instance near a limit."""
    mean, (low, high) = score["mean"], score["ci95"]
    half = (high - low) / 2
    places = decimals(mean, half)
    if low == high and ("holds_for" not in score or score.get("n") == 1):  # exact, or nothing is known of the spread
        return fixed(mean)
    if abs((high - mean) - (mean - low)) > LOPSIDED * (high - low):
        return f"{mean:.{places}f} [{low:.{places}f}, {high:.{places}f}]"
    return f"{mean:.{places}f} ± {half:.{places}f}"


def short(value: float) -> str:
    """A number with three digits, or all those before the point: rewards may differ little, far from zero."""
    return f"{value:.0f}" if 999.5 <= abs(value) < 1e7 else f"{value:.3g}"


def fixed(value: float) -> str:
    """A number with three decimals, or more if it is small."""
    return f"{value:.{decimals(value)}f}"


def decimals(value: float, error: float = 0.0) -> int:
    """Three, or as many as show two digits of a number's error (0: of the number itself)."""
    size = error if error > ROUNDING * abs(value) else abs(value)
    return max(3, 1 - math.floor(math.log10(size))) if 0 < size < math.inf else 3


def shorten(text: str, width: int) -> str:
    text = visible(" ".join(str(text).split()))
    return text if len(text) <= width else text[: width - 1] + "…"


def time_left(seconds: float, done: int, left: int) -> str:
    """Time for `left` more steps at the pace so far: `0:07`, `1:02:03`."""
    hours, rest = divmod(round(seconds / max(done, 1) * left), 3600)
    minutes, seconds = divmod(rest, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
