"""Continuous actions learn through the objectives and the updater that train language models (see gaussian.py)."""

import math

import numpy as np
import pytest
import torch

from lmrl.objectives.grpo import GRPO
from lmrl.objectives.ppo import PPO
from lmrl.policy.passes import ForwardRequest
from lmrl.recipe import Optimizer
from lmrl.recipe.objectives import GRPOObjective, PPOObjective
from lmrl.training.updater import Updater
from lmrl.trajectories.batch import to_batch
from tests.learning.gaussian import TARGETS, new_policy, play

STEPS = 15
LIMITS = {"epochs": 4, "minibatches": 1, "target_kl": None}  # target_kl asks for an entropy that is never negative
DISTANCE = float(np.mean([math.hypot(*target) for target in TARGETS.values()]))
"""What an episode earns that ends at its target."""


def train(policy, objective, cut):
    """Mean returns of the steps, and the statistics of the first."""
    rng = np.random.default_rng(0)
    updater = Updater(policy, Optimizer(lr=2e-2, head_lr=2e-2), STEPS)
    returns, first = [], {}
    for step in range(1, STEPS + 1):
        objective.begin(step)
        updater.begin(step)
        played = play(policy, groups=12, samples=4, rng=rng, cut=cut)
        batch = objective.prepare(policy, played)
        for _ in range(objective.epochs):
            for minibatch in batch.minibatches(rng, objective.minibatches):
                stats = updater.step(policy, objective, minibatch)
                first = first or batch.stats | stats
        returns.append(float(np.mean([one.reward for one in played])))
    return returns, first


@pytest.mark.parametrize("name", ["ppo", "grpo", pytest.param("ppo cut", marks=pytest.mark.slow)])
def test_gaussian_actions_reach_their_targets(name):
    policy = new_policy()
    if name == "grpo":
        objective = GRPO(GRPOObjective(name="grpo", **LIMITS))
    else:
        objective = PPO(PPOObjective(name="ppo", value_warmup_steps=0, **LIMITS))
    returns, first = train(policy, objective, cut=name == "ppo cut")
    assert abs(first["approx_kl"]) < 1e-6 and abs(first["sampler_kl"]) < 1e-5  # fresh data has a ratio of 1
    assert returns[0] < 0 < 0.5 * DISTANCE < np.mean(returns[-3:]), returns


def test_score_is_the_density_that_was_sampled_from():
    """By hand: a mean of 0 and a deviation of exp(-1) in two dimensions."""
    policy = new_policy()
    played = play(policy, groups=3, samples=1, rng=np.random.default_rng(1), cut=False)
    scored = policy.score(to_batch(played), ForwardRequest())["logprobs"]
    for one, found in zip(played, scored, strict=True):
        (segment,) = one.segments
        expected = [
            sum(-0.5 * (x / math.exp(-1)) ** 2 + 1 - 0.5 * math.log(2 * math.pi) for x in vector)
            for vector in segment.vectors.values()
        ]
        torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-5, atol=1e-5)
        assert [segment.logprobs[place] for place in segment.actions] == pytest.approx(expected, abs=1e-5)
