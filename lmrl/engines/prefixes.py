"""Common beginnings of prompts."""

from __future__ import annotations

from collections.abc import Sequence

WORTHWHILE = 16
"""Minimum tokens of a shared beginning for it to be computed once, or copied from a sequence that continues
differently."""


def common(one: Sequence[int], other: Sequence[int], most: int) -> int:
    """Length of the common prefix of two sequences, at most `most`."""
    if one[:most] == other[:most]:
        return most
    return next(place for place in range(most) if one[place] != other[place])


def shared_beginning(prompts: Sequence[list[int]]) -> int:
    """Length of the common prefix of distinct prompts, shorter than each of them; 0 if all are equal."""
    first, last = min(prompts), max(prompts)  # all others lie between them, and share what these two do
    if first == last:
        return 0
    return common(first, last, min(map(len, prompts)) - 1)
