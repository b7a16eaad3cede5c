"""Sequences dealt over the processes by what a pass over them costs, and cut into minibatches of nearly equal cost.

All processes wait for the slowest in every update. What they sampled is uneven: completions end early or late, and prompts
differ. So prepared sequences, which are small beside weights and gradients, move between processes before the update. The
loss is a sum over chains divided by the weight of all of them, so it does not depend on who computes which.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from lmrl import distributed
from lmrl.trajectories.batch import Batch, Sequence

SLACK = 0.02
"""Share of the mean load by which a process may exceed it before its sequences move: less is not worth a message."""
TRIES = 16
"""Random cuts into minibatches, of which the most even one is taken."""
HOME = 48
"""Bit from which the number of the process that prepared a sequence stands in its numbers (lmrl.objectives.groups uses 32)."""

Cost = Callable[[Sequence], float]


def assign(costs: list[float], homes: list[int], ranks: int, slack: float = SLACK) -> list[int]:
    """The rank of each item such that loads are nearly equal, and few items leave their homes.

    Longest first (Graham, "Bounds on multiprocessing timing anomalies", 1969): an item stays at home while that has room, and
    goes to the least loaded rank otherwise. Then single items change places as long as that relieves the fullest rank.
    """
    limit = (1 + slack) * max(sum(costs) / ranks, max(costs, default=0.0))
    loads, chosen = [0.0] * ranks, [0] * len(costs)
    for item in sorted(range(len(costs)), key=lambda item: (-costs[item], item)):
        rank = homes[item]
        if loads[rank] + costs[item] > limit:
            rank = min(range(ranks), key=lambda other: (loads[other], other != homes[item], other))
        loads[rank] += costs[item]
        chosen[item] = rank
    while max(loads) > limit and _relieve(costs, chosen, loads):
        pass
    return chosen


def _relieve(costs: list[float], chosen: list[int], loads: list[float]) -> bool:
    """Exchange an item of the fullest rank for a smaller one, or for none, so that both ranks are less full than it was;
    False if none helps."""
    fullest = max(range(len(loads)), key=lambda rank: loads[rank])
    best: tuple[float, int, int, int | None] | None = None
    for given in (item for item, rank in enumerate(chosen) if rank == fullest):
        for taken in [None, *(item for item, rank in enumerate(chosen) if rank != fullest)]:
            others = [rank for rank in range(len(loads)) if rank != fullest] if taken is None else [chosen[taken]]
            change = costs[given] - (0.0 if taken is None else costs[taken])
            if change <= 0:
                continue
            other = min(others, key=lambda rank: loads[rank])
            fuller = max(loads[fullest] - change, loads[other] + change)
            if fuller < loads[fullest] * (1 - 1e-9) and (best is None or fuller < best[0]):
                best = fuller, given, other, taken
    if best is None:
        return False
    _, given, other, taken = best
    change = costs[given] - (0.0 if taken is None else costs[taken])
    loads[fullest] -= change
    loads[other] += change
    chosen[given] = other
    if taken is not None:
        chosen[taken] = fullest
    return True


def split(costs: list[float], count: int, rng: np.random.Generator, tries: int = TRIES) -> list[list[int]]:
    """Items at random in `count` parts of nearly equal numbers and costs; fewer parts are empty only where items are fewer.

    Items next to each other by cost go to different parts; of some such cuts the most even one is taken.
    """
    if not costs:
        return []
    costs_I = np.asarray(costs, dtype=np.float64)
    order_I = np.argsort(-costs_I, kind="stable")
    best: tuple[float, list[list[int]]] | None = None
    for _ in range(tries):
        parts: list[list[int]] = [[] for _ in range(count)]
        for start in range(0, len(order_I), count):
            block = order_I[start : start + count]
            for item, part in zip(block, rng.permutation(count), strict=False):
                parts[part].append(int(item))
        most = max(float(costs_I[part].sum()) for part in parts)
        if best is None or most < best[0]:
            best = most, parts
    assert best is not None
    return [[part[at] for at in rng.permutation(len(part))] for part in best[1]]


def labelled(batch: Batch, numbered: tuple[str, ...]) -> Batch:
    """Copies of this rank's sequences, to be dealt: they share no memory, and their numbers say which rank prepared them.

    numbered: fields that number episodes or turns.
    """
    offset = distributed.rank() << HOME
    return Batch([_labelled(sequence, numbered, offset) for sequence in batch.sequences], batch.stats)


def _labelled(sequence: Sequence, numbered: tuple[str, ...], offset: int) -> Sequence:
    fields = {name: value + offset if name in numbered else value.clone() for name, value in sequence.fields.items()}
    tensors = {name: getattr(sequence, name).clone() for name in ("tokens", "states", "targets")}
    branches = None if sequence.branches is None else sequence.branches.clone()
    chain = None if sequence.chain is None else sequence.chain + offset
    return replace(sequence, fields=fields, chain=chain, branches=branches, **tensors)


def deal(batch: Batch, rng: np.random.Generator, count: int, cost: Cost) -> list[Batch]:
    """This rank's parts of `count` random minibatches of all ranks' sequences, chains whole (fewer where chains are fewer).

    batch: labelled. rng: in the same state on every rank. In each minibatch the ranks' costs are nearly equal.
    """
    chains = batch.chains()
    own = [sum(cost(batch.sequences[index]) for index in chain) for chain in chains]
    gathered = distributed.all_gather([own])
    costs = [one for part in gathered for one in part]
    homes = [rank for rank, part in enumerate(gathered) for _ in part]
    first = sum(len(part) for part in gathered[: distributed.rank()])
    parts = split(costs, min(count, len(costs)), rng)
    parcels: list[list[tuple[int, list[Sequence]]]] = [[] for _ in range(distributed.size())]
    for number, part in enumerate(parts):
        ranks = assign([costs[item] for item in part], [homes[item] for item in part], distributed.size())
        for item, rank in zip(part, ranks, strict=True):
            if homes[item] == distributed.rank():
                chain = chains[item - first]
                parcels[rank].append((number, [batch.sequences[index] for index in chain]))
    dealt: list[list[Sequence]] = [[] for _ in parts]
    for received in distributed.exchange(parcels):
        for number, sequences in received:
            dealt[number] += sequences
    return [Batch(sequences) for sequences in dealt]


def joined(parts: list[Batch]) -> Batch:
    """All sequences of these."""
    return Batch([sequence for part in parts for sequence in part.sequences])


def imbalance(loads: list[float]) -> float:
    """The largest load by the mean: how many times as long as necessary the ranks take."""
    return max(loads) * len(loads) / sum(loads) if any(loads) else 1.0


def loads_of(costs: list[float], ranks: list[int], count: int) -> list[float]:
    """The sum of the costs of each of `count` ranks."""
    return (
        torch.zeros(count, dtype=torch.float64)
        .index_add(0, torch.tensor(ranks, dtype=torch.long), torch.tensor(costs, dtype=torch.float64))
        .tolist()
    )
