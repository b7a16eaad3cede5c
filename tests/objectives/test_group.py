"""Policy gradients with a group for a baseline, by hand."""

import copy
import math

import pytest
import torch

from lmrl.objectives import load_objective
from lmrl.objectives.group import GroupPolicyGradient
from lmrl.objectives.turns import (
    Turns,
    group_scales,
    less_group_mean,
    sums_to_go,
)
from lmrl.recipe import OBJECTIVES, Optimizer
from lmrl.training.updater import Updater
from lmrl.trajectories.trajectory import CONTEXT, Segment, Trajectory


def objective(name, **changes) -> GroupPolicyGradient:
    return load_objective(OBJECTIVES[name](name=name, **changes))


def episode(action, reward, group=0, context=(1, 2, 3)):
    tokens = [*context, *action]
    turns = [CONTEXT] * len(context) + [0] * len(action)
    logprobs = [None] * len(context) + [-1.0] * len(action)
    rewards = [0.0] * (len(tokens) - 1) + [reward]
    return Trajectory([Segment(tokens, turns, logprobs, rewards)], "", "", reward=reward, group=group)


def game(*rewards, group=0):
    """An episode of a token a turn, with a reward at each."""
    segment = Segment()
    for turn, reward in enumerate(rewards):
        segment.observe([1 + turn])
        segment.act([4 + turn], [-1.0], turn)
        segment.rewards[-1] = reward
    return Trajectory([segment], "", "", reward=sum(rewards), group=group)


def advantages_of(method, policy, episodes):
    return method.prepare(policy, episodes).get("advantages").tolist()


@pytest.fixture
def episodes():
    return [
        episode([4, 5], 1.0),
        episode([6], 0.0),
        episode([7, 8, 9], 0.5),
        episode([4], 2.0, group=1, context=(5, 5)),
        episode([6, 6], 2.0, group=1, context=(5, 5)),
    ]


# ---------------------------------------------------------------------------------------------------------- baselines
def turns(rewards, groups=None, index=None):
    count = len(rewards)
    zeros = torch.zeros(count, dtype=torch.long)
    return Turns(
        torch.tensor(rewards, dtype=torch.float64),
        zeros if index is None else torch.tensor(index),
        zeros if groups is None else torch.tensor(groups),
    )


def test_baselines_by_hand():
    three = turns([1.0, 0.0, 0.5])
    assert less_group_mean(three).tolist() == [0.5, -0.5, 0.0]
    assert less_group_mean(three, leave_one_out=True).tolist() == pytest.approx([0.75, -0.75, 0.0])  # 1 - (0 + .5) / 2
    assert group_scales(three).tolist() == pytest.approx([0.5] * 3)  # the sample's standard deviation
    assert less_group_mean(turns([2.0])).tolist() == group_scales(turns([2.0])).tolist() == [0.0]
    equal = turns([0.3] * 7)
    assert less_group_mean(equal).tolist() == less_group_mean(equal, leave_one_out=True).tolist() == [0.0] * 7
    assert sums_to_go(torch.tensor([1.0, 2.0, 4.0])).tolist() == [7.0, 6.0, 4.0]


def test_a_lone_survivor_is_compared_with_other_groups():
    # Turn 1 is reached by one episode of group 0 and by two of group 1.
    played = turns([4.0, 2.0, 5.0, 7.0, 7.0, 1.0, 3.0], groups=[0, 0, 0, 1, 1, 1, 1], index=[0, 0, 1, 0, 0, 1, 1])
    # Counted from the groups' mean returns, 3 and 7, turn 1 is worth 2 against -6 and -4.
    assert less_group_mean(played).tolist() == [1.0, -1.0, 7.0, 0.0, 0.0, -1.0, 1.0]
    assert less_group_mean(turns([4.0, 2.0, 5.0], index=[0, 0, 1])).tolist() == [1.0, -1.0, 0.0]  # nobody else anywhere


def test_an_only_episode_is_compared_with_nobody():
    """The others of group 1 have failed. Its return from turn 1, counted from its own, is minus what it earned before."""
    played = turns([4.0, 2.0, 5.0, 1.0, 9.0, 3.0], groups=[0, 0, 0, 0, 1, 1], index=[0, 0, 1, 1, 0, 1])
    assert less_group_mean(played).tolist() == [1.0, -1.0, 2.0, -2.0, 0.0, 0.0]
    # Nor does it count as the other groups' turn 1: that is reached by 5 - 3 and by 7 - 4, and by it with 3 - 9.
    played = turns(
        [4.0, 2.0, 5.0, 4.0, 4.0, 7.0, 9.0, 3.0], groups=[0, 0, 0, 1, 1, 1, 2, 2], index=[0, 0, 1, 0, 0, 1, 0, 1]
    )
    assert less_group_mean(played).tolist() == [1.0, -1.0, -1.0, 0.0, 0.0, 1.0, 0.0, 0.0]


