"""Pairs of a chosen and a rejected completion, read from a file and split into those to train on and those held out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lmrl.errors import DataError, counted
from lmrl.seeding import stream
from lmrl.trajectories.files import Selection, open_rows
from lmrl.trajectories.formats import equal_pairs_note, preference
from lmrl.trajectories.readers import Malformed
from lmrl.trajectories.store import report_bad_rows
from lmrl.trajectories.trajectory import Messages, prompt_key


@dataclass
class Pair:
    """A preference: two completions of a prompt, all text or all messages."""

    prompt: str | Messages
    chosen: str | Messages
    rejected: str | Messages


def read_pairs(
    path: str, part: Selection = Selection(), skip_bad_rows: bool = False, bad_rows: Path | None = None
) -> tuple[list[Pair], list[str]]:
    """The preferences in a file of any format of rows.py that has them, and notes on what was left out.

    Raises DataError with file, line, field and what was expected, unless malformed rows are skipped.
    """
    rows = open_rows(path, part)
    pairs: list[Pair] = []
    bad: list[tuple[int, str]] = []
    equal: list[int] = []
    for number, row in enumerate(rows.scan()):
        try:
            if isinstance(row, Malformed):
                raise row
            pair = Pair(*preference(row))
        except Malformed as error:
            if not skip_bad_rows:
                raise DataError(f"{rows.where(number)}: {error}") from error
            bad.append((number, str(error)))
            continue
        pairs.append(pair)
        if pair.chosen == pair.rejected:
            equal.append(number)
    notes = [f"{path}: left out {counted(len(bad), f'malformed {rows.unit}')} (see {bad_rows})"] if bad else []
    if equal:
        notes.append(equal_pairs_note(len(equal), rows.where(equal[0])))
    if bad and bad_rows is not None:
        report_bad_rows(rows, bad, bad_rows)
    return pairs, notes


def split_pairs(
    pairs: Sequence[Pair], share: float, is_reserved: Callable[[str | Messages], bool] = lambda prompt: False
) -> tuple[list[int], list[int]]:
    """Positions of the pairs to train on and to hold out: that share of the prompts, with all their pairs.

    Reserved prompts are held out first, and further ones by a fixed draw that depends on nothing but their number.
    Raises DataError if nothing is left to train on.
    """
    by_prompt: dict[str, list[int]] = {}
    for position, pair in enumerate(pairs):
        by_prompt.setdefault(prompt_key(pair.prompt), []).append(position)
    held = {name for name, found in by_prompt.items() if is_reserved(pairs[found[0]].prompt)}
    others = [name for name in by_prompt if name not in held]
    missing = round(share * len(by_prompt)) - len(held)
    if share > 0 and not held:
        missing = max(missing, 1)
    if missing > 0:
        order = stream("holdout", len(others)).permutation(len(others))
        held |= {others[index] for index in order[:missing]}
    train = sorted(position for name, found in by_prompt.items() if name not in held for position in found)
    if not train:
        raise DataError(
            f"none of {len(pairs)} pairs is left to train on, because {len(held)} of {len(by_prompt)} prompts are held "
            "out: lower objective.holdout or task.prompts.holdout, or give more pairs"
        )
    return train, sorted(position for name in held for position in by_prompt[name])
