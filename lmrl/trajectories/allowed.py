"""Restricted actions: which tokens the sampler could choose from, if not the whole vocabulary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

AllowedTokens = tuple[int, ...]
"""Ids of the tokens that could be chosen, in ascending order. Equal sets should be one object: they are stored once."""


@dataclass
class Allowed:
    """The restricted actions of a microbatch, R of its N, each with one of S sets of tokens; U tokens are in at least
    one set."""

    rows_R: torch.Tensor
    """Which of the N actions are restricted, in ascending order."""
    sets_R: torch.Tensor
    """Index of the set of each restricted action."""
    tokens_U: torch.Tensor
    """Token ids, in ascending order."""
    members_SU: torch.Tensor
    """True if the token is in the set."""

    @classmethod
    def of(cls, restricted: Mapping[int, AllowedTokens]) -> Allowed | None:
        """Tensors from the set of each restricted action, by the action's index; None if there are none."""
        if not restricted:
            return None
        rows = sorted(restricted)
        numbers: dict[AllowedTokens, int] = {}
        sets = [numbers.setdefault(restricted[row], len(numbers)) for row in rows]
        tokens_U = torch.tensor(sorted({token for tokens in numbers for token in tokens}), dtype=torch.long)
        members_SU = torch.zeros(len(numbers), len(tokens_U), dtype=torch.bool)
        for number, tokens in enumerate(numbers):
            members_SU[number, torch.searchsorted(tokens_U, torch.tensor(tokens))] = True
        return cls(torch.tensor(rows), torch.tensor(sets), tokens_U, members_SU)

    def columns(self, targets_R: torch.Tensor) -> torch.Tensor:
        """Positions of the targets among `tokens_U`, in the same shape."""
        return torch.searchsorted(self.tokens_U, targets_R)


def shifted(parts: Sequence[Mapping[int, AllowedTokens]], lengths: Sequence[int]) -> dict[int, AllowedTokens]:
    """The sets of concatenated sequences, with shifted indices. lengths: actions of each sequence."""
    whole: dict[int, AllowedTokens] = {}
    first = 0
    for part, length in zip(parts, lengths, strict=True):
        whole |= {first + action: tokens for action, tokens in part.items()}
        first += length
    return whole


def to_table(restricted: Mapping[int, AllowedTokens]) -> dict[str, list[int] | list[list[int]]]:
    """Plain lists for files: position `places[i]` has the set `table[sets[i]]`."""
    numbers: dict[AllowedTokens, int] = {}
    sets = [numbers.setdefault(tokens, len(numbers)) for tokens in restricted.values()]
    return {"places": list(restricted), "sets": sets, "table": [list(tokens) for tokens in numbers]}


def from_table(places: Sequence[int], sets: Sequence[int], table: Sequence[Sequence[int]]) -> dict[int, AllowedTokens]:
    """The inverse of `to_table`."""
    known = [tuple(tokens) for tokens in table]
    return {place: known[number] for place, number in zip(places, sets, strict=True)}
