"""Episodes that belong together: of the same prompt, or the two of a pair."""

from __future__ import annotations

from collections.abc import Sequence as List

import torch

from lmrl import distributed
from lmrl.policy.policy import Policy
from lmrl.trajectories.batch import Batch, Sequence, to_sequence
from lmrl.trajectories.shared import pack
from lmrl.trajectories.trajectory import Trajectory

EPISODE = "episode"
"""Field that numbers the episodes of a batch."""


def groups_of(trajectories: List[Trajectory]) -> list[list[int]]:
    """Indices of the episodes of each group, in order of appearance."""
    groups: dict[int, list[int]] = {}
    for position, trajectory in enumerate(trajectories):
        groups.setdefault(trajectory.group, []).append(position)
    return list(groups.values())


def gathered(sequences: List[Sequence]) -> list[Sequence]:
    """The sequences of all processes, with chains and episodes of different processes kept distinct."""
    offset = distributed.rank() << 32
    for sequence in sequences:
        sequence.chain = None if sequence.chain is None else sequence.chain + offset
        if EPISODE in sequence.fields:
            sequence.fields[EPISODE] = sequence.fields[EPISODE] + offset
    return distributed.all_gather(sequences)


def flat(parts: List[torch.Tensor], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The concatenated parts; an empty tensor if there are none, as in a process without episodes."""
    return torch.cat(list(parts)) if len(parts) else torch.zeros(0, dtype=dtype)


def grouped_batch(groups: List[List[Trajectory]], policy: Policy, share: bool, whole: bool) -> Batch:
    """A batch in which every action token carries its episode's index, counted through the groups.

    share: pack episodes of a group that have one segment each and share a beginning, as many as a microbatch holds.
    whole: keep the sequences of a group together in a microbatch.
    """
    sequences, number = [], 0
    for index, group in enumerate(groups):
        singles: list[Sequence] = []
        for trajectory in group:
            own = [to_sequence(segment) for segment in trajectory.segments if segment.actions]
            for sequence in own:
                sequence.fields[EPISODE] = torch.full(sequence.targets.shape, number)
            number += 1
            singles += own
        packable = share and len(group) > 1 and len(singles) == len(group) and policy.shares_prompts
        parts = _packed(singles, policy.microbatch_tokens) if packable else singles
        if whole:
            for part in parts:
                part.chain = index
        sequences += parts
    return Batch(sequences)


def _packed(singles: list[Sequence], max_tokens: int) -> list[Sequence]:
    """Packed sequences of at most `max_tokens` tokens each, for episodes that share something."""
    parts: list[list[Sequence]] = [[]]
    size = 0
    for sequence in singles:
        own = len(sequence.targets)  # about how many tokens it adds
        if parts[-1] and size + own > max_tokens:
            parts.append([])
        size = size + own if parts[-1] else len(sequence.tokens)
        parts[-1].append(sequence)
    packed = []
    for part in parts:
        together = pack(part) if len(part) > 1 else None
        packed += [together] if together is not None else part
    return packed


def episode_sums(values_N: torch.Tensor, episodes_N: torch.Tensor) -> torch.Tensor:
    """Sum over the action tokens of each episode present, in order of their indices, (E,)."""
    numbers_E, places_N = episodes_N.unique(return_inverse=True)
    return values_N.new_zeros(len(numbers_E)).index_add(0, places_N, values_N)
