"""The updater: from a minibatch to one optimizer step.

It alone owns microbatches, normalisation, backward, clipping, the learning rate, and skipping non-finite steps.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from lmrl.objectives.base import Objective
from lmrl.policy.policy import Policy
from lmrl.recipe import Optimizer
from lmrl.trajectories.batch import Batch


class Updater:
    def __init__(self, policy: Policy, options: Optimizer, steps: int):
        """steps: length of the stage, for the schedule."""
        self.options, self.steps = options, steps
        self.parameters = policy.trainable()
        heads = [parameter for name, parameter in self.parameters.items() if is_head(name)]
        trunk = [parameter for name, parameter in self.parameters.items() if not is_head(name)]
        head_lr = options.lr if options.head_lr is None else options.head_lr
        groups = [{"params": trunk, "lr": options.lr, "base_lr": options.lr}]
        if heads:
            groups.append({"params": heads, "lr": head_lr, "base_lr": head_lr})
        self.optimizer = torch.optim.AdamW(
            groups, betas=options.betas, eps=options.eps, weight_decay=options.weight_decay
        )
        self.lr_factor = 1.0
        """On top of the schedule (a rollback of the gate lowers it)."""
        self.skipped = 0
        self.skipped_in_a_row = 0

    def begin(self, step: int) -> None:
        """Set the learning rate of a step, counted from 1."""
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * self.lr_factor * schedule(self.options, step, self.steps)

    def step(self, policy: Policy, objective: Objective, minibatch: Batch) -> dict[str, float]:
        """One update. Returns statistics averaged over the minibatch; a non-finite one changes no weight."""
        policy.begin_update(objective.dropout)
        self.optimizer.zero_grad(set_to_none=True)
        stats = self.backward(policy, objective, minibatch)
        norm = float(torch.nn.utils.get_total_norm([p.grad for p in self.parameters.values() if p.grad is not None]))
        stats["grad_norm"] = norm
        if not (math.isfinite(norm) and math.isfinite(stats["loss"])):
            self.skipped += 1
            self.skipped_in_a_row += 1
            self.optimizer.zero_grad(set_to_none=True)
            return stats
        if self.options.max_grad_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(
                self.parameters.values(), self.options.max_grad_norm, torch.tensor(norm)
            )
        self.optimizer.step()
        if objective.polyak is not None:
            policy.values.follow(objective.polyak)
        self.skipped_in_a_row = 0
        return stats

    def backward(self, policy: Policy, objective: Objective, minibatch: Batch) -> dict[str, float]:
        """Gradient of the loss averaged over the whole minibatch, however it is cut into microbatches."""
        total, count, sums = 0.0, 0, {}
        for micro in minibatch.microbatches(policy.microbatch_tokens, policy.pad_id):
            micro = micro.to(policy.device)
            loss = objective.loss(policy(micro, objective.want), micro)
            loss.sum.backward()
            total, count = total + loss.sum.detach(), count + loss.count
            for name, value in loss.stats.items():
                sums[name] = sums.get(name, 0.0) + value
        for parameter in self.parameters.values():
            if parameter.grad is not None:
                parameter.grad.div_(count)
        return {"loss": float(total) / count} | {name: float(value) / count for name, value in sums.items()}

    # ---------------------------------------------------------------------------------------------------------- state
    def tensors(self) -> dict[str, torch.Tensor]:
        """The optimizer's state as named tensors."""
        return {
            f"{name}.{key}": value
            for name, parameter in self.parameters.items()
            for key, value in self.optimizer.state.get(parameter, {}).items()
        }

    def load_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        self.optimizer.state.clear()
        for name, parameter in self.parameters.items():
            state = {
                full.rpartition(".")[2]: value for full, value in tensors.items() if full.rpartition(".")[0] == name
            }
            if state:
                self.optimizer.state[parameter] = {
                    key: value.clone() if key == "step" else value.to(parameter.device).clone()
                    for key, value in state.items()
                }

    def state(self) -> dict[str, Any]:
        return {"skipped": self.skipped, "skipped_in_a_row": self.skipped_in_a_row}

    def load_state(self, state: dict[str, Any]) -> None:
        self.skipped, self.skipped_in_a_row = state["skipped"], state["skipped_in_a_row"]


def is_head(name: str) -> bool:
    """Whether a parameter of a policy belongs to a head, and not to a trunk."""
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
