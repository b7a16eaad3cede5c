"""Pictures of runs, comparisons and frontiers, by matplotlib: `pip install 'lmrl[plots]'`.

Each function returns a matplotlib Figure, which a notebook shows; `save` writes it.

    figure = lmrl.plots.learning_curves(["runs/a", "runs/b"], metric="optimality")
    lmrl.plots.save(figure, "curves.svg")
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmrl.errors import RecipeError, RunError, did_you_mean
from lmrl.evaluation.frames import load_run
from lmrl.extras import need
from lmrl.recipe import MAIN_STAGE

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

    from lmrl.evaluation.frontier import Frontier, Point
    from lmrl.evaluation.paired import Comparison

COLOURS = ("#4527a0", "#00897b", "#d81b60", "#f9a825", "#1e88e5", "#6d4c41")
INK, FAINT = "#37474f", "#cfd8dc"
KINDS = (".png", ".svg", ".pdf")
SIZE = (6.4, 4.0)
"""Inches."""
NEAR = (0.16, 0.05)
"""A label's width and height, as shares of the picture."""
SMOOTHED = 0.03
"""Window of the bold running mean, as a share of a curve's steps."""


def learning_curves(
    runs: str | Path | Sequence[str | Path], metric: str | None = None, stage: str = MAIN_STAGE
) -> Figure:
    """A metric of one stage of some runs, step by step: each step's value faint, a running mean bold, and evaluations
    with their 95 % intervals.

    metric: one of metrics.jsonl (default: reward). Raises RecipeError for a metric or stage that no run has.
    """
    names = [runs] if isinstance(runs, str | Path) else list(runs)
    frames = {str(name): load_run(name) for name in names}
    metric = metric or "reward"
    figure, axes = _figure("step", metric)
    labels = _short_names(list(frames))
    for number, (name, frame) in enumerate(frames.items()):
        found = _of_stage(frame, name, stage)
        if metric not in found and f"{metric}_low" not in found:
            known = [column for column in found if column not in ("stage", "step", "kind")]
            raise RecipeError(f"metric: {name} has no '{metric}' in stage '{stage}'{did_you_mean(metric, known)}")
        colour = COLOURS[number % len(COLOURS)]
        _curve(axes, found, metric, colour, _as_it_is(labels[number]))
    _finish(axes, len(frames) > 1)
    return figure


def _short_names(paths: Sequence[str]) -> list[str]:
    """The ends of paths, with as many folders as tell them apart."""
    parts = [Path(path).parts for path in paths]
    for count in range(1, max(map(len, parts), default=1)):
        names = [str(Path(*own[-count:])) for own in parts]
        if len(set(names)) == len(names):
            return names
    return list(paths)


def _as_it_is(text: str) -> str:
    """A text as matplotlib shows it unchanged: it reads mathematics between $, and legends lack what begins with _."""
    return (" " if text.startswith("_") else "") + text.replace("$", r"\$")


def _of_stage(frame: DataFrame, name: str, stage: str) -> DataFrame:
    stages = list(dict.fromkeys(frame["stage"]))
    if stage not in stages:
        raise RecipeError(f"stage: {name} has no stage '{stage}'{did_you_mean(stage, stages)}")
    return frame[frame["stage"] == stage]


def _curve(axes: Any, frame: DataFrame, metric: str, colour: str, label: str) -> None:
    """One run's steps and evaluations."""
    steps = frame[(frame["kind"] == "train") & frame[metric].notna()] if metric in frame else frame[:0]
    if len(steps):
        axes.plot(steps["step"], steps[metric], color=colour, alpha=0.25, linewidth=0.8)
        width = max(round(SMOOTHED * len(steps)), 1)
        smooth = steps[metric].rolling(width, min_periods=1, center=True).mean()
        axes.plot(steps["step"], smooth, color=colour, linewidth=1.8, label=label)
    low = f"{metric}_low"
    played = frame[(frame["kind"] == "eval") & frame[low].notna()] if low in frame else frame[:0]
    if len(played):
        mean = played[metric]
        sides = [(mean - played[low]).clip(lower=0), (played[f"{metric}_high"] - mean).clip(lower=0)]
        axes.errorbar(
            played["step"],
            mean,
            yerr=sides,
            fmt="o",
            color=colour,
            markersize=4,
            capsize=3,
            linewidth=1,
            label=None if len(steps) else label,
        )


