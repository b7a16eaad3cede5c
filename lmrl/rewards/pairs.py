"""Judges that compare two answers."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

from lmrl.errors import RewardError
from lmrl.rewards.rewards import Scores
from lmrl.rewards.workers import Failure

Verdict = float | Failure
"""The confidence that the first answer of a pair is better, from 0 to 1, or why there is none."""


def ask_pairs(call: Callable[..., Any], columns: Mapping[str, list[Any]], key: str) -> list[Verdict]:
    """Verdicts of `prefers(prompts, first, second, **columns)`, or a function of `first` and `second`; it gets the
    columns that its signature names. key: for messages. Raises RewardError."""
    parameters = inspect.signature(call).parameters
    takes_all = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters.values())
    found = list(call(**{name: column for name, column in columns.items() if takes_all or name in parameters}))
    count = len(columns["first"])
    if len(found) != count:
        raise RewardError(f"{key}: the judge answered {len(found)} of {count} pairs; expected a number for each")
    return [_verdict(value, key) for value in found]


def _verdict(value: Any, key: str) -> Verdict:
    if value is None:
        return Failure("returned None")
    if isinstance(value, Failure):
        return value
    if not isinstance(value, int | float) or not 0 <= value <= 1:
        raise RewardError(
            f"{key}: the judge answered {value!r:.40}; expected a number from 0 (the second is better) to 1"
        )
    return float(value)


def by_score(one: Scores, other: Scores) -> list[Verdict]:
    """Verdicts of a reward that scores each answer alone: the higher score wins."""
    return [
        Failure(why_a or why_b or "gave no score")
        if a is None or b is None
        else (0.5 if math.isclose(a, b, abs_tol=1e-12) else float(a > b))
        for a, b, why_a, why_b in zip(one.values, other.values, one.causes, other.causes, strict=True)
    ]
