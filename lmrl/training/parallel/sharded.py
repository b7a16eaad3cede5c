"""Strategies that shard weights, gradients or the optimizer's state: DeepSpeed's ZeRO, and FSDP2.

Rajbhandari et al., "ZeRO" (arXiv 1910.02054); Zhao et al., "PyTorch FSDP" (arXiv 2304.11277). Checkpoints do not depend
on them: state is gathered parameter by parameter when it is saved, and sharded again when it is loaded, so that a run
can resume with another strategy or another number of processes.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from lmrl import distributed
from lmrl.errors import NonFiniteError, RecipeError
from lmrl.policy.language_model import decoder_layers, projection_of
from lmrl.policy.load import load_weights
from lmrl.policy.passes import ForwardRequest, Outputs
from lmrl.policy.policy import Policy
from lmrl.training.parallel.optimizer_state import entry_from_tensor, fused_parameters
from lmrl.training.parallel.strategy import Strategy, entries_of
from lmrl.trajectories.batch import Microbatch

MOMENTS = ("exp_avg", "exp_avg_sq")


class DeepSpeedStrategy(Strategy):
    """ZeRO-1 to 3, as the launch's DeepSpeed configuration says."""

    name, synchronized = "deepspeed", True
    can_reload_weights = False  # DeepSpeed's own copies of the weights would have to change too
    can_discard = False  # DeepSpeed discards gradients only in its own step

    def __init__(self, accelerator: Any):
        # DeepSpeed calls functions of torch, several a pass, that warn each time of their new names.
        warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)
        self.accelerator = accelerator
        self.shards_weights = accelerator.state.deepspeed_plugin.zero_stage == 3

    def prepare(self, policy: Policy, optimizer: torch.optim.Optimizer, max_grad_norm: float | None) -> None:
        super().prepare(policy, optimizer, max_grad_norm)
        prepare_for_sharding(policy, self.shards_weights)
        groups = enumerate(optimizer.param_groups)
        self.group_of = {id(parameter): number for number, group in groups for parameter in group["params"]}
        self.all_have_moved = False
        if any(one.dtype != torch.float32 for one in policy.parameters()):
            raise RecipeError(
                "deepspeed wants all weights in one precision, but the recipe's frozen ones are bfloat16: set "
                "model.dtype=float32 (with training.precision=bfloat16 for the arithmetic)"
            )
        self.accelerator.state.deepspeed_plugin.deepspeed_config |= {
            "train_micro_batch_size_per_gpu": 1,
            "train_batch_size": distributed.size(),
            "gradient_accumulation_steps": 1,  # the boundary is set by hand: microbatches differ from update to update
            "gradient_clipping": max_grad_norm or 0.0,
        }
        self.accelerator.prepare(policy, optimizer)
        self.engine: Any = self.accelerator.deepspeed_engine_wrapped.engine
        self.zero: Any = self.engine.optimizer
        """DeepSpeed's optimizer, around the one that was given."""
        self.optimizer = self.zero
        if self.shards_weights:
            self._keep_whole(used_outside_of_modules(policy))

    def _keep_whole(self, parameters: list[nn.Parameter]) -> None:
        """Keep these unsharded on every rank, as DeepSpeed does with small ones; their gradients and state stay
        sharded."""
        held: list[nn.Parameter] = self.zero.persistent_parameters
        known = {id(parameter) for parameter in held}
        parameter: Any  # with attributes of DeepSpeed's
        for parameter in parameters:
            if id(parameter) not in known:
                parameter.ds_persist = True
                held.append(parameter)
        self._gather_kept()

    def _gather_kept(self) -> None:
        kept = self.zero.persistent_parameters
        kept[0].all_gather(kept)

    def zero_grad(self) -> None:
        """DeepSpeed forgets gradients with every step."""

    def forward(self, micro: Microbatch, request: ForwardRequest) -> Outputs:
        # Not the policy itself: ZeRO-3 counts microbatches here, and would keep the last one's gradient alone.
        outputs: Outputs = self.engine(micro, request)
        return outputs

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        self.engine.set_gradient_accumulation_boundary(is_boundary=last)
        self.engine.backward(loss * distributed.size())  # DeepSpeed averages over the ranks; the loss needs the sum

    def step(self, finite: bool) -> float:
        self.engine.step()
        norm = float(self.engine.get_global_grad_norm() or 0.0)
        if self.zero.overflow:  # DeepSpeed has skipped the step
            if self.shards_weights:
                self._gather_kept()
            return math.nan
        self._undo_idle_steps()
        if not finite:
            raise NonFiniteError(
                "a loss is not finite although its gradient is, which is all that DeepSpeed checks: it has updated the weights; continue "
                "from the last checkpoint with --resume and a lower learning rate"
            )
        return norm

    def _pieces(self) -> list[tuple[int, dict[str, torch.Tensor]]]:
        """The number of its group, and the state, of each flat piece that DeepSpeed's own optimizer updates."""
        zero = self.zero
        if self.shards_weights:
            pieces = [(zero.sub_group_to_group_id[i], one) for i, one in enumerate(zero.fp32_partitioned_groups_flat)]
        else:
            pieces = list(enumerate(zero.single_partition_of_fp32_groups))
        return [(group, zero.optimizer.state[one]) for group, one in pieces if "step" in zero.optimizer.state[one]]

    def _undo_idle_steps(self) -> None:
        """Weights that no gradient has reached so far, as all but the heads while values warm up, are left out elsewhere;
        DeepSpeed gives them zeros, and counts a step by which Adam's first real one would be shorter."""
        if self.all_have_moved:
            return
        states = [state for _, state in self._pieces()]
        moved = distributed.all_sum([float(state["exp_avg"].any()) for state in states])
        for state, count in zip(states, moved, strict=True):
            if not count:
                state["step"].zero_()
        self.all_have_moved = all(moved)

    @contextmanager
    def gathered_weights(self) -> Iterator[None]:
        if not self.shards_weights:
            yield
            return
        import deepspeed
        from trl.models.utils import add_hooks, remove_hooks

        with deepspeed.zero.GatheredParameters(list(self.policy.parameters())):
            remove_hooks(self.engine)  # they would give the weights back after every layer
            self.policy.synchronized = False
            yield
            self.policy.synchronized = True
            add_hooks(self.engine)
            distributed.barrier()
        self._gather_kept()

    # ---------------------------------------------------------------------------------------------------------- state
    def optimizer_tensors(self, parameters: dict[str, nn.Parameter]) -> dict[str, torch.Tensor]:
        from deepspeed.utils import safe_get_full_optimizer_state

        steps = {group: float(state["step"]) for group, state in self._pieces()}
        if not steps:
            return {}
        self._link_state()
        tensors = {}
        for name, parameter in parameters.items():
            tensors[f"{name}.step"] = torch.as_tensor(steps[self.group_of[id(parameter)]])
            for key in MOMENTS:
                tensors[f"{name}.{key}"] = safe_get_full_optimizer_state(parameter, key).cpu().clone()
        return tensors

    def load_optimizer_tensors(self, parameters: dict[str, nn.Parameter], tensors: dict[str, torch.Tensor]) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        if not tensors:
            return
        self._make_state()
        steps: dict[int, float] = {}
        for name, parameter in parameters.items():
            group, own = self.group_of[id(parameter)], float(tensors.get(f"{name}.step", 0.0))
            steps[group] = max(steps.get(group, 0.0), own)
        for group, state in self._pieces():
            state["step"] = torch.as_tensor(steps[group])
        for name, parameter in parameters.items():
            for key, value in entries_of(name, tensors).items():
                if key in MOMENTS:
                    if self.shards_weights:
                        safe_set_local_optimizer_state(parameter, own_piece(value).to(parameter.device), key)
                    else:
                        safe_set_full_optimizer_state(parameter, value.to(parameter.device), key)

    def _make_state(self) -> None:
        """A step that changes nothing, after which there is a state to write to."""
        rates = [group["lr"] for group in self.optimizer.param_groups]
        for group in self.optimizer.param_groups:
            group["lr"] = 0.0
        self.policy.train()
        self.backward(
            self.forward(self.policy.dummy_microbatch().to(self.policy.device), ForwardRequest()).zero_loss(), last=True
        )
        self.engine.step()
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        self._link_state()

    def _link_state(self) -> None:
        """ZeRO-1 and 2 link parameters to their state before the first step, when there is none yet; so once more."""
        if self.shards_weights:
            return
        from deepspeed.utils import lazy_init_hp_params_optimizer_state

        zero = self.zero
        for group, flat in zip(zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True):
            lazy_init_hp_params_optimizer_state(group, flat, zero.optimizer.state)

    def close(self) -> None:
        self.engine.destroy()
        self.accelerator.free_memory()


