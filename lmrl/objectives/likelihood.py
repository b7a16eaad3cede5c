"""Likelihood of the action tokens: behaviour cloning."""

from __future__ import annotations

from lmrl.objectives.base import Loss, Objective
from lmrl.policy.passes import Outputs
from lmrl.recipe import LikelihoodObjective
from lmrl.trajectories.batch import Microbatch


class Likelihood(Objective):
    """L = -log pi(a|s), averaged over action tokens, minus an optional entropy bonus."""

    label = "BC"
    dropout = True

    def __init__(self, options: LikelihoodObjective):
        self.options = options

    def loss(self, outputs: Outputs, batch: Microbatch) -> Loss:
        nll = -outputs.logprobs.sum()
        entropy = outputs.entropy.sum()
        total = nll - self.options.entropy_coef * entropy
        return Loss(total, len(outputs.logprobs), {"nll": nll.detach(), "entropy": entropy.detach()})
