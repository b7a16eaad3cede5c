"""Helpers shared by the rewards of this folder."""

from __future__ import annotations


def text_of(completion) -> str:
    """Text of a completion, which is a list of messages if the prompt is a dialogue."""
    return completion if isinstance(completion, str) else completion[-1]["content"]
