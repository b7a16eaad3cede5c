import math

import torch

from lmrl.objectives.likelihood import Likelihood
from lmrl.policy.passes import Outputs
from lmrl.recipe import LikelihoodObjective


def test_loss_by_hand():
    outputs = Outputs(logprobs=torch.tensor([math.log(0.5), math.log(0.25)]), entropy=torch.tensor([1.0, 2.0]))
    loss = Likelihood(LikelihoodObjective(name="likelihood")).loss(outputs, None)
    assert abs(float(loss.sum) - math.log(8)) < 1e-6
    smoothed = Likelihood(LikelihoodObjective(name="likelihood", entropy_coef=0.1)).loss(outputs, None)
    assert abs(float(smoothed.sum) - (math.log(8) - 0.3)) < 1e-6
