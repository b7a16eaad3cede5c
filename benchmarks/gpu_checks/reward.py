"""The reward of the measured runs."""

from __future__ import annotations

from typing import Any


def length_reward(completions: list[str], **_: Any) -> list[float]:
    return [float(len(text)) for text in completions]