def test_scale_is_one_number_for_all_turns_of_a_group():
    # Squares around the turns' means: 1 + 1 and 4 + 4, with two degrees of freedom.
    assert group_scales(turns([4.0, 2.0, 5.0, 1.0], index=[0, 0, 1, 1])).tolist() == pytest.approx([5**0.5] * 4)


def test_rewards_that_fall_at_turns_credit_what_follows(tiny_policy):
    """An action gets no credit for what was earned before it."""
    episodes = [game(-1.0, 0.0), game(-1.0, -1.0), game(0.0)]
    # From turn 0: -1, -2, 0 with mean -1. From turn 1: 0 and -1 with mean -.5.
    found = advantages_of(objective("dr_grpo"), tiny_policy, episodes)
    assert found == pytest.approx([0.0, 0.5, -1.0, -0.5, 1.0])
    rloo = advantages_of(objective("rloo", scale_rewards="none"), tiny_policy, episodes)
    assert rloo == pytest.approx([0.0, 1.0, -1.5, -1.0, 1.5])
    # Rewards at the end alone: one advantage an episode, as in the papers.
    assert advantages_of(objective("dr_grpo"), tiny_policy, [game(0.0, 1.0), game(0.0, 0.0)]) == [0.5, 0.5, -0.5, -0.5]


def test_a_scale_for_each_turn_would_be_biased():
    """Stopping earns 1. Continuing earns 1.1 with probability .9, else -1, so .89 on average; then a turn follows in which
    the action does not matter, but half of the episodes lose .01. Stopping is better by .105, and the gradient with one scale
    agrees. With a scale for each turn, the noise of the second turn weighs as much as the choice in the first."""
    generator = torch.Generator().manual_seed(0)
    count = 4000
    go = torch.rand(count, generator=generator) < 0.5
    lucky = torch.rand(count, generator=generator) < 0.9
    loses = torch.rand(count, generator=generator) < 0.5
    second = -0.01 * loses.double()[go]
    first = torch.where(go, torch.where(lucky, 1.1, -1.0).double(), 1.0)
    first[go] += second
    index = torch.cat([torch.zeros(count), torch.ones(int(go.sum()))]).long()
    played = Turns(torch.cat([first, second]), index, torch.zeros_like(index))
    one_scale = less_group_mean(played) / group_scales(played)
    assert one_scale[:count][go].mean() < one_scale[:count][~go].mean()
    noise = one_scale[count:].abs().mean() / one_scale[:count].abs().mean()
    apart = torch.cat([first - first.mean(), second - second.mean()])
    apart = torch.cat([apart[:count] / first.std(), apart[count:] / second.std()])
    assert noise < 0.05 < 0.5 < apart[count:].abs().mean() / apart[:count].abs().mean()


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "rloo", "reinforce_pp"])
def test_a_constant_for_a_group_changes_nothing(tiny_policy, name):
    episodes = [game(-1.0, 0.0), game(-1.0, -1.0), game(0.0), game(-1.0, 0.5, group=1), game(0.25, group=1)]
    before = advantages_of(objective(name), tiny_policy, episodes)
    for one in episodes[:3]:
        one.place_reward(64.0)
        one.reward += 64.0
    assert advantages_of(objective(name), tiny_policy, episodes) == pytest.approx(before, abs=1e-6)
    assert any(before)


def test_cut_episodes_can_be_masked(tiny_policy, episodes):
    episodes[1].cut_turns = [0]
    batch = objective("grpo", mask_cut=True).prepare(tiny_policy, episodes)
    assert batch.get("advantages")[2] == 0 and batch.get("advantages")[0] == 1.0  # it still counts in the baseline
    [micro] = batch.microbatches(10_000, tiny_policy.pad_id)
    assert objective("grpo").count(micro) == pytest.approx(4)  # of five episodes
    penalised = objective("dr_grpo", missing_eos_penalty=1.5).prepare(tiny_policy, episodes)
    assert penalised.get("advantages")[:3].tolist() == [1.0, 1.0, -1.5]  # rewards 1, -1.5, .5 with mean 0


def test_rloo_treats_a_turn_as_one_action(tiny_policy, episodes):
    method = objective("rloo", minibatches=2, scale_rewards="none", dual_clip=None)
    batch = method.prepare(tiny_policy, episodes[:3])
    old = batch.get("old_logprobs")
    batch.set("old_logprobs", old - torch.tensor([0.1, -0.05, 0.1, 0.02, 0.02, 0.02]))
    [micro] = batch.microbatches(10_000, tiny_policy.pad_id)
    loss = method.loss(tiny_policy(micro, method.forward_request), micro)
    # ratios e^.05, e^.1, e^.06 of the turns, with advantages .75, -.75, 0
    assert float(loss.sum.detach()) == pytest.approx(-0.75 * math.exp(0.05) + 0.75 * math.exp(0.1), abs=1e-4)


