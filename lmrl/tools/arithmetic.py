"""A calculator, for recipes that show the use of tools."""

from __future__ import annotations


def mul(a: int, b: int) -> int:
    return a * b
