"""Claims on the difference of two policies, as `--fail-under` takes them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from lmrl.errors import RecipeError

CLAIM = re.compile(
    r"\s*(?:(?P<metric>[^:]+?)\s*:)?\s*(?P<first>[A-Z])\s*-\s*(?P<second>[A-Z])\s*(?P<sign>[<>])\s*(?P<margin>[-+]?[0-9.]+(?:[eE][-+]?[0-9]+)?)\s*"
)


@dataclass(frozen=True)
class Claim:
    """`B - A > -0.01`: what the interval of a difference has to exclude. first: the later letter, so that a difference
    written the other way round is the same test. metric: None for the main one."""

    text: str
    first: str
    second: str
    sign: str
    margin: float
    metric: str | None = None


def read_claim(text: str) -> Claim:
    """`B - A > -0.01`, or `METRIC: B - A > -0.01`. Raises RecipeError."""
    match = CLAIM.fullmatch(text)
    margin = _number(match["margin"]) if match else None
    if match is None or margin is None or match["first"] == match["second"]:
        raise RecipeError(
            f"--fail-under: '{text}' compares no two policies: write 'B - A > -0.01', maybe with a metric, "
            "'length: B - A < 20'"
        )
    if match["first"] > match["second"]:
        return Claim(text.strip(), match["first"], match["second"], match["sign"], margin, match["metric"])
    sign = "<" if match["sign"] == ">" else ">"
    return Claim(text.strip(), match["second"], match["first"], sign, -margin, match["metric"])


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def check_claims(claims: Sequence[Claim], keys: Sequence[str]) -> None:
    """Raise RecipeError for a claim on a policy that there is not."""
    for claim in claims:
        for key in (claim.first, claim.second):
            if key not in keys:
                raise RecipeError(f"--fail-under: '{claim.text}' names {key}, but the policies are {', '.join(keys)}")
