"""PPO against hand-computed cases and an independent float64 reference."""

import math

import numpy as np
import pytest
import torch

from lmrl.objectives.ppo import PPO, adapt_kl_coef, advantages, k3, policy_loss, value_loss, whiten
from lmrl.policy.passes import Outputs, Want
from lmrl.recipe import PPOObjective
from lmrl.trajectories.batch import Batch, to_batch
from lmrl.trajectories.trajectory import Segment, Trajectory


def options(**changes) -> PPOObjective:
    return PPOObjective(name="ppo", **changes)


# -------------------------------------------------------------------------------------------------------- by hand
def test_advantages_by_hand():
    # gamma 1, lambda .5, values 1 2 3, reward 6 at the end, terminated:
    # deltas 2-1=1, 3-2=1, 6-3=3; A3 = 3, A2 = 1 + .5*3 = 2.5, A1 = 1 + .5*2.5 = 2.25
    ones = torch.ones(3)
    result = advantages(torch.tensor([0.0, 0.0, 6.0]), torch.tensor([1.0, 2.0, 3.0]), 0.0, ones, 0.5)
    assert result.tolist() == [2.25, 2.5, 3.0]


def test_truncated_episode_bootstraps():
    result = advantages(torch.tensor([1.0]), torch.tensor([0.5]), 2.0, torch.tensor([0.9]), 0.95)
    assert result.item() == pytest.approx(1.0 + 0.9 * 2.0 - 0.5)


def test_discount_between_turns_differs_from_inside():
    # two turns of one token: only the step between them is discounted by .5
    discounts = torch.tensor([0.5, 0.5])
    result = advantages(torch.tensor([0.0, 4.0]), torch.zeros(2), 0.0, discounts, 1.0)
    assert result.tolist() == [2.0, 4.0]


def test_policy_loss_by_hand():
    logprobs = torch.tensor([math.log(1.5), math.log(0.5), math.log(0.5), math.log(1.5)])
    loss, clipped = policy_loss(logprobs, torch.zeros(4), torch.tensor([1.0, 1.0, -1.0, -1.0]), 0.2, 0.3)
    torch.testing.assert_close(loss, torch.tensor([-1.3, -0.5, 0.8, 1.5]))
    assert clipped.tolist() == [True, False, True, False]


def test_value_loss_by_hand():
    # value 2, old 0, return 2: the free error is 0, held at .2 it is 1.8^2
    assert value_loss(torch.tensor([2.0]), torch.zeros(1), torch.tensor([2.0]), 0.2).item() == pytest.approx(1.62)
    assert value_loss(torch.tensor([2.0]), torch.zeros(1), torch.tensor([2.0]), None).item() == 0.0


def test_k3_and_whiten():
    assert k3(torch.tensor([0.0]), torch.tensor([math.log(2)])).item() == pytest.approx(2 - 1 - math.log(2))
    assert k3(torch.tensor([-1.0]), torch.tensor([-1.0])).item() == 0
    assert whiten(torch.tensor([1.0, 3.0])).tolist() == pytest.approx([-1, 1])


def test_adaptive_coefficient_is_clipped():
    assert adapt_kl_coef(0.1, kl=60, target=6, episodes=10, horizon=100) == pytest.approx(0.1 * 1.02)
    assert adapt_kl_coef(0.1, kl=0, target=6, episodes=10, horizon=100) == pytest.approx(0.1 * 0.98)
    assert adapt_kl_coef(0.1, kl=6.6, target=6, episodes=10, horizon=100) == pytest.approx(0.1 * 1.01)


# ------------------------------------------------------------------------------------------- float64 reference
def reference_loss(new, old, values, old_values, advantage, returns, entropy, ref, o: PPOObjective, kl_coef) -> float:
    """PPO's loss, written once more in plain numpy from the paper."""
    total = 0.0
    for n, op, v, ov, a, r, h, rf in zip(new, old, values, old_values, advantage, returns, entropy, ref, strict=True):
        ratio = np.exp(n - op)
        high = o.clip if o.clip_high is None else o.clip_high
        total -= min(ratio * a, np.clip(ratio, 1 - o.clip, 1 + high) * a)
        error = (v - r) ** 2
        if o.value_clip is not None:
            error = max(error, (np.clip(v, ov - o.value_clip, ov + o.value_clip) - r) ** 2)
        total += o.value_coef * 0.5 * error - o.entropy_coef * h
        if o.kl_in == "loss":
            total += kl_coef * (np.exp(rf - n) - 1 - (rf - n))
    return total


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"clip_high": 0.4, "value_clip": None},
        {"kl_coef": 0.3, "kl_in": "loss"},
        {"entropy_coef": 0.1, "clip": 0.05},
    ],
)
def test_loss_equals_float64_reference(changes):
    rng = np.random.default_rng(0)
    new, old, ref = (-rng.random((3, 50)) * 2).tolist()
    values, old_values, advantage, returns, entropy = rng.normal(size=(5, 50)).tolist()
    o = options(**changes)
    fields = {
        "old_logprobs": old,
        "old_values": old_values,
        "advantages": advantage,
        "returns": returns,
        "reference_logprobs": ref,
    }
    as64 = {name: torch.tensor(value, dtype=torch.float64) for name, value in fields.items()}
    micro = to_batch([Trajectory([Segment([1, 2], [-1, 0], [None, 0.0], [0.0, 0.0])], "", "")]).collate([0], 0)
    micro.fields = as64
    outputs = Outputs(*(torch.tensor(column, dtype=torch.float64) for column in (new, entropy, values)))
    objective = PPO(o)
    objective.begin(1)
    loss = objective.loss(outputs, micro)
    expected = reference_loss(new, old, values, old_values, advantage, returns, entropy, ref, o, o.kl_coef)
    assert float(loss.sum) == pytest.approx(expected, rel=1e-12)


