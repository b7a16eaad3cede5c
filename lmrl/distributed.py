"""Collective operations over the processes (ranks) of a run.

With one process, the usual case, every function returns its input. With several, each rank holds a shard of a step's
episodes, and means, ranks and decisions are taken over all shards. All ranks must call the collectives in the same
order.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from lmrl.errors import RunError

T = TypeVar("T")
PATIENCE = timedelta(hours=6)
"""How long a rank waits for the others when one of them may sample, score, evaluate or write for far longer than the
rest. A dead rank is noticed at once."""
PROMPTNESS = timedelta(minutes=30)
"""The same inside `prompt`, where all ranks have about the same amount of work: a rank that takes longer hangs."""
_prompt = False


def size() -> int:
    """Number of processes (the world size)."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if size() > 1 else 0


def is_main() -> bool:
    return rank() == 0


def _group() -> Any:
    return _new_group(PROMPTNESS if _prompt else PATIENCE)


@cache
def _new_group(timeout: timedelta) -> Any:
    # Gloo, so that small values neither wait for a GPU nor use its memory.
    return dist.new_group(backend="gloo", timeout=timeout)


@contextmanager
def prompt() -> Iterator[None]:
    """Inside, ranks have about the same amount of work; raises RunError if one keeps the others waiting too long."""
    global _prompt
    before, _prompt = _prompt, True
    try:
        yield
    except (RuntimeError, dist.DistError) as error:
        if size() == 1 or "timed out" not in str(error).lower() and "timeout" not in str(error).lower():
            raise
        raise RunError(
            f"rank {rank()} has waited {PROMPTNESS.total_seconds() / 60:g} minutes for the other processes in an update, so one of "
            f"them hangs: end it, and continue from the last checkpoint with --resume ({str(error).strip().splitlines()[0][:160]})"
        ) from error
    finally:
        _prompt = before


def shard_bounds(count: int) -> tuple[int, int]:
    """First index and end (exclusive) of this rank's contiguous shard of `count` items."""
    return count * rank() // size(), count * (rank() + 1) // size()


def shard(items: Sequence[T]) -> Sequence[T]:
    """This rank's slice of a list that is the same on all ranks."""
    low, high = shard_bounds(len(items))
    return items[low:high]


def all_gather(items: Sequence[T]) -> list[T]:
    """The lists of all ranks, concatenated in rank order."""
    if size() == 1:
        return list(items)
    parts: list[Any] = [None] * size()
    dist.all_gather_object(parts, list(items), group=_group())
    return [item for part in parts for item in part]


def exchange(parcels: Sequence[Sequence[T]]) -> list[list[T]]:
    """An all-to-all exchange: what each rank sends to this one, in rank order. parcels: what this rank sends to
    each."""
    if size() == 1:
        return [list(parcels[0])]
    group = _group()
    sent = [torch.frombuffer(bytearray(pickle.dumps(list(parcel))), dtype=torch.uint8) for parcel in parcels]
    lengths = all_gather([[len(data) for data in sent]])
    found: list[list[T]] = [[] for _ in range(size())]
    found[rank()] = list(parcels[rank()])
    for distance in range(1, size()):
        after, before = (rank() + distance) % size(), (rank() - distance) % size()
        data = torch.empty(lengths[before][rank()], dtype=torch.uint8)
        pending: Any = dist.isend(sent[after], after, group=group)
        dist.recv(data, before, group=group)
        pending.wait()
        found[before] = pickle.loads(data.numpy().tobytes())
    return found


def broadcast(value: T) -> T:
    """The main rank's value, on every rank."""
    if size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, group=_group())
    return box[0]


def all_sum(values: Sequence[float]) -> list[float]:
    """Each of these numbers, summed over the ranks."""
    if size() == 1:
        return list(values)
    tensor = torch.tensor(list(values), dtype=torch.float64)
    dist.all_reduce(tensor, group=_group())
    return tensor.tolist()


def all_max(value: int) -> int:
    """The largest of the ranks' numbers."""
    return max(all_gather([value]))


def barrier() -> None:
    """Wait until all ranks have arrived here."""
    if size() > 1:
        dist.barrier(group=_group())


def shutdown() -> None:
    """Destroy the process group at the end of a run."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def moments(values: torch.Tensor) -> tuple[float, float]:
    """Mean and variance (without Bessel's correction) of all ranks' numbers, computed in float64; 0 and 0 if there are
    none."""
    count, total = all_sum([len(values), float(values.double().sum())])
    mean = total / max(count, 1)
    (squares,) = all_sum([float((values.double() - mean).pow(2).sum())])
    return mean, squares / max(count, 1)


def mean(values: Sequence[float] | torch.Tensor) -> float:
    """Mean of all ranks' numbers, computed in float64; 0 if there are none."""
    numbers = torch.as_tensor(values, dtype=torch.float64)
    total, count = all_sum([float(numbers.sum()), len(numbers)])
    return total / max(count, 1)
