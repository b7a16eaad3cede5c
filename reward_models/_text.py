"""What the rewards here share."""

from __future__ import annotations


def text_of(completion) -> str:
    """A completion is text, or a list of messages where the prompt is a dialogue."""
    return completion if isinstance(completion, str) else completion[-1]["content"]
