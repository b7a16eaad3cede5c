"""PPO's values: their units, the critic's warm-up, and the bound on their pull at a shared trunk."""

import copy
import math

import pytest
import torch

from lmrl.objectives.ppo import PPO, Warmup, followed, spread
from lmrl.policy.pull import bounded
from lmrl.recipe import Optimizer
from lmrl.training.updater import Updater
from lmrl.trajectories.batch import Batch
from lmrl.trajectories.trajectory import Segment, Trajectory
from tests.objectives.test_ppo import options, two_turns


# -------------------------------------------------------------------------------------------------------------- units
def test_units_of_returns_by_hand():
    assert spread(torch.tensor([1.0, 3.0])) == (2.0, 1.0)
    assert spread(torch.tensor([-3.0, -3.0])) == (-3.0, 3.0)  # equal returns: their size
    assert spread(torch.zeros(4)) is None
    # weight .1: mean 0 + .1 * 2; variance .9 * (1 + .1 * 4) + .1 * 3
    assert followed(0.0, 1.0, 1.0, 2.0, 3.0) == pytest.approx((0.2, math.sqrt(0.9 * 1.4 + 0.3)))
    assert followed(0.0, 0.01, 1.0, 0.0, 0.0)[1] == 0.05  # not below a twentieth of the largest


def test_values_that_are_not_finite_leave_the_units(tiny_policy):
    tiny_policy.values.renormalise(1.0, 2.0, preserve=False)
    torch.nn.init.constant_(tiny_policy.values.v.weight, math.nan)
    stats = PPO(options(value_normalization="returns")).prepare(tiny_policy, [two_turns()]).stats
    assert math.isnan(stats["value_mean"]) and math.isnan(stats["return_std"])
    assert (float(tiny_policy.values.mean), float(tiny_policy.values.std)) == (1.0, 2.0)


def test_new_heads_take_the_units_of_the_first_returns(tiny_policy):
    """Discounts of 1: the returns are 3, 3, 2, 2. A head with a past keeps what its values mean."""
    for new, shift, gain in ((True, 0.0, 1.0), (False, -5.0, 2.0)):
        values, tiny_policy.heads_are_new = copy.deepcopy(tiny_policy.values), new
        PPO(options(value_normalization="returns", lam=1.0)).prepare(tiny_policy, [two_turns()])
        found = (float(tiny_policy.values.shift), float(tiny_policy.values.gain))
        assert found == pytest.approx((shift, gain), abs=1e-5)
        tiny_policy.values = values


def test_equal_returns_have_nothing_to_explain(tiny_policy):
    segment = Segment()
    segment.observe([3, 4])
    segment.act([6], [-1.0], 0)
    segment.rewards[-1] = -1.0
    stats = PPO(options()).prepare(tiny_policy, [Trajectory([segment], "", "")]).stats
    assert (stats["return_std"], stats["explained_variance"]) == (0.0, 0.0)


def test_new_units_keep_what_values_mean(tiny_policy):
    values = tiny_policy.values
    torch.nn.init.normal_(values.v.weight)
    hidden = torch.randn(5, values.v.weight.shape[1])
    values.renormalise(-3.0, 2.0, preserve=False)
    before = values.to_returns(values.value(hidden)[0])
    values.renormalise(10.0, 0.5)
    torch.testing.assert_close(values.to_returns(values.value(hidden)[0]), before, rtol=1e-5, atol=1e-5)
    assert float(values.gain) == 4.0 and float(values.peak) == 2.0


def test_the_head_steps_by_its_share_of_the_gain(tiny_policy):
    updater = Updater(tiny_policy, Optimizer(lr=1e-3, head_lr=1e-2), 10)
    tiny_policy.values.gain.fill_(4.0)
    updater.begin(1)
    assert [group["lr"] for group in updater.strategy.optimizer.param_groups] == [1e-3, 2.5e-3]


def test_warmup_ends_at_a_plateau_or_the_cap():
    warmup, over = Warmup(), []
    for step, explained in enumerate([0.0, 0.3, 0.5, 0.6, 0.605, 0.61], start=1):
        warmup.begin(step, cap=20)
        warmup.add(explained)
        over.append(warmup.over)
    assert over == [False] * 5 + [True]  # .61 is less than .02 above .6, two steps before
    capped = Warmup()
    capped.begin(3, cap=2)
    assert capped.over


# ----------------------------------------------------------------------------------------------------- a shared trunk
def test_values_pull_no_harder_than_the_policy():
    hidden = torch.zeros(3, 2, requires_grad=True)
    tally = torch.zeros(3)
    policy, values = bounded(hidden, 0.5, tally)
    toward = torch.tensor([[3.0, 4.0], [0.0, 1.0], [0.0, 0.0]])
    (policy * toward).sum().backward(retain_graph=True)
    hidden.grad = None
    tally.zero_()
    pull = torch.tensor([[0.0, 1.0], [0.0, 2.0], [0.0, 5.0]])
    ((policy * toward) + (values * pull)).sum().backward()
    # lengths 5, 1, 0 of the policy's allow 2.5, .5, 0: the first is free, the others are shortened
    assert hidden.grad.tolist() == [[3.0, 5.0], [0.0, 1.5], [0.0, 0.0]]
    assert tally.tolist() == [8.0, 6.0, 2.0]


def test_the_bound_does_not_depend_on_microbatches(tiny_policy):
    torch.nn.init.normal_(tiny_policy.values.v.weight)
    objective = PPO(options(value_pull=0.1, value_coef=50.0))
    batch = objective.prepare(tiny_policy, [two_turns(), two_turns(False)])
    found = []
    for tokens in (1000, 1):
        tiny_policy.microbatch_tokens = tokens
        stats = Updater(tiny_policy, Optimizer(lr=1e-4), 10).backward(tiny_policy, objective, batch)
        found.append((stats, [parameter.grad.clone() for parameter in tiny_policy.parameters()]))
    assert found[0][0]["value_pull_bound"] > 0
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-4, abs=1e-6)
    for one, other in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_segments_of_one_episode_share_credit(tiny_policy):
    """With a context of its own for each turn, the second turn's reward still reaches the first."""
    first, second = Segment(), Segment()
    first.observe([3])
    first.act([4], [-1.0], 0)
    second.observe([5])
    second.act([6], [-1.0], 1)
    trajectory = Trajectory([first, second], "", "")
    trajectory.place_reward(1.0, 1)
    objective = PPO(options(lam=1.0, whiten_advantages=False))  # the value head is zero
    batch = objective.prepare(tiny_policy, [trajectory])
    assert isinstance(batch, Batch)
    assert [sequence.fields["returns"].tolist() for sequence in batch.sequences] == [[1.0], [1.0]]
