"""Strategies that distribute weights, gradients and optimizer state over the processes of a run.

`Strategy` is plain data parallelism: every rank holds everything, and gradients are all-reduced once per update. Since
that happens after the last microbatch, ranks may have different numbers of microbatches. Strategies that shard the
weights (sharded.py) gather them for every pass, so their ranks must run the same number of passes (`synchronized`).
"""

from __future__ import annotations

from collections.abc import Iterator, Set
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

from lmrl import distributed
from lmrl.policy.load import load_weights
from lmrl.policy.passes import ForwardRequest, Outputs
from lmrl.policy.policy import Policy
from lmrl.training.parallel.optimizer_state import entry_from_tensor, entry_to_tensor, fused_parameters
from lmrl.trajectories.batch import Microbatch

BUCKET = 2**24
"""Maximum gradient elements in one all-reduce."""


class Strategy:
    """Data parallelism: every rank holds all weights. Also used with one process."""

    name = "ddp"
    synchronized = False
    """True if all ranks must run the same number of passes."""
    can_discard = True
    """True if a gradient can be discarded after the backward pass."""
    can_reload_weights = True
    """True if a checkpoint's weights can be loaded in the middle of a stage."""
    optimizer: torch.optim.Optimizer
    moved: Set[torch.nn.Parameter] = frozenset()
    """The parameters that had a gradient in the last step."""

    def prepare(self, policy: Policy, optimizer: torch.optim.Optimizer, max_grad_norm: float | None) -> None:
        """Take over a policy and its optimizer. Called once, before the first pass."""
        self.policy, self.optimizer, self.max_grad_norm = policy, optimizer, max_grad_norm
        self.parameters = [one for group in optimizer.param_groups for one in group["params"]]
        policy.synchronized = self.synchronized
        if distributed.size() > 1:  # all ranks build the same policy; this makes sure of it
            heads = policy.values.state_dict().values() if policy.values is not None else ()
            for tensor in [*self.parameters, *heads]:
                dist.broadcast(tensor.data, src=0)

    def zero_grad(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def forward(self, micro: Microbatch, request: ForwardRequest) -> Outputs:
        """A pass of the policy whose gradient is wanted."""
        outputs: Outputs = self.policy(micro, request)
        return outputs

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        """Add the gradient of a microbatch's part of the loss. last: of the minibatch."""
        if loss.requires_grad:
            loss.backward()

    def step(self, finite: bool) -> float:
        """Update the weights, unless the gradient is not `finite`; returns its norm over all weights."""
        norm = self._gradient_norm()
        if not (finite and bool(norm.isfinite())):
            self.zero_grad()
            return float(norm)
        if self.max_grad_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.max_grad_norm, norm)
        self.moved = {parameter for parameter in self.parameters if parameter.grad is not None}
        self.optimizer.step()
        return float(norm)

    def gradient_norm(self) -> float:
        """Norm of the gradient over all weights and processes; the gradient is kept."""
        return float(self._gradient_norm())

    def _gradient_norm(self) -> torch.Tensor:
        self._reduce()
        return self._norm([parameter.grad for parameter in self.parameters if parameter.grad is not None])

    def _norm(self, gradients: list[torch.Tensor]) -> torch.Tensor:
        return torch.nn.utils.get_total_norm(gradients)

    def _reduce(self) -> None:
        """Sum the gradients over the ranks; one that no rank has stays None, as with one process."""
        if distributed.size() > 1:
            all_reduce_gradients(self.parameters)

    @contextmanager
    def gathered_weights(self) -> Iterator[None]:
        """Inside this context every rank holds all weights: to sample, or to save.

        After an error inside nothing is resharded: that is a collective, and the other ranks may have had no error. The
        run is over, and the failing rank has to exit for the others to notice.
        """
        yield

    def load_weights(self, folder: Path, trust_remote_code: bool = False) -> None:
        """Load a checkpoint's weights in the middle of a stage."""
        load_weights(self.policy, folder, trust_remote_code)

    def weights(self) -> dict[str, torch.Tensor] | None:
        """All weights by their `state_dict` names if `gathered_weights` cannot provide them; otherwise None."""
        return None

    # ---------------------------------------------------------------------------------------------------------- state
    def optimizer_tensors(self, parameters: dict[str, torch.nn.Parameter]) -> dict[str, torch.Tensor]:
        """The optimizer's state by parameter and entry; ranks other than the main one may return nothing."""
        return {
            f"{name}.{key}": entry_to_tensor(key, value)
            for name, parameter in parameters.items()
            for key, value in self.optimizer.state.get(parameter, {}).items()
        }

    def load_optimizer_tensors(
        self, parameters: dict[str, torch.nn.Parameter], tensors: dict[str, torch.Tensor]
    ) -> None:
        self.optimizer.state.clear()
        fused = fused_parameters(self.optimizer)
        for name, parameter in parameters.items():
            state = entries_of(name, tensors)
            if state:
                self.optimizer.state[parameter] = {
                    key: entry_from_tensor(key, value, parameter.device, parameter in fused)
                    for key, value in state.items()
                }

    def close(self) -> None:
        """Release what belongs to this stage's policy."""


def entries_of(name: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A parameter's entries among the optimizer's named tensors."""
    return {full.rpartition(".")[2]: value for full, value in tensors.items() if full.rpartition(".")[0] == name}


def all_reduce_gradients(parameters: list[torch.nn.Parameter], bucket: int = BUCKET) -> None:
    """Sum these parameters' gradients over the ranks, in one collective for every `bucket` elements, after one that
    finds out which gradients there are. A gradient that no rank has stays None."""
    known = distributed.all_sum([float(parameter.grad is not None) for parameter in parameters])
    held = [parameter for parameter, count in zip(parameters, known, strict=True) if count]
    pending = []
    for part in buckets(held, bucket):
        flat = torch.cat([(torch.zeros_like(one) if one.grad is None else one.grad).reshape(-1) for one in part])
        for one in part:
            one.grad = None
        # While one bucket is sent, the next is assembled.
        pending.append((part, flat, dist.all_reduce(flat, async_op=True)))
    for part, flat, work in pending:
        work.wait()
        for parameter, own in zip(part, flat.split([one.numel() for one in part]), strict=True):
            parameter.grad = own.view_as(parameter)


def buckets(parameters: list[torch.nn.Parameter], bucket: int) -> list[list[torch.nn.Parameter]]:
    """The parameters in order, in parts of at most `bucket` elements of one dtype; a larger parameter is a part by
    itself."""
    parts: list[list[torch.nn.Parameter]] = []
    room = 0
    for parameter in parameters:
        if not parts or room < parameter.numel() or parts[-1][-1].dtype != parameter.dtype:
            parts.append([])
            room = bucket
        parts[-1].append(parameter)
        room -= parameter.numel()
    return parts
