"""A calculator, for recipes that demonstrate tool use."""

from __future__ import annotations


def mul(a: int, b: int) -> int:
    return a * b
