"""Likelihood of the action tokens: behaviour cloning."""

from __future__ import annotations

import torch

from lmrl.objectives.base import Loss, Objective, less_entropy
from lmrl.objectives.groups import EPISODE, episode_sums, flat, grouped_batch
from lmrl.policy.passes import Outputs
from lmrl.policy.policy import Policy
from lmrl.recipe import LikelihoodObjective
from lmrl.trajectories.batch import Microbatch
from lmrl.trajectories.trajectory import Trajectory


class Likelihood(Objective):
    """L = -log pi(a|s), averaged over action tokens, minus an optional entropy bonus."""

    label = "BC"
    index_fields = (EPISODE,)
    dropout = True
    loss_of_data = "nll"

    def __init__(self, options: LikelihoodObjective):
        self.options = options

    def loss(self, outputs: Outputs, batch: Microbatch) -> Loss:
        nll = -outputs.logprobs.sum()
        entropy = outputs.entropy.sum()
        return Loss(
            less_entropy(nll, entropy, self.options.entropy_coef), {"nll": nll.detach(), "entropy": entropy.detach()}
        )

    def heldout(self, policy: Policy, trajectories: list[Trajectory]) -> dict[str, list[float]]:
        groups = [[trajectory] for trajectory in trajectories]
        batch = grouped_batch(groups, policy, share=False, whole=False)
        logprobs_N = flat(policy.score(batch)["logprobs"])
        episodes_N = flat([sequence.fields[EPISODE] for sequence in batch.sequences], torch.long)
        lengths_E = episode_sums(torch.ones_like(logprobs_N), episodes_N)
        return {"nll": (-episode_sums(logprobs_N, episodes_N) / lengths_E).tolist()}
