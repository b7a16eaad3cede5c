"""Rewards for the form of a completion, to combine with a reward for its content."""

from __future__ import annotations

import re
from collections import Counter

from lmrl.reward_models._text import text_of


def format(completions: list, pattern: str, **_) -> list[float]:
    """1 if the whole completion matches a regular expression (its dot matches line breaks), else 0."""
    compiled = re.compile(pattern, re.DOTALL)
    return [float(compiled.fullmatch(text_of(completion)) is not None) for completion in completions]


def length(completions: list, low: int = 0, high: int = 200, margin: int = 50, **_) -> list[float]:
    """1 if a completion has `low` to `high` words, falling linearly to 0 at `margin` words below or above."""
    rewards = []
    for completion in completions:
        words = len(text_of(completion).split())
        off = max(low - words, words - high, 0)
        rewards.append(max(1 - off / margin, 0.0))
    return rewards


def repetition(completions: list, n: int = 3, **_) -> list[float]:
    """Minus the share of repeated word n-grams in a completion: 0 means none, near -1 all."""
    rewards = []
    for completion in completions:
        words = text_of(completion).lower().split()
        grams = Counter(tuple(words[at : at + n]) for at in range(len(words) - n + 1))
        total = sum(grams.values())
        rewards.append((len(grams) - total) / total if total else 0.0)
    return rewards


def keywords(completions: list, required: list[str] = (), forbidden: list[str] = (), **_) -> list[float]:
    """Share of the `required` words that occur, minus 1 if a `forbidden` one does; whole words, ignoring case.

    From -1 to 1; 1 if nothing is required.
    """

    def holds(text: str, word: str) -> bool:
        return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE) is not None

    rewards = []
    for completion in completions:
        text = text_of(completion)
        there = sum(holds(text, word) for word in required) / len(required) if required else 1.0
        rewards.append(there - float(any(holds(text, word) for word in forbidden)))
    return rewards
