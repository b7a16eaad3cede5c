"""The updater: from a minibatch to one optimizer step.

It alone owns microbatches, normalisation, backward, clipping, the learning rate, and skipping non-finite steps. The
strategy decides how weights and gradients are distributed over processes.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from lmrl import distributed
from lmrl.objectives.base import Objective
from lmrl.policy.memory import FailedPass, Passes, fit, or_advice
from lmrl.policy.policy import Policy
from lmrl.recipe import Optimizer
from lmrl.recipe.objectives import ObjectiveOptions
from lmrl.training.optimizers import build_optimizer, state_bytes, undo_step
from lmrl.training.parallel.strategy import Strategy
from lmrl.trajectories.batch import Batch

STEP_ADVICE = (
    "the optimizer's step does not fit into memory: set optimizer.name=adamw_8bit, train adapters (model.lora), or shard the "
    "optimizer's state over processes (docs/memory.md)"
)


class Updater:
    def __init__(self, policy: Policy, options: Optimizer, steps: int, strategy: Strategy | None = None):
        """options: with a learning rate (see lmrl/recipe/rates.py). steps: length of the stage, for the schedule. strategy: None for
        one process."""
        self.policy, self.options, self.steps = policy, options, steps
        self.recipe_tokens = policy.microbatch_tokens
        self.parameters = policy.trainable()
        heads = [parameter for name, parameter in self.parameters.items() if is_head(name)]
        trunk = [parameter for name, parameter in self.parameters.items() if not is_head(name)]
        head_lr = options.lr if options.head_lr is None else options.head_lr
        groups = [{"params": trunk, "lr": options.lr, "base_lr": options.lr, "head": False}]
        if heads:
            groups.append({"params": heads, "lr": head_lr, "base_lr": head_lr, "head": True})
        self.strategy = strategy or Strategy()
        optimizer = build_optimizer(options, groups, policy, self.strategy)
        norm = ObjectiveOptions.max_grad_norm if options.max_grad_norm == "auto" else options.max_grad_norm
        self.strategy.prepare(policy, optimizer, norm)
        self.parameters = policy.trainable()  # sharding may have replaced them
        self.schedule = 1.0
        """Factor of the step on the learning rate."""
        self.factors: dict[str, float] = {}
        """Further factors on the learning rate, by the listener that set them: they multiply."""
        self.has_updated = False
        """True if this step has made an update, and the last one has not been undone."""
        self.skipped = 0
        self.skipped_in_a_row = 0

    def begin(self, step: int) -> None:
        """Set the learning rate of a step, counted from 1."""
        self.has_updated = False
        self.schedule = schedule(self.options, step, self.steps)
        self._set_rates(self.policy)

    def _set_rates(self, policy: Policy) -> None:
        """Adam's steps do not depend on how large a gradient is, so heads whose outputs are multiplied step by that much less."""
        factor = math.prod(self.factors.values()) * self.schedule
        for group in self.strategy.optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor / (float(policy.values.gain) if group["head"] else 1.0)

    def step(self, policy: Policy, objective: Objective, minibatch: Batch) -> dict[str, float]:
        """One update. Returns statistics averaged over the minibatch of all processes; a non-finite one changes no weight.

        If the objective rejects it, no weight changes either, the previous update is undone, and `rejected` is 1. A step's
        first minibatch is never rejected: the policy has not moved, and what it differs by is rounding.
        """
        if self.has_updated and not self.strategy.can_discard:
            moved = objective.divergence(policy, minibatch)
            if objective.rejects(moved):
                return moved | {"rejected": 1.0}
        policy.begin_update(objective.dropout)
        stats = self.backward(policy, objective, minibatch)
        if self.has_updated and self.strategy.can_discard and objective.rejects(stats):
            self.strategy.zero_grad()
            self.undo_step()
            return stats | {"rejected": 1.0}
        self._set_rates(policy)
        with or_advice(STEP_ADVICE, lambda: whole_update(policy, minibatch)):
            stats["grad_norm"] = self.strategy.step(finite=math.isfinite(stats["loss"]))
        if not (math.isfinite(stats["grad_norm"]) and math.isfinite(stats["loss"])):
            self.skipped += 1
            self.skipped_in_a_row += 1
            return stats
        if objective.polyak is not None:
            policy.values.polyak_update(objective.polyak)
        self.has_updated = True
        self.skipped_in_a_row = 0
        return stats

    def probe(self, policy: Policy, objective: Objective, minibatch: Batch) -> dict[str, float]:
        """Loss and gradient norm of a minibatch, as `step` would find them; no weight and no random number changes. Only for
        strategies that `can_discard`."""
        was_training, device = policy.training, policy.device
        with torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type):
            policy.begin_update(objective.dropout)
            stats = self.backward(policy, objective, minibatch)
        stats["grad_norm"] = self.strategy.gradient_norm()
        self.strategy.zero_grad()
        policy.train(was_training)
        return stats

    def undo_step(self) -> None:
        """Undo this step's last update of the language model, unless that is done or its optimizer cannot; heads, and a
        trunk of their own, keep theirs."""
        if self.has_updated and self.strategy.can_discard:
            own = {parameter for name, parameter in self.parameters.items() if not name.startswith("values.")}
            undo_step(self.strategy.optimizer, own & self.strategy.moved)
        self.has_updated = False

    def backward(self, policy: Policy, objective: Objective, minibatch: Batch) -> dict[str, float]:
        """Gradient of the loss averaged over the whole minibatch of all processes, however it is cut into microbatches.

        If memory runs out, the minibatch starts again with smaller ones. Raises MemoryShortError if that cannot help.
        Sequences without a gradient count in the loss, but not in the other statistics.
        """
        active, skipped = minibatch.split_by_gradient()
        passed, left = distributed.all_sum(
            [objective.count(part) if part.sequences else 0.0 for part in (active, skipped)]
        )
        passed = passed or 1.0
        count = passed + left
        sums = fit(policy, active, lambda passes: self._passes(policy, objective, passes, count))
        # All processes continue with the same size, so that one checkpoint holds it for all.
        policy.microbatch_tokens = -distributed.all_max(-policy.microbatch_tokens)
        stats = averages(sums, passed)
        values, own, bound = distributed.all_sum(policy.value_pull.tolist())
        if own > 0:
            stats |= {"value_pull": values / own, "value_pull_bound": bound / passed}
        return stats | {"loss": stats["loss"] * passed / count}

    def _passes(self, policy: Policy, objective: Objective, passes: Passes, count: float) -> dict[str, Any]:
        """Accumulate the gradient of all passes, discarding earlier attempts; returns sums of loss and statistics."""
        self.strategy.zero_grad()
        policy.value_pull = torch.zeros(3, device=policy.device)
        sums: dict[str, Any] = {"loss": 0.0}
        for micro, dummy, last in passes:
            micro = micro.to(policy.device)
            outputs = self.strategy.forward(micro, objective.forward_request)
            if dummy:  # joins the collectives, and adds nothing
                self.strategy.backward(outputs.zero_loss(), last)
                continue
            loss = objective.loss(outputs, micro)
            self.strategy.backward(loss.sum / count, last)
            for name, value in {"loss": loss.sum.detach(), **loss.stats}.items():
                sums[name] = sums.get(name, 0.0) + value
        return sums

    def rehearse(self, policy: Policy, objective: Objective, batch: Batch) -> None:
        """Run the passes of an update on this batch to see if they fit into memory. Only `policy.microbatch_tokens`
        changes, if they do not."""
        was_training, device = policy.training, policy.device
        held = None
        if device.type != "cpu" and not self.strategy.synchronized and not self.strategy.optimizer.state:
            held = torch.empty(state_bytes(self.options, self.parameters.values()), dtype=torch.uint8, device=device)
        with torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type):
            policy.begin_update(objective.dropout)
            fit(policy, batch, lambda passes: self._rehearse(policy, objective, passes), "rehearsal")
        policy.microbatch_tokens = -distributed.all_max(-policy.microbatch_tokens)
        del held
        self.strategy.zero_grad()
        policy.train(was_training)

    def _rehearse(self, policy: Policy, objective: Objective, passes: Passes) -> None:
        self.strategy.zero_grad()
        for micro, _, _ in passes:
            outputs = self.strategy.forward(micro.to(policy.device), objective.forward_request)
            self.strategy.backward(outputs.zero_loss(), last=False)

    # ---------------------------------------------------------------------------------------------------------- state
    @property
    def ran_short(self) -> bool:
        """True if memory ran out, so that microbatches are smaller than the recipe's."""
        return self.policy.microbatch_tokens < self.recipe_tokens

    def tensors(self) -> dict[str, torch.Tensor]:
        """The optimizer's state as named tensors, whole however it is spread; of the main process alone."""
        return self.strategy.optimizer_tensors(self.parameters)

    def load_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        self.strategy.load_optimizer_tensors(self.parameters, tensors)

    def state(self) -> dict[str, Any]:
        return {
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
            "optimizer": self.options.name,
            "microbatch_tokens": self.policy.microbatch_tokens if self.ran_short else None,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        self.skipped, self.skipped_in_a_row = state["skipped"], state["skipped_in_a_row"]
        found = state.get("microbatch_tokens")
        if found is not None:
            self.policy.microbatch_tokens = min(self.policy.microbatch_tokens, found)


def whole_update(policy: Policy, minibatch: Batch) -> FailedPass:
    """An update whose passes fit, and whose optimizer step does not."""
    tokens = max((len(sequence.tokens) for sequence in minibatch.sequences), default=0)
    return FailedPass("update", minibatch, policy.microbatch_tokens, (len(minibatch.sequences), tokens), {"step": True})


def averages(sums: dict[str, Any], count: float) -> dict[str, float]:
    """Sums of this process's microbatches, added up over the processes, by `count`."""
    parts: dict[str, float] = {name: float(value) for name, value in sums.items()}
    if distributed.size() > 1:  # a rank without microbatches has no names
        total: dict[str, float] = {}
        for own in distributed.all_gather([parts]):
            for name, value in own.items():
                total[name] = total.get(name, 0.0) + value
        parts = total
    return {name: value / count for name, value in parts.items()}


def is_head(name: str) -> bool:
    """True if a policy's parameter belongs to a head, not to a trunk."""
    return name.startswith(("values.v.", "values.q."))


def schedule(options: Optimizer, step: int, steps: int) -> float:
    """Factor on the learning rate at a step counted from 1: linear warm-up, then constant, linear or cosine to 0."""
    if step <= options.warmup_steps:
        return step / options.warmup_steps
    done = (step - 1 - options.warmup_steps) / max(steps - options.warmup_steps, 1)
    if options.schedule == "linear":
        return 1 - done
    if options.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * done))
    return 1.0