class FSDPStrategy(Strategy):
    """Weights, gradients and optimizer state of every layer are sharded over the ranks (PyTorch's `fully_shard`)."""

    name, synchronized = "fsdp", True

    def __init__(self, device: torch.device, reshard: bool = True):
        """reshard: give a layer's weights back after its forward pass, and gather them again for the backward pass."""
        from torch.distributed.device_mesh import init_device_mesh

        self.mesh, self.reshard = init_device_mesh(device.type, (distributed.size(),)), reshard

    def prepare(self, policy: Policy, optimizer: torch.optim.Optimizer, max_grad_norm: float | None) -> None:
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        super().prepare(policy, optimizer, max_grad_norm)
        prepare_for_sharding(policy, True)
        names = {id(parameter): name for name, parameter in policy.named_parameters()}
        # Layers are gathered in the precision that they compute in, which halves what is sent; gradients are summed in float32.
        precision = MixedPrecisionPolicy(policy.autocast_dtype, torch.float32, cast_forward_inputs=False)
        self.layers = [
            fully_shard(layer, mesh=self.mesh, reshard_after_forward=self.reshard, mp_policy=precision)
            for layer in decoder_layers(policy)
        ]
        # The vocabulary, the heads and what else stands outside of layers is one more piece.
        self.rest = fully_shard(policy, mesh=self.mesh, reshard_after_forward=False)
        sharded = dict(policy.named_parameters())
        for group in optimizer.param_groups:
            group["params"] = [sharded[names[id(parameter)]] for parameter in group["params"]]
        self.parameters = [one for group in optimizer.param_groups for one in group["params"]]
        with torch.no_grad():
            policy(policy.dummy_microbatch().to(policy.device))  # FSDP sets itself up in the first pass from the top
        self.rest.reshard()  # else what stands outside of layers would be known by its gathered tensors

    def forward(self, micro: Microbatch, request: ForwardRequest) -> Outputs:
        # peft freezes and thaws adapters around passes of the reference, and may have thawed gathered weights alone.
        for parameter in self.parameters:
            parameter.requires_grad_(True)
        return super().forward(micro, request)

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        (loss * distributed.size()).backward()  # FSDP averages over the ranks; the loss needs the sum

    def _reduce(self) -> None:
        """Done in the backward pass."""

    def _norm(self, gradients: list[torch.Tensor]) -> torch.Tensor:
        norm = super()._norm(gradients)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    @contextmanager
    def gathered_weights(self) -> Iterator[None]:
        pieces = [self.rest, *self.layers]
        for piece in pieces:
            piece.set_reshard_after_forward(False, recurse=False)
            piece.unshard()
        self.policy.synchronized = False
        yield
        self.policy.synchronized = True
        for piece in pieces:
            piece.set_reshard_after_forward(self.reshard and piece is not self.rest, recurse=False)
            piece.reshard()
        distributed.barrier()

    def load_weights(self, folder: Path, trust_remote_code: bool = False) -> None:
        for piece in [self.rest, *self.layers]:
            piece.reshard()  # otherwise the gathered copies would be written, not the shards
        load_weights(self.policy, folder, trust_remote_code, put_piece)

    def weights(self) -> dict[str, torch.Tensor] | None:
        return {
            name: value.full_tensor().cpu() if isinstance(value, DTensor) else value.cpu()
            for name, value in self.policy.state_dict().items()
        }

    # ---------------------------------------------------------------------------------------------------------- state
    def optimizer_tensors(self, parameters: dict[str, nn.Parameter]) -> dict[str, torch.Tensor]:
        return {
            name: value.full_tensor().cpu() if isinstance(value, DTensor) else value
            for name, value in super().optimizer_tensors(parameters).items()
        }

    def load_optimizer_tensors(self, parameters: dict[str, nn.Parameter], tensors: dict[str, torch.Tensor]) -> None:
        self.optimizer.state.clear()
        fused = fused_parameters(self.optimizer)
        for name, parameter in parameters.items():
            for key, value in entries_of(name, tensors).items():
                entry = entry_from_tensor(key, value, parameter.device, parameter in fused)
                if key != "step":
                    assert isinstance(parameter, DTensor)  # as `fully_shard` leaves every parameter
                    entry = distribute_tensor(entry, self.mesh, parameter.placements)
                self.optimizer.state[parameter][key] = entry


