"""Imitation of logged episodes, weighted by their returns."""

import torch
from pydantic import Field

from lmrl import Objective, ObjectiveOptions
from lmrl.objectives import Loss
from lmrl.trajectories.batch import to_batch


class Tilted(Objective):
    """L = -w log pi(a|s), with w = exp(return / temperature) over its mean (Peters and Schaal, ICML 2007)."""

    class Options(ObjectiveOptions):
        """Imitation, weighted by exp(return / temperature)."""

        temperature: float = Field(1.0, gt=0)
        """Difference in return that makes an episode count e times as much."""

        def mistakes(self, recipe):
            if recipe.source.plays:
                yield f"objective '{self.name}' learns from logged episodes: set source.name=dataset"

    label, loss_of_data = "tilted", "nll"

    def __init__(self, options):
        self.temperature = options.temperature

    def prepare(self, policy, trajectories):
        batch = to_batch(trajectories)
        returns_E = torch.tensor([one.reward for one in trajectories])
        weights_E = (returns_E / self.temperature).softmax(0) * len(trajectories)
        batch.set("weight", weights_E.repeat_interleave(torch.tensor([one.num_actions for one in trajectories])))
        return batch

    def loss(self, outputs, batch):
        nll_N = -outputs.logprobs
        return Loss((batch.fields["weight"] * nll_N).sum(), {"nll": nll_N.sum().detach()})
