"""Balancing sequences over processes by the cost of their passes, and cutting them into minibatches of nearly equal
cost.

All processes wait for the slowest in every update, and their samples are uneven: completions end early or late, and
prompts differ. So prepared sequences, which are small compared to weights and gradients, move between processes before
the update. The loss is a sum over chains divided by their total weight, so it does not depend on which process computes
which chain.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from lmrl import distributed
from lmrl.trajectories.batch import Batch, Sequence

SLACK = 0.02
"""Excess over the mean load, as a share of it, above which sequences move: less is not worth a message."""
TRIES = 16
"""Number of random cuts into minibatches; the most even one is taken."""
HOME = 48
"""In a sequence's index fields, the rank that prepared it starts at this bit (lmrl.objectives.groups uses 32)."""

Cost = Callable[[Sequence], float]


def assign(costs: list[float], homes: list[int], ranks: int, slack: float = SLACK) -> list[int]:
    """The rank of each item such that loads are nearly equal, and few items leave their homes.

    Longest first (Graham, "Bounds on multiprocessing timing anomalies", 1969): an item stays at home while there is
    room, and goes to the least loaded rank otherwise. Then single items are exchanged as long as that relieves the
    fullest rank.
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
    """Exchange an item of the fullest rank for a smaller one, or for none, so that both end up less full than the
    fullest was; False if none helps."""
    fullest = max(range(len(loads)), key=lambda rank: loads[rank])
    best: tuple[float, int, int, int | None] | None = None
    for given in (item for item, rank in enumerate(chosen) if rank == fullest):
        for taken in [None, *(item for item, rank in enumerate(chosen) if rank != fullest)]:
            others = [rank for rank in range(len(loads)) if rank != fullest] if taken is None else [chosen[taken]]
            change = costs[given] - (0.0 if taken is None else costs[taken])
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


def split(costs: list[float], count: int, rng: np.random.Generator) -> list[list[int]]:
    """Items at random in `count` parts of nearly equal numbers and costs; parts are empty only if there are fewer
    items.

    Items of similar cost go to different parts; of several such cuts the most even one is taken.
    """
    if not costs:
        return []
    blocks = -(-len(costs) // count)
    order_BP = np.full((blocks, count), len(costs))  # the index after the last stands for "no item"
    order_BP.flat[: len(costs)] = np.argsort(-np.asarray(costs), kind="stable")
    costs_I = np.append(np.asarray(costs, dtype=np.float64), 0.0)
    cuts = [rng.permuted(order_BP, axis=1) for _ in range(TRIES)]
    best_BP = min(cuts, key=lambda cut_BP: costs_I[cut_BP].sum(0).max())
    return [[int(item) for item in rng.permutation(part_B) if item < len(costs)] for part_B in best_BP.T]


def labelled(batch: Batch, index_fields: tuple[str, ...]) -> Batch:
    """This rank's sequences, ready for `deal`, with the preparing rank added to their indices. index_fields: fields
    that hold indices of episodes or turns."""
    offset = distributed.rank() << HOME

    def label(sequence: Sequence) -> Sequence:
        fields = {name: value + offset if name in index_fields else value for name, value in sequence.fields.items()}
        return replace(sequence, fields=fields, chain=None if sequence.chain is None else sequence.chain + offset)

    return Batch([label(sequence) for sequence in batch.sequences], batch.stats)


def deal(batch: Batch, rng: np.random.Generator, count: int, cost: Cost) -> list[Batch]:
    """This rank's parts of `count` random minibatches of all ranks' sequences, with whole chains (fewer if there are
    fewer chains).

    batch: labelled. rng: in the same state on every rank. In each minibatch the ranks' costs are nearly equal.
    """
    chains = batch.chains()
    own = [sum(cost(batch.sequences[index]) for index in chain) for chain in chains]
    gathered = distributed.all_gather([own])
    costs = [one for part in gathered for one in part]
    homes = [rank for rank, part in enumerate(gathered) for _ in part]
    first = sum(len(part) for part in gathered[: distributed.rank()])
    parts = split(costs, min(count, len(costs)), rng)
    dealt: list[list[Sequence]] = [[] for _ in parts]
    parcels: list[list[tuple[int, list[dict[str, Any]]]]] = [[] for _ in range(distributed.size())]
    for number, part in enumerate(parts):
        ranks = assign([costs[item] for item in part], [homes[item] for item in part], distributed.size())
        for item, rank in zip(part, ranks, strict=True):
            if homes[item] == distributed.rank():
                own_chain = [batch.sequences[index] for index in chains[item - first]]
                if rank == distributed.rank():
                    dealt[number] += own_chain
                else:
                    parcels[rank].append((number, [_to_arrays(sequence) for sequence in own_chain]))
    for received in distributed.exchange(parcels):
        for number, sequences in received:
            dealt[number] += [_from_arrays(arrays) for arrays in sequences]
    return [Batch(sequences) for sequences in dealt]


def _to_arrays(sequence: Sequence) -> dict[str, Any]:
    """A sequence's attributes, tensors as arrays: arrays pickle a hundred times as fast, and without the storage they
    are views of."""
    fields = {name: _to_array(value) for name, value in sequence.fields.items()}
    return {name: _to_array(value) for name, value in vars(sequence).items()} | {"fields": fields}


def _from_arrays(arrays: dict[str, Any]) -> Sequence:
    fields = {name: _from_array(value) for name, value in arrays["fields"].items()}
    return Sequence(**({name: _from_array(value) for name, value in arrays.items()} | {"fields": fields}))


def _to_array(value: Any) -> Any:
    has_array = isinstance(value, torch.Tensor) and value.dtype is not torch.bfloat16
    return value.cpu().numpy() if has_array else value


def _from_array(value: Any) -> Any:
    return torch.from_numpy(value) if isinstance(value, np.ndarray) else value


def joined(parts: list[Batch]) -> Batch:
    """A batch of all sequences of these parts."""
    return Batch([sequence for part in parts for sequence in part.sequences])


def loads_of(costs: list[float], ranks: list[int], count: int) -> list[float]:
    """The sum of the costs of each of `count` ranks."""
    return (
        torch.zeros(count, dtype=torch.float64)
        .index_add(0, torch.tensor(ranks, dtype=torch.long), torch.tensor(costs, dtype=torch.float64))
        .tolist()
    )
