"""The entropy bonus: its gradient, and that there is none without a bonus."""

import pytest
import torch

from lmrl.objectives import load_objective
from lmrl.objectives.base import less_entropy
from lmrl.policy import logprobs
from lmrl.recipe import OBJECTIVES
from lmrl.trajectories.trajectory import CONTEXT, Segment, Trajectory


def episode(action, reward):
    tokens = [1, 2, 3, *action]
    turns, rewards = [CONTEXT] * 3 + [0] * len(action), [0.0] * (len(tokens) - 1) + [reward]
    return Trajectory([Segment(tokens, turns, [None] * 3 + [-1.0] * len(action), rewards)], "", "", reward=reward)


def test_a_bonus_by_hand():
    loss, entropy = torch.tensor([1.0, 2.0]), torch.tensor([0.5, 3.0])
    assert less_entropy(loss, entropy, 0.1).tolist() == pytest.approx([0.95, 1.7])
    assert less_entropy(loss, entropy, 0.0) is loss


@pytest.mark.parametrize("coef", [0.0, 0.1])
@pytest.mark.parametrize("name", ["likelihood", "ppo", "grpo", "dr_grpo", "rloo", "reinforce_pp"])
def test_only_a_bonus_sends_entropy_a_gradient(tiny_policy, monkeypatch, name, coef):
    """A gradient of zeros would do: it would cost as much as any other."""
    sent, own = [], logprobs.slice_gradient
    monkeypatch.setattr(logprobs, "slice_gradient", lambda *args: sent.append(args[5]) or own(*args))
    warm = {"value_warmup_steps": 0} if name == "ppo" else {}
    objective = load_objective(OBJECTIVES[name](name=name, entropy_coef=coef, **warm))
    batch = objective.prepare(tiny_policy, [episode([4, 5], 1.0), episode([6], 0.0)])
    (micro,) = batch.microbatches(10_000, tiny_policy.pad_id)
    objective.loss(tiny_policy(micro, objective.forward_request), micro).sum.backward()
    assert [grad is not None for grad in sent] == [coef > 0]
