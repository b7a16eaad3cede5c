"""The processes of a run: which one this is, and what all of them know together.

One process is the usual case, and then every function gives back what it is given. With several, each holds a part of a
step's episodes, and whatever is averaged, ranked or decided is so over all of them. Functions that talk to the other
processes have to be called by all of them, in the same order.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")
TIMEOUT = timedelta(hours=6)
"""How long a process waits for the others: one may judge or sample far longer. A process that dies is noticed at once."""


def size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if size() > 1 else 0


def is_main() -> bool:
    return rank() == 0


@cache
def _group() -> Any:
    # Numbers and objects travel over gloo, so that they neither wait for a GPU nor need its memory.
    return dist.new_group(backend="gloo", timeout=TIMEOUT)


def shard_bounds(count: int) -> tuple[int, int]:
    """First and last (exclusive) of `count` things that fall to this process: a stretch of them, in order."""
    return count * rank() // size(), count * (rank() + 1) // size()


def shard(items: Sequence[T]) -> Sequence[T]:
    """This process's part of what all processes hold alike."""
    low, high = shard_bounds(len(items))
    return items[low:high]


def all_gather(items: Sequence[T]) -> list[T]:
    """The parts of all processes, in order of their ranks."""
    if size() == 1:
        return list(items)
    parts: list[Any] = [None] * size()
    dist.all_gather_object(parts, list(items), group=_group())
    return [item for part in parts for item in part]


def broadcast(thing: T) -> T:
    """What the main process has, in all of them."""
    if size() == 1:
        return thing
    held = [thing]
    dist.broadcast_object_list(held, src=0, group=_group())
    return held[0]


def all_sum(values: Sequence[float]) -> list[float]:
    """Each of these numbers, summed over the processes."""
    if size() == 1:
        return list(values)
    tensor = torch.tensor(list(values), dtype=torch.float64)
    dist.all_reduce(tensor, group=_group())
    return tensor.tolist()


def all_max(value: int) -> int:
    """The largest of the processes' numbers."""
    return max(all_gather([value]))


def barrier() -> None:
    """Go on when all processes have come here."""
    if size() > 1:
        dist.barrier(group=_group())


def shutdown() -> None:
    """Part from the other processes, at the end."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def moments(values: torch.Tensor) -> tuple[float, float]:
    """Mean and variance (without Bessel's correction) of the numbers that all processes hold, computed in double; 0 and 0 where
    there are none."""
    count, total = all_sum([len(values), float(values.double().sum())])
    mean = total / max(count, 1)
    (squares,) = all_sum([float((values.double() - mean).pow(2).sum())])
    return mean, squares / max(count, 1)


def mean(values: Sequence[float] | torch.Tensor) -> float:
    """Mean of the numbers that all processes hold; 0 where there are none."""
    total, count = all_sum([float(sum(values)), len(values)])
    return total / max(count, 1)