def prepare_for_sharding(policy: Policy, shares_weights: bool) -> None:
    """Detect what needs full weights to detect, before they are sharded; refuse policies that always need full
    weights."""
    if shares_weights and policy.guidance is not None:
        raise RecipeError(
            "objectives with Q values update full target weights, but this launch shards them over its processes: launch it "
            "with --accelerate zero2, or without"
        )
    _ = policy.packs, policy.shares_prompts


def put_piece(own: torch.Tensor, whole: torch.Tensor) -> None:
    """Copy this rank's shard of a full tensor into one of the policy's."""
    if isinstance(own, DTensor):
        whole = distribute_tensor(whole.to(own.device, own.dtype), own.device_mesh, own.placements)
    own.copy_(whole)


def own_piece(value: torch.Tensor) -> torch.Tensor:
    """This process's piece of a parameter as ZeRO-3 cuts it: equal pieces, the last filled up with zeros."""
    flat = nn.functional.pad(value.flatten(), (0, -value.numel() % distributed.size()))
    return flat.chunk(distributed.size())[distributed.rank()].clone()


def used_outside_of_modules(policy: Policy) -> list[nn.Parameter]:
    """Parameters that the policy multiplies with itself, so that no hook of ZeRO-3 gathers them for the backward pass: of
    the projection to the vocabulary, and of the heads."""
    heads = [] if policy.values is None else list(policy.values.parameters())
    return [*projection_of(policy.causal_lm).parameters(), *heads]
