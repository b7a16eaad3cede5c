"""Sequences with a common beginning, packed into one so that the beginning is computed once.

A packed sequence holds the shared beginning, then every continuation after it. A continuation attends to the beginning
and itself, and its positions continue from the beginning's end, so every log-probability equals that of the plain
sequence.
"""

from __future__ import annotations

import torch

from lmrl.trajectories.allowed import shifted
from lmrl.trajectories.batch import Sequence


def shared_length(sequences: list[Sequence]) -> int:
    """The number of leading tokens that can be computed once: equal in all, and before the first action of any."""
    shortest = min(int(sequence.states[0]) + 1 for sequence in sequences)
    first = sequences[0].tokens[:shortest]
    for other in sequences[1:]:
        differing = (other.tokens[:shortest] != first).nonzero()
        if len(differing):
            shortest = int(differing[0])
            first = first[:shortest]
    return shortest


def pack(sequences: list[Sequence]) -> Sequence | None:
    """One sequence with a branch for each of these, with the actions in the given order; None if they share nothing."""
    length = shared_length(sequences)
    if length == 0:
        return None
    tokens, branches, states = [sequences[0].tokens[:length]], [torch.zeros(length, dtype=torch.long)], []
    end = length
    for number, sequence in enumerate(sequences, start=1):
        own = sequence.tokens[length:]
        tokens.append(own)
        branches.append(torch.full((len(own),), number))
        states.append(torch.where(sequence.states < length, sequence.states, sequence.states - length + end))
        end += len(own)
    return Sequence(
        torch.cat(tokens),
        torch.cat(states),
        torch.cat([sequence.targets for sequence in sequences]),
        {name: torch.cat([sequence.fields[name] for sequence in sequences]) for name in sequences[0].fields},
        branches=torch.cat(branches),
        allowed=shifted([one.allowed for one in sequences], [len(one.targets) for one in sequences]),
        kind=sequences[0].kind,
    )


def visible(branches_BT: torch.Tensor) -> torch.Tensor:
    """Attention masks: each token attends to earlier ones of the beginning (branch 0) or of its own branch, (B, T, T)."""
    size = branches_BT.shape[1]
    earlier_TT = torch.ones(size, size, dtype=torch.bool, device=branches_BT.device).tril()
    same_BTT = branches_BT[:, :, None] == branches_BT[:, None, :]
    return earlier_TT & (same_BTT | (branches_BT == 0)[:, None, :])