def test_rloo_loss_does_not_depend_on_microbatches(tiny_policy):
    """Two turns with a context each, and a reward at the end alone: two ratios, wherever the turns are computed."""
    played = []
    for reward in (1.0, 0.0):
        segments = [Segment(), Segment()]
        for turn, segment in enumerate(segments):
            segment.observe([1, 3 + turn])
            segment.act([4, 5 + turn], [-1.0, -1.0], turn)
        segments[-1].rewards[-1] = reward
        played.append(Trajectory(segments, "", "", reward=reward))
    method = objective("rloo", minibatches=2, scale_rewards="none")
    batch = method.prepare(tiny_policy, played)
    moved = torch.tensor([0.02, 0.03, 0.1, -0.04, 0.01, 0.01, -0.03, 0.01])
    batch.set("old_logprobs", batch.get("old_logprobs") - moved)
    for tokens in (10_000, 1):
        micros = batch.microbatches(tokens, tiny_policy.pad_id)
        losses = [method.loss(tiny_policy(micro, method.forward_request), micro).sum for micro in micros]
        expected = -math.exp(0.05) - math.exp(0.06) + math.exp(0.02) + math.exp(-0.02)  # advantages 1 and -1
        assert float(sum(losses).detach()) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("name", "changes", "skipped"),
    [
        ("grpo", {}, True),
        ("dr_grpo", {"constant_length": 10}, True),
        ("rloo", {}, True),
        ("rloo", {"kl_coef": 0.1}, True),
        ("reinforce_pp", {}, False),
        ("grpo", {"kl_coef": 0.1}, False),
        ("grpo", {"entropy_coef": 0.1}, False),
    ],
)
@pytest.mark.parametrize("share", [True, False])
def test_groups_without_a_spread_are_counted_but_not_computed(tiny_policy, episodes, name, changes, skipped, share):
    tiny_policy._reference = [copy.deepcopy(tiny_policy.causal_lm)]
    method = objective(name, share_prompts=share, **changes)
    batch = method.prepare(tiny_policy, episodes)
    updater = Updater(tiny_policy, Optimizer(lr=1e-4), 10)
    found = []
    for marked in (True, False):
        if not marked:
            for sequence in batch.sequences:
                sequence.zero_gradient = False
        sizes = []
        hook = tiny_policy.register_forward_hook(lambda _, args, out, sizes=sizes: sizes.append(len(out.logprobs)))
        stats = updater.backward(tiny_policy, method, batch)
        hook.remove()
        found.append((sum(sizes), stats["loss"], {n: p.grad.clone() for n, p in tiny_policy.model.named_parameters()}))
    (passed, loss, gradients), (all_passed, expected_loss, expected) = found
    # The second group has three action tokens, and so has the episode between the others of the first, if it stands alone.
    assert all_passed - passed == (0 if not skipped else 3 if share else 6)
    assert loss == pytest.approx(expected_loss, abs=1e-7)
    for parameter, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[parameter], rtol=1e-5, atol=1e-7)


def test_where_no_group_has_a_spread_the_gradient_is_zero(tiny_policy, episodes):
    method = objective("grpo")
    batch = method.prepare(tiny_policy, episodes[3:])
    stats = Updater(tiny_policy, Optimizer(lr=1e-4), 10).backward(tiny_policy, method, batch)
    assert stats["loss"] == 0 and stats["entropy"] > 0
    assert all(float(p.grad.abs().max()) == 0 for p in tiny_policy.model.parameters())