def comparison(found: Comparison) -> Figure:
    """The differences of a comparison with their 95 % intervals, one line each; bold if the interval excludes 0."""
    rows = list(reversed(found.differences))
    metrics = list(dict.fromkeys(one.metric for one in found.differences))
    from matplotlib.figure import Figure as NewFigure

    figure = NewFigure(
        figsize=(SIZE[0], 0.7 + 0.5 * len(metrics) + 0.26 * len(rows) + 0.16 * len(found.names)), layout="constrained"
    )
    figure.suptitle(f"Differences on {_as_it_is(found.suite)}", color=INK, fontsize=11)
    heights = [sum(one.metric == metric for one in rows) + 0.8 for metric in metrics]
    panels = figure.subplots(len(metrics), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, metric in zip(panels, metrics, strict=True):
        own = [one for one in rows if one.metric == metric]
        for place, one in enumerate(own):
            settled = one.ci95[0] > 0 or one.ci95[1] < 0
            colour = COLOURS[0] if settled else "#90a4ae"
            axes.plot(one.ci95, [place, place], color=colour, linewidth=2.4 if settled else 1.6, solid_capstyle="butt")
            axes.plot([one.mean], [place], "o", color=colour, markersize=6)
        axes.axvline(0, color=INK, linewidth=0.8, linestyle=":")
        axes.set_yticks(range(len(own)), [f"{one.first} - {one.second}" for one in own])
        axes.set_ylim(-0.7, len(own) - 0.3)
        axes.set_title(_as_it_is(metric), loc="left", fontsize=9, color=INK)
        _style(axes)
    key = "\n".join(f"{letter}: {_as_it_is(name)}" for letter, name in found.names.items())
    figure.supxlabel(key, fontsize=8, color=INK, x=0.02, ha="left")
    return figure


def frontier(found: Frontier) -> Figure:
    """A run's checkpoints, score against divergence with 95 % intervals, over the curve of best-of-n."""
    figure, axes = _figure("divergence from the initial policy, nats per episode", found.metric)
    yard = found.yardstick
    axes.plot(
        [one.kl for one in yard],
        [one.score for one in yard],
        color="#90a4ae",
        linestyle="--",
        label="best-of-n of the initial policy",
    )
    axes.fill_between(
        [one.kl for one in yard],
        [one.ci95[0] for one in yard],
        [one.ci95[1] for one in yard],
        color=FAINT,
        alpha=0.5,
        linewidth=0,
    )
    for one in yard:
        if one.n > 1:
            axes.annotate(
                f"n={one.n}",
                (one.kl, one.score),
                fontsize=7,
                color="#78909c",
                xytext=(3, -9),
                textcoords="offset points",
            )
    points = found.points
    colour = COLOURS[0]
    axes.errorbar(
        [one.kl for one in points],
        [one.score for one in points],
        xerr=_sides([one.kl for one in points], [one.kl_ci95 for one in points]),
        yerr=_sides([one.score for one in points], [one.ci95 for one in points]),
        color=colour,
        fmt="o-",
        markersize=5,
        linewidth=1.4,
        elinewidth=0.8,
        capsize=2,
        label=_as_it_is(Path(found.run).name),
    )
    axes.margins(0.08)
    for point in _labelled_points(points, axes):
        axes.annotate(
            point.label, (point.kl, point.score), fontsize=7, color=colour, xytext=(5, 5), textcoords="offset points"
        )
    _finish(axes, True)
    return figure


def _labelled_points(points: Sequence[Point], axes: Any) -> list[Point]:
    """Points to label, starting with the last: those not covered by the label of a nearby point."""
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    kept: list[Point] = []
    for one in reversed(points):
        gaps = [
            (abs(one.kl - other.kl) / (right - left), abs(one.score - other.score) / (high - low)) for other in kept
        ]
        if all(across > NEAR[0] or up > NEAR[1] for across, up in gaps):
            kept.append(one)
    return kept


def _sides(middles: Sequence[float], ends: Sequence[Sequence[float]]) -> list[list[float]]:
    """Lengths of error bars to both sides."""
    pairs = list(zip(middles, ends, strict=True))
    return [
        [max(middle - low, 0.0) for middle, (low, _) in pairs],
        [max(high - middle, 0.0) for middle, (_, high) in pairs],
    ]


def save(figure: Figure, path: str | Path) -> None:
    """Write a picture: .png, .svg or .pdf by its name."""
    path = Path(path)
    check_picture(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def check_picture(path: Path) -> None:
    """Raise RunError for a file name without a picture format, or if matplotlib is missing."""
    if path.suffix not in KINDS or path.is_dir():
        raise RunError(f"--plot: '{path}' does not name a picture: end it in {', '.join(KINDS)}")
    need("matplotlib", "--plot", RunError)


def _figure(across: str, up: str) -> tuple[Figure, Any]:
    need("matplotlib", "lmrl.plots", RunError)
    from matplotlib.figure import Figure as NewFigure

    figure = NewFigure(figsize=SIZE, layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel(across, color=INK)
    axes.set_ylabel(_as_it_is(up), color=INK)
    return figure, axes


def _style(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(colors=INK, labelsize=8)
    axes.grid(color=FAINT, linewidth=0.5, alpha=0.7)
    axes.set_axisbelow(True)


def _finish(axes: Any, legend: bool) -> None:
    _style(axes)
    if legend:
        axes.legend(frameon=False, fontsize=8)
