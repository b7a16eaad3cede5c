"""The gate: online training must not lose what was learned before.

During a stage's first steps the policy is compared with the stage's initial policy, paired over start states. If the
loss certainly exceeds the limit, the run restores the best policy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from lmrl.evaluation.statistics import UNLIMITED, summarize
from lmrl.recipe import Gate


@dataclass
class GateState:
    """The gate's state, as part of a checkpoint."""

    before: list[float] = field(default_factory=list)
    """Normalised score of each start state at the start of the stage."""
    worst: float = 0.0
    """Largest mean drop measured so far, in points."""
    rollbacks: int = 0
    lr_factor: float = 1.0


def drop(before: Sequence[float], now: Sequence[float]) -> dict[str, Any]:
    """Points lost since the start of the stage: mean over start states, its 95 % interval, n. Raises if start states
    differ."""
    lost = [first - second for first, second in zip(before, now, strict=True)]
    return summarize(lost, limits=UNLIMITED, unit="start state", paired=True)


def is_due(gate: Gate, step: int) -> bool:
    """True if a step, counted from 1, is measured."""
    return step % gate.every == 0 and (gate.steps is None or step <= gate.steps)


def has_given_up(gate: Gate, state: dict[str, Any]) -> bool:
    """True if a stage with this state of the gate may not be rolled back again."""
    return GateState(**state).rollbacks >= gate.max_rollbacks


def breached(gate: Gate, lost: dict[str, Any]) -> bool:
    """True if even the low end of the interval is more than the allowed loss."""
    return bool(lost["ci95"][0] > gate.drop)
