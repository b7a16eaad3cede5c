"""Tables of zoo.py in Markdown: what cells scored, what can be reached, and what exact values earn."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from zoo_game import optimum
from zoo_games import GAMES, SETS, half
from zoo_references import attainable, decoded, improved, random_play


def table(records: Sequence[dict[str, Any]], methods: Sequence[str], library: str | None = None) -> str:
    """Markdown: tasks x methods, mean score over seeds and the lowest; medians and counts for each set.

    methods: in the order of their columns; those without a cell are left out. library: the version of lmrl
    whose cells to show (None: that of the last record). If a cell was run several times, its last run counts.
    """
    if not records:
        return "no cells yet"
    library = library or records[-1]["version"].rsplit("-", 1)[0]
    cells = {
        (one["task"], one["method"], one["seed"]): one for one in records if one["version"].startswith(f"{library}-")
    }
    methods = [method for method in methods if any(method == cell[1] for cell in cells)]
    lines = [
        f"lmrl/ at {library}; mean score over seeds (lowest).",
        "",
        "| task | " + " | ".join(methods) + " |",
        "|---" * (len(methods) + 1) + "|",
    ]
    for which in SETS:
        tasks = [task for task in half(which) if any(task == cell[0] for cell in cells)]
        found = {
            (task, method): [one for cell, one in cells.items() if cell[:2] == (task, method)]
            for task in tasks
            for method in methods
        }
        lines += [
            f"| {task} | " + " | ".join(_entry(found[task, method]) for method in methods) + " |" for task in tasks
        ]
        for name, summary in SUMMARIES.items() if tasks else ():
            columns = [
                [one["score"] for task in tasks for one in found[task, method] if one["error"] is None]
                for method in methods
            ]
            entries = [summary(scores) if scores else "" for scores in columns]
            lines.append(f"| **{which}: {name}** | " + " | ".join(entries) + " |")
    return "\n".join(lines)


SUMMARIES = {
    "median cell": lambda scores: f"{statistics.median(scores):.2f}",
    "cells below 0.5": lambda scores: f"{sum(one < 0.5 for one in scores)} of {len(scores)}",
    "cells below 0": lambda scores: f"{sum(one < 0 for one in scores)} of {len(scores)}",
}


def _entry(records: Sequence[dict[str, Any]]) -> str:
    scores = [one["score"] for one in records if one["error"] is None]
    failed = f"{len(records) - len(scores)} failed" if len(scores) < len(records) else ""
    mean = f"{statistics.fmean(scores):.2f} ({min(scores):.2f})" if scores else ""
    return " ".join(filter(None, [mean, failed]))


def references() -> str:
    """Markdown: of each task its set, limits and exact expected returns."""
    lines = [
        "| task | set | turns | history | states | random | one step of improvement | attainable | optimum | reward scale |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for which in SETS:
        for task in half(which):
            game = GAMES[task]
            low, middle, high = random_play(game).value, improved(game).value, optimum(game)
            visible = attainable(game).value
            lines.append(
                f"| {task} | {which} | {game.turns} | {game.history} | {len(high.values[-1])} | {low:.4f} | {middle:.4f} "
                f"| {visible:.4f} | {high.value:.4f} | {game.scale:g} |"
            )
    return "\n".join(lines)


def decoding(betas: Sequence[float] = (4, 16, 64, 256)) -> str:
    """Markdown: of each task the score of decoding by the exact Q of random play, beside one step of improvement on it."""
    lines = [f"| task | set | {' | '.join(f'beta {beta:g}' for beta in betas)} |", "|---|---|" + "---|" * len(betas)]
    for which in SETS:
        for task in half(which):
            game = GAMES[task]
            low, high = random_play(game).value, improved(game).value
            scores = [(decoded(game, random_play(game), beta) - low) / (high - low) for beta in betas]
            lines.append(f"| {task} | {which} | {' | '.join(f'{score:.2f}' for score in scores)} |")
    return "\n".join(lines)