# ----------------------------------------------------------------------------------------------------------- prepare
def two_turns(terminated: bool = True) -> Trajectory:
    """Context 3 tokens, turn 0 of 2 tokens, observation of 1, turn 1 of 2 tokens; reward 1 after each turn."""
    segment = Segment()
    segment.observe([3, 4, 5])
    segment.act([6, 7], [-1.0, -1.5], 0)
    segment.observe([8])
    segment.act([9, 1], [-0.5, -0.25], 1)
    trajectory = Trajectory([segment], "", "", terminated=terminated)
    trajectory.place_reward(1.0, 0)
    trajectory.place_reward(2.0, 1)
    if not terminated:
        segment.observe([10])
    return trajectory


def plain_scores(policy, trajectory):
    """Log-probabilities and values at every position, by the model's own logits."""
    tokens = torch.tensor([trajectory.segments[0].tokens])
    with torch.no_grad():
        out = policy.causal_lm(tokens, output_hidden_states=True)
        values = policy.values.value(out.hidden_states[-1][0])[0]
    return out.logits[0].log_softmax(-1), values


@pytest.mark.parametrize("terminated", [True, False])
def test_prepare_follows_the_definition(tiny_policy, terminated):
    policy = tiny_policy.eval()
    torch.nn.init.normal_(policy.values.v.weight)
    trajectory = two_turns(terminated)
    objective = PPO(options(gamma=0.5, gamma_token=0.9, lam=0.8, whiten_advantages=False))
    sequence = objective.prepare(policy, [trajectory]).sequences[0]

    logprobs, values = plain_scores(policy, trajectory)
    states = [2, 3, 5, 6]  # positions that predict the actions at 3, 4, 6, 7
    expected_values = values[states]
    torch.testing.assert_close(sequence.fields["old_values"], expected_values)
    expected_logprobs = logprobs[states, torch.tensor([6, 7, 9, 1])]
    torch.testing.assert_close(sequence.fields["old_logprobs"], expected_logprobs)
    rewards, discounts = [0, 1, 0, 2], [0.9, 0.5, 0.9, 0.5]
    following = [*expected_values[1:].tolist(), float(values[8]) if not terminated else 0.0]
    carried, expected = 0.0, []
    for r, g, v, f in reversed(list(zip(rewards, discounts, expected_values.tolist(), following, strict=True))):
        carried = r + g * f - v + g * 0.8 * carried
        expected.insert(0, carried)
    torch.testing.assert_close(sequence.fields["advantages"], torch.tensor(expected), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sequence.fields["returns"], torch.tensor(expected) + expected_values)
    assert sequence.states.tolist() == states


def test_missing_eos_penalty_falls_on_the_cut_turn():
    trajectory = two_turns()
    trajectory.cut_turns = [0]
    rewards, turns = PPO(options(missing_eos_penalty=0.5))._rewards_and_turns(trajectory)
    assert rewards.tolist() == [0.0, 0.5, 0.0, 2.0]
    assert turns.tolist() == [0, 0, 1, 1]


def test_divergence_in_the_reward(tiny_policy):
    """k1: the reward of a token falls by coef * (log pi - log reference)."""
    import copy

    policy = tiny_policy.eval()
    other = copy.deepcopy(policy.causal_lm)
    for parameter in other.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    policy._reference = [other]
    trajectory = two_turns()
    o = options(kl_coef=0.7, lam=1.0, whiten_advantages=False)
    sequence = PPO(o).prepare(policy, [trajectory]).sequences[0]
    gap = sequence.fields["old_logprobs"] - sequence.fields["reference_logprobs"]
    assert gap.abs().max() > 1e-3
    shaped = torch.tensor([0.0, 1.0, 0.0, 2.0]) - 0.7 * gap
    torch.testing.assert_close(sequence.fields["returns"], shaped.flip(0).cumsum(0).flip(0), rtol=1e-5, atol=1e-5)


def test_value_warmup_leaves_the_policy_alone(tiny_policy):
    objective = PPO(options(value_warmup_steps=1))
    objective.begin(1)
    batch = objective.prepare(tiny_policy, [two_turns()])
    micro = batch.microbatches(100, 0)[0]
    objective.loss(tiny_policy(micro, objective.want), micro).sum.backward()
    assert tiny_policy.values.v.weight.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in tiny_policy.model.parameters())
    objective.begin(2)
    assert objective.want == Want(logprobs=True, values=True, detach_values=False)


def test_detach_value_stops_the_critic_at_the_trunk(tiny_policy):
    torch.nn.init.normal_(tiny_policy.values.v.weight)
    objective = PPO(options(detach_value=True))
    objective.begin(1)
    micro = objective.prepare(tiny_policy, [two_turns()]).microbatches(100, 0)[0]
    values = tiny_policy(micro, objective.want).values
    gradients = torch.autograd.grad(values.sum(), list(tiny_policy.model.parameters()), allow_unused=True)
    assert all(gradient is None for gradient in gradients)


def test_target_kl_ends_the_epochs():
    objective = PPO(options(target_kl=0.1))
    assert objective.finished({"approx_kl": 0.2}) and not objective.finished({"approx_kl": 0.05})
    assert not PPO(options()).finished({"approx_kl": 99.0})


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
