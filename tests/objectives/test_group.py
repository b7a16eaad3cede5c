"""Policy gradients with a group for a baseline, by hand."""

import copy
import math

import pytest
import torch

from lmrl.objectives.group import GroupPolicyGradient, centred, leave_one_out, standardised, sums_to_go
from lmrl.recipe import OBJECTIVES, Optimizer
from lmrl.training.updater import Updater
from lmrl.trajectories.trajectory import CONTEXT, Segment, Trajectory


def objective(name, **changes) -> GroupPolicyGradient:
    return GroupPolicyGradient(OBJECTIVES[name](name=name, **changes))


def episode(action, reward, group=0, context=(1, 2, 3)):
    tokens = [*context, *action]
    turns = [CONTEXT] * len(context) + [0] * len(action)
    logprobs = [None] * len(context) + [-1.0] * len(action)
    return Trajectory([Segment(tokens, turns, logprobs, [0.0] * len(tokens))], "", "", reward=reward, group=group)


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
def test_baselines_by_hand():
    rewards = torch.tensor([1.0, 0.0, 0.5])
    assert standardised(rewards).tolist() == pytest.approx([0.5 / 0.5001, -0.5 / 0.5001, 0.0])
    assert centred(rewards).tolist() == [0.5, -0.5, 0.0]
    assert leave_one_out(rewards).tolist() == pytest.approx([0.75, -0.75, 0.0])  # 1 - (0 + .5) / 2
    assert leave_one_out(torch.tensor([2.0])).tolist() == [2.0]
    assert standardised(torch.tensor([2.0])).tolist() == [0.0]
    equal = torch.full((7,), 0.3)
    assert float(equal[0] - equal.mean()) != 0  # what rounding would leave, and epsilon would blow up
    assert standardised(equal).tolist() == centred(equal).tolist() == leave_one_out(equal).tolist() == [0.0] * 7
    assert sums_to_go(torch.tensor([1.0, 2.0, 4.0])).tolist() == [7.0, 6.0, 4.0]


@pytest.mark.parametrize(
    ("name", "changes", "spared"),
    [
        ("grpo", {}, True),
        ("dr_grpo", {"constant_length": 10}, True),
        ("rloo", {}, True),
        ("reinforce_pp", {}, False),
        ("grpo", {"kl_coef": 0.1}, False),
        ("grpo", {"entropy_coef": 0.1}, False),
    ],
)
@pytest.mark.parametrize("share", [True, False])
def test_groups_without_a_spread_are_counted_but_not_computed(tiny_policy, episodes, name, changes, spared, share):
    tiny_policy._reference = [copy.deepcopy(tiny_policy.causal_lm)]
    method = objective(name, share_prompts=share, **changes)
    batch = method.prepare(tiny_policy, episodes)
    updater = Updater(tiny_policy, Optimizer(), 10)
    found = []
    for marked in (True, False):
        if not marked:
            for sequence in batch.sequences:
                sequence.weightless = False
        sizes = []
        hook = tiny_policy.register_forward_hook(lambda _, args, out, sizes=sizes: sizes.append(len(out.logprobs)))
        stats = updater.backward(tiny_policy, method, batch)
        hook.remove()
        found.append((sum(sizes), stats["loss"], {n: p.grad.clone() for n, p in tiny_policy.model.named_parameters()}))
    (passed, loss, gradients), (all_passed, expected_loss, expected) = found
    # The second group has three action tokens, and so has the episode between the others of the first, if it stands alone.
    assert all_passed - passed == (0 if not spared else 3 if share else 6)
    assert loss == pytest.approx(expected_loss, abs=1e-7)
    for parameter, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[parameter], rtol=1e-5, atol=1e-7)


def test_where_no_group_has_a_spread_the_gradient_is_zero(tiny_policy, episodes):
    method = objective("grpo")
    batch = method.prepare(tiny_policy, episodes[3:])
    stats = Updater(tiny_policy, Optimizer(), 10).backward(tiny_policy, method, batch)
    assert stats["loss"] == 0 and stats["entropy"] > 0
    assert all(float(p.grad.abs().max()) == 0 for p in tiny_policy.model.parameters())


def loss_of(policy, method, episodes):
    batch = method.prepare(policy, episodes)
    [micro] = batch.microbatches(10_000, policy.pad_id)
    policy.train(False)
    outputs = policy(micro, method.want)
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
        per_token = torch.tensor([1.0, 1.0, 0.0, 0.5, 0.5, 0.5, 2.0, 2.0, 2.0])
        per_token = (per_token - per_token.mean()) / (per_token.std(correction=0) + 1e-8)
        advantages, weights = per_token.split(lengths), [1 / 9] * 5
    else:
        advantages = {
            "grpo": [0.5 / 0.5001, -0.5 / 0.5001, 0, 0, 0],
            "dr_grpo": [0.5, -0.5, 0, 0, 0],
            "rloo": [0.75, -0.75, 0, 0, 0],
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

    rloo = objective("rloo", kl_coef=0.3).prepare(tiny_policy, episodes)
    rewards = [one.reward - 0.3 * kl for one, kl in zip(episodes, plain, strict=True)]
    advantages = torch.cat([sequence.fields["advantages"] for sequence in rloo.sequences])
    assert float(advantages[0]) == pytest.approx(rewards[0] - (rewards[1] + rewards[2]) / 2, abs=1e-5)
    assert rloo.stats["kl"] == pytest.approx(sum(plain) / 5, abs=1e-5)


def test_several_updates_compare_with_the_policy_that_sampled(tiny_policy, episodes):
    batch = objective("grpo", epochs=2).prepare(tiny_policy, episodes)
    assert "old_logprobs" in batch.sequences[0].fields
    assert "old_logprobs" not in objective("grpo").prepare(tiny_policy, episodes).sequences[0].fields


def test_mismatch_with_the_sampler_is_reported(tiny_policy, episodes):
    loss, count, outputs, _ = loss_of(tiny_policy, objective("reinforce_pp"), episodes)
    assert float(loss.stats["sampler_kl"] / count) == pytest.approx(float((-1 - outputs.logprobs.detach()).mean()))


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "rloo", "reinforce_pp"])
def test_what_was_rewarded_becomes_likelier(tiny_policy, episodes, name):
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
