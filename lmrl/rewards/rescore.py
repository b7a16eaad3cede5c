"""Scoring saved samples with a reward, and comparing the scores with their saved rewards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from lmrl.errors import DataError
from lmrl.rewards.rewards import RewardFunction, Scores, answer_to, by_column, score
from lmrl.trajectories.fields import json_of
from lmrl.trajectories.files import open_rows
from lmrl.trajectories.readers import Malformed, Row
from lmrl.trajectories.rows import parse

BATCH = 64
FORMATS = ("prompt", "completion", "messages", "chosen", "rejected", "reward", "rewards", "terminated")
"""Fields of logged data that hold the episode itself; all others are columns."""
OF_RUNS: tuple[str, ...] = ("stage", "step", "kind", "reward", "components", "metrics", "failure", "id", "environment")
OF_RUNS += ("group", "episode", "seed", "start", "turns", "final_observation", "terminated")
"""Fields of a run's samples.jsonl that are not columns for rewards."""


def read_samples(path: str) -> list[Row]:
    """Rows with `prompt`, `completion`, optionally `reward`, and further columns, from a run's samples or any logged
    data.

    Columns that lmrl saved under `columns` (in a run's samples and in collected episodes) become columns again.

    Raises DataError with file, line and what was expected; episodes of several turns have no single completion.
    """
    rows, samples = open_rows(path), []
    for number in range(len(rows)):
        row = rows[number]
        if row.get("prompt") is not None and row.get("completion") is not None:
            samples.append(row)
            continue
        try:
            episodes = parse(row, number)
        except Malformed as error:
            raise DataError(f"{rows.where(number)}: {error}") from error
        for episode in episodes:
            if len(episode.turns) != 1:
                raise DataError(
                    f"{rows.where(number)}: has {len(episode.turns)} turns; expected a prompt and a completion"
                )
            prompt = episode.turns[0].observation
            others = {} if "turns" in row else {name: row[name] for name in row if name not in FORMATS}
            samples.append(
                others
                | {
                    "columns": episode.columns,
                    "prompt": prompt,
                    "completion": episode.turns[0].action,
                    "reward": episode.reward,
                    "completion_cut": bool(episode.cut_turns),
                }
            )
    return samples


def columns_of(samples: Sequence[Row]) -> dict[str, list[Any]]:
    """Samples as a reward takes them: lists by column, completions as messages if the prompt is a dialogue."""
    columns = by_column([_columns(sample) for sample in samples])
    completions = [
        answer_to(sample["prompt"], sample["completion"])
        if isinstance(sample["completion"], str)
        else sample["completion"]
        for sample in samples
    ]
    return columns | {"prompts": [sample["prompt"] for sample in samples], "completions": completions}


def _columns(sample: Row) -> Row:
    """The fields of a sample that are not the episode itself; those saved under `columns` keep their names."""
    kept = json_of(sample, "columns")
    own = {name: value for name, value in sample.items() if name not in (*OF_RUNS, "prompt", "completion")}
    return {**{name: one for name, one in own.items() if name != "columns"}, **kept} if isinstance(kept, dict) else own


def rescore(function: RewardFunction, samples: Sequence[Row]) -> Scores:
    """Score samples in batches."""
    result = Scores()
    for first in range(0, len(samples), BATCH):
        result.extend(score(function, columns_of(samples[first : first + BATCH])))
    return result


def correlations(values: Sequence[float | None], saved: Sequence[float | None]) -> dict[str, float] | None:
    """Pearson's and Spearman's, over samples that have both; None if there are too few to compare."""
    pairs = np.array(
        [(a, b) for a, b in zip(values, saved, strict=True) if a is not None and b is not None], dtype=float
    )
    if len(pairs) < 3 or (pairs.std(0) == 0).any():
        return None
    ranks = np.stack([_ranks(column) for column in pairs.T])
    return {
        "pearson": float(np.corrcoef(pairs.T)[0, 1]),
        "spearman": float(np.corrcoef(ranks)[0, 1]),
        "n": len(pairs),
    }


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 0; equal values share the mean of theirs."""
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts + 1) / 2)[places]