def loss_of(policy, method, episodes):
    batch = method.prepare(policy, episodes)
    [micro] = batch.microbatches(10_000, policy.pad_id)
    policy.eval()
    outputs = policy(micro, method.forward_request)
    return method.loss(outputs, micro), method.count(micro), outputs, batch


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "rloo", "reinforce_pp"])
def test_gradients_by_hand(tiny_policy, episodes, name, share):
    """On the first update the gradient is that of -w A log pi, with the method's own weights and advantages."""
    method = objective(name, share_prompts=share, **({"constant_length": 10} if name == "dr_grpo" else {}))
    loss, count, _, batch = loss_of(tiny_policy, method, episodes)
    (loss.sum / count).backward()
    found = [p.grad.clone() for p in tiny_policy.model.parameters()]

    lengths = [2, 1, 3, 1, 2]
    if name == "reinforce_pp":
        per_token = torch.tensor([0.5, 0.5, -0.5, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0])  # less the group's mean
        per_token = (per_token - per_token.mean()) / per_token.std(correction=0)
        advantages, weights = per_token.split(lengths), [1 / 9] * 5
    else:
        advantages = {
            "grpo": [1, -1, 0, 0, 0],
            "dr_grpo": [0.5, -0.5, 0, 0, 0],
            "rloo": [1, -1, 0, 0, 0],  # .75 and -.75, over the root mean square of those that are not 0
        }[name]
        weights = {"grpo": [1 / length / 5 for length in lengths], "dr_grpo": [1 / 50] * 5, "rloo": [1 / 5] * 5}[name]
    tiny_policy.zero_grad()
    total = 0.0
    for one, advantage, weight in zip(episodes, advantages, weights, strict=True):
        tokens = torch.tensor(one.segments[0].tokens)
        logprobs = tiny_policy.model(tokens[None]).logits[0].log_softmax(-1)
        first = one.segments[0].actions[0]
        taken = logprobs[first - 1 : -1].gather(1, tokens[first:, None])[:, 0]
        total = total - (weight * torch.as_tensor(advantage) * taken).sum()
    total.backward()
    for one, other in zip(found, tiny_policy.model.parameters(), strict=True):
        torch.testing.assert_close(one, other.grad, atol=1e-6, rtol=1e-4)
    assert batch.stats["groups"] == 2 and batch.stats["zero_spread"] == 0.5
    assert len(batch.sequences) == (2 if share else 5)


def test_divergence_is_a_term_of_the_loss_or_of_the_reward(tiny_policy, episodes):
    tiny_policy._reference = [copy.deepcopy(tiny_policy.model)]
    with torch.no_grad():
        for parameter in tiny_policy.model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    batch = objective("grpo").prepare(tiny_policy, episodes)
    own = torch.cat(tiny_policy.score(batch)["logprobs"])
    reference = torch.cat(tiny_policy.score(batch, reference=True)["logprobs"])
    plain = [float(part.sum()) for part in (own - reference).split([2, 1, 3, 1, 2])]

    in_loss, count, _, _ = loss_of(tiny_policy, objective("grpo", kl_coef=0.3), episodes)
    without, _, _, _ = loss_of(tiny_policy, objective("grpo"), episodes)
    ratio = reference - own
    k3 = (ratio.exp() - 1 - ratio).split([2, 1, 3, 1, 2])
    expected = 0.3 * sum(float(part.mean()) for part in k3)
    assert float((in_loss.sum - without.sum).detach()) == pytest.approx(expected, abs=1e-5)
    assert float(in_loss.stats["kl"]) / count == pytest.approx(sum(plain) / 5, abs=1e-5)

    rloo = objective("rloo", kl_coef=0.3, scale_rewards="none").prepare(tiny_policy, episodes)
    rewards = [one.reward - 0.3 * kl for one, kl in zip(episodes, plain, strict=True)]
    advantages = torch.cat([sequence.fields["advantages"] for sequence in rloo.sequences])
    assert float(advantages[0]) == pytest.approx(rewards[0] - (rewards[1] + rewards[2]) / 2, abs=1e-5)
    assert rloo.stats["kl"] == pytest.approx(sum(plain) / 5, abs=1e-5)


def test_several_updates_compare_with_the_policy_that_sampled(tiny_policy, episodes):
    batch = objective("grpo").prepare(tiny_policy, episodes)
    assert "old_logprobs" in batch.sequences[0].fields
    assert (
        "old_logprobs"
        not in objective("grpo", epochs=1, minibatches=1).prepare(tiny_policy, episodes).sequences[0].fields
    )


def test_mismatch_with_the_sampler_is_reported(tiny_policy, episodes):
    loss, count, outputs, _ = loss_of(tiny_policy, objective("reinforce_pp"), episodes)
    assert float(loss.stats["sampler_kl"] / count) == pytest.approx(float((-1 - outputs.logprobs.detach()).mean()))


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "rloo", "reinforce_pp"])
def test_rewarded_actions_become_more_likely(tiny_policy, episodes, name):
    from lmrl.recipe import Optimizer

    episodes = episodes[:3]
    method, updater = objective(name), Updater(tiny_policy, Optimizer(lr=1e-2), 10)
    before = torch.cat(tiny_policy.score(method.prepare(tiny_policy, episodes))["logprobs"])
    for step in range(1, 11):
        updater.begin(step)
        stats = updater.step(tiny_policy, method, method.prepare(tiny_policy, episodes))
        assert math.isfinite(stats["loss"])
    after = torch.cat(tiny_policy.score(method.prepare(tiny_policy, episodes))["logprobs"])
    gain = (after - before)[:6]
    assert float(gain[:2].sum()) > 0 > float(gain[2])  # the best of the group, and its worst
