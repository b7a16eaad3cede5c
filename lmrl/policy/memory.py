"""Running out of memory in passes over microbatches, and continuing with smaller ones.

A lack of memory shows only when an allocation fails, so the size of microbatches is corrected then. The result does not
change: gradients are sums over microbatches, however a minibatch is cut. On a CPU an allocation usually does not fail:
Linux promises more memory than it has, and kills the process (see docs/memory.md).
"""

from __future__ import annotations

import gc
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeVar

import torch

from lmrl.errors import MemoryShortError
from lmrl.recipe import Recipe
from lmrl.recipe.estimates import memory
from lmrl.trajectories.batch import Batch, Microbatch


class Cuts(Protocol):
    """The part of a policy that cuts batches."""

    microbatch_tokens: int
    synchronized: bool

    @property
    def pad_id(self) -> int: ...

    @property
    def packs(self) -> bool: ...

    def passes(self, micros: list[Microbatch]) -> list[Microbatch]: ...


PassKind = Literal["update", "rehearsal", "score", "generate"]
T = TypeVar("T")
FILLED = 0.9
"""Maximum share of an accelerator's memory that an estimate may fill."""
SIGNS = ("out of memory", "can't allocate memory", "cublas_status_alloc_failed")
"""Parts of the messages of allocators without their own exception type."""


def is_out_of_memory(error: BaseException) -> bool:
    """True if an allocation failed, on an accelerator or on a CPU."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in SIGNS)


@dataclass
class FailedPass:
    """Work that ran out of memory, with what is needed to repeat it (see lmrl/training/monitoring/bundle.py).

    kind: `update` with gradient, `rehearsal` of one, `score` without gradient, `generate` by the `hf` engine.
    """

    kind: PassKind
    batch: Batch
    microbatch_tokens: int
    """The microbatch size, in tokens, at the failure."""
    shape: tuple[int, ...]
    """Sequences and tokens of the failed microbatch; for `generate`, prompts and the longest context with its new
    tokens."""
    options: dict[str, Any] = field(default_factory=dict)
    """Options of that kind of work, as JSON."""


def needs_checkpointing(recipe: Recipe, device: torch.device) -> bool:
    """True if activations are to be recomputed: as the recipe says, else if they would not fit into an accelerator's
    memory."""
    if recipe.training.gradient_checkpointing is not None or device.type != "cuda":
        return bool(recipe.training.gradient_checkpointing)
    estimate = memory(recipe, accelerator=True)
    available = torch.cuda.get_device_properties(device).total_memory / 2**20
    return estimate is not None and sum(estimate.values()) > FILLED * available


class Passes:
    """Iterates over a batch's microbatches in order, and remembers the current one."""

    def __init__(self, policy: Cuts, batch: Batch):
        self.micros = batch.microbatches(policy.microbatch_tokens, policy.pad_id, policy.packs)
        self.all = policy.passes(self.micros)
        self.now: Microbatch | None = None

    def __iter__(self) -> Iterator[tuple[Microbatch, bool, bool]]:
        """Each microbatch, whether it is a dummy (see `Policy.passes`), and whether it is the last."""
        for number, micro in enumerate(self.all):
            self.now = micro
            yield micro, number >= len(self.micros), number + 1 == len(self.all)


def fit(policy: Cuts, batch: Batch, work: Callable[[Passes], T], kind: PassKind = "update", **options: Any) -> T:
    """The result of `work` on a batch's microbatches. If memory runs out, it starts again with smaller ones.

    work: runs all passes it is given; when it starts, it must clear what a failed attempt left behind.
    `policy.microbatch_tokens` keeps the size that was found. Raises MemoryShortError if no smaller size helps, with
    kind and options to describe the work, see `FailedPass`.
    """
    while True:
        passes = Passes(policy, batch)
        try:
            return work(passes)
        except (RuntimeError, MemoryError) as error:
            if passes.now is None or not is_out_of_memory(error):
                raise
            try:
                policy.microbatch_tokens = smaller(policy, batch, passes.now, error)
            except MemoryShortError as short:
                shape = passes.now.shape
                short.failed = FailedPass(kind, batch, policy.microbatch_tokens, shape, options)
                raise
        del passes
        release()  # outside `except`, whose error keeps every tensor of the failed pass alive


def smaller(policy: Cuts, batch: Batch, micro: Microbatch, error: Exception) -> int:
    """The microbatch size, in tokens, after this one did not fit; raises MemoryShortError if it cannot be cut."""
    rows, width = micro.shape
    if policy.synchronized:
        raise MemoryShortError(
            f"a pass over {rows} sequences of {width} tokens does not fit into memory, and when processes shard the "
            f"weights, none of them can start again alone: lower training.microbatch_tokens={policy.microbatch_tokens}, or set "
            f"training.gradient_checkpointing=true ({reason(error)})"
        ) from error
    chains = {batch.sequences[index].chain for index in micro.indices}
    if rows == 1 or (len(chains) == 1 and None not in chains):
        what = "one sequence" if rows == 1 else f"{rows} sequences that belong together,"
        lower = "" if rows == 1 else "lower training.microbatch_tokens, "
        raise MemoryShortError(
            f"a pass over {what} of {width} tokens does not fit into memory, and training.microbatch_tokens cannot cut it further: "
            f"{lower}set training.gradient_checkpointing=true or training.precision=bfloat16, or shorten the longest sequences "
            f"(task.prompts.max_tokens, rollouts.max_new_tokens, source.max_tokens, task.history) ({reason(error)})"
        ) from error
    return min(policy.microbatch_tokens, micro.tokens_BT.numel()) // 2


def reason(error: BaseException) -> str:
    """The first line of the allocator's message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:160]


def release() -> None:
    """Free the memory of a failed pass."""
    gc.collect()
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()


def free_frames(error: BaseException) -> None:
    """Release the tensors held by the frames of an error and of its causes."""
    at: BaseException | None = error
    while at is not None:
        traceback.clear_frames(at.__traceback__)
        at = at.__cause__
    release()


@contextmanager
def or_advice(advice: str, failed: Callable[[], FailedPass | None] | None = None) -> Iterator[None]:
    """Turn running out of memory inside into one line: `advice`, then what the allocator said. failed: describes the
    work."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        short = MemoryShortError(f"{advice} ({reason(error)})")
        short.failed = failed and failed()
        raise short from error
