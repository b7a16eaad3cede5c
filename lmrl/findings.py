"""Findings of checks of rewards and environments, and their display in a terminal."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from lmrl.visible import plain_console, visible


@dataclass
class Finding:
    """The finding of one check. passed: None for a note that is neither good nor bad."""

    name: str
    passed: bool | None
    detail: str


def show(findings: Iterable[Finding], well: str) -> list[Finding]:
    """Print findings as they arrive, and return them. well: printed if none has failed."""
    from rich.text import Text

    console, made = plain_console(), []
    for finding in findings:
        made.append(finding)
        mark, style = {True: ("ok", "green"), False: ("FAILED", "bold red"), None: ("note", "yellow")}[finding.passed]
        console.print(Text.assemble((f"{mark:7}", style), f"{finding.name}: {visible(finding.detail)}"), soft_wrap=True)
    failed = sum(finding.passed is False for finding in made)
    console.print(f"{failed} of {len(made)} checks failed" if failed else well)
    return made
