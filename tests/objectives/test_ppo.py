"""PPO against hand-computed cases and an independent float64 reference."""

import copy
import math

import numpy as np
import pytest
import torch

from lmrl.errors import RecipeError
from lmrl.objectives.policy_gradient import bearable, k3, policy_loss, whiten
from lmrl.objectives.ppo import PPO, adapt_kl_coef, advantages, value_loss
from lmrl.policy.load import load_policy
from lmrl.policy.passes import ForwardRequest, Outputs
from lmrl.recipe import Model, Optimizer, PPOObjective
from lmrl.training.updater import Updater
from lmrl.trajectories.batch import to_batch
from lmrl.trajectories.chain import rewards_and_turns
from lmrl.trajectories.trajectory import Segment, Trajectory
from tests.conftest import TINY_LLAMA


def options(**changes) -> PPOObjective:
    return PPOObjective(name="ppo", **{"value_warmup_steps": 0, "value_normalization": "none", **changes})


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


def test_dual_clip_bounds_the_loss_of_a_bad_action():
    # A = -1 at ratios 2 and 9 with the bound at 3: losses 2 and 3, and no gradient beyond; A = 1 is clipped as ever
    logprobs = torch.tensor([math.log(2), math.log(9), math.log(9)], requires_grad=True)
    loss, clipped = policy_loss(logprobs, torch.zeros(3), torch.tensor([-1.0, -1.0, 1.0]), 0.2, 0.2, dual=3.0)
    torch.testing.assert_close(loss, torch.tensor([2.0, 3.0, -1.2]))
    loss.sum().backward()
    assert clipped.tolist() == [False, True, True] and logprobs.grad.tolist() == pytest.approx([2.0, 0.0, 0.0])


def test_value_loss_by_hand():
    # value 2, old 0, return 2: the free error is 0, held at .2 it is 1.8^2
    assert value_loss(torch.tensor([2.0]), torch.zeros(1), torch.tensor([2.0]), 0.2).item() == pytest.approx(1.62)
    assert value_loss(torch.tensor([2.0]), torch.zeros(1), torch.tensor([2.0]), None).item() == 0.0


def test_k3_and_whiten():
    assert k3(torch.tensor([0.0]), torch.tensor([math.log(2)])).item() == pytest.approx(2 - 1 - math.log(2))
    assert k3(torch.tensor([-1.0]), torch.tensor([-1.0])).item() == 0
    assert whiten(torch.tensor([1.0, 3.0])).tolist() == pytest.approx([-1, 1])
    assert whiten(torch.tensor([1.0, 3.0]), floor=4.0).tolist() == [-0.25, 0.25]
    equal = torch.full((7,), 0.1 + 0.2, dtype=torch.float64) + torch.arange(7) * 1e-17
    assert whiten(equal).tolist() == [0.0] * 7


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
        gain = min(ratio * a, np.clip(ratio, 1 - o.clip, 1 + high) * a)
        total -= max(gain, o.dual_clip * a) if a < 0 and o.dual_clip is not None else gain
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
        {"value_clip": 0.2},
        {"dual_clip": 1.5},
        {"dual_clip": None},
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
    torch.testing.assert_close(
        sequence.fields["returns"], torch.tensor(expected) + expected_values, rtol=1e-5, atol=1e-5
    )
    assert sequence.states.tolist() == states


@pytest.mark.parametrize(("gammas", "bootstraps"), [((1.0, 1.0), False), ((0.5, 1.0), True), ((1.0, 0.9), True)])
def test_without_a_discount_a_limit_ends_the_episode(tiny_policy, gammas, bootstraps):
    """Otherwise nothing fixes the values of a task whose episodes all end at a limit."""
    policy = tiny_policy.eval()
    policy.values.v.bias.data.fill_(3.0)
    gamma, gamma_token = gammas
    objective = PPO(options(gamma=gamma, gamma_token=gamma_token, lam=1.0))
    cut, whole = (
        objective.prepare(policy, [two_turns(terminated)]).get("returns").tolist() for terminated in (False, True)
    )
    assert whole == pytest.approx(
        [gamma_token * (1 + gamma * gamma_token * 2), 1 + gamma * gamma_token * 2, gamma_token * 2, 2]
    )
    assert (cut != whole) == bootstraps


def test_turns_of_one_token_have_no_discount_inside(tiny_policy):
    segment = Segment()
    for turn in range(2):
        segment.observe([3 + turn])
        segment.act([6], [-1.0], turn)
    segment.rewards[-1] = 1.0
    segment.observe([5])
    tiny_policy.values.v.bias.data.fill_(3.0)
    cut = Trajectory([segment], "", "", terminated=False)
    assert PPO(options(gamma_token=0.9, lam=1.0)).prepare(tiny_policy.eval(), [cut]).get("returns").tolist() == [
        1.0,
        1.0,
    ]


def test_missing_eos_penalty_falls_on_the_cut_turn():
    trajectory = two_turns()
    trajectory.cut_turns = [0]
    rewards, turns = rewards_and_turns(trajectory, cut_penalty=0.5)
    assert rewards.tolist() == [0.0, 0.5, 0.0, 2.0]
    assert turns.tolist() == [0, 0, 1, 1]


def test_divergence_in_the_reward(tiny_policy):
    """k1: the reward of a token falls by coef * (log pi - log reference)."""
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
    objective.loss(tiny_policy(micro, objective.forward_request), micro).sum.backward()
    assert tiny_policy.values.v.weight.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in tiny_policy.model.parameters())
    objective.begin(2)
    assert objective.forward_request == ForwardRequest(logprobs=True, values=True, detach_values=False, value_pull=1.0)


@pytest.mark.parametrize(
    ("stated", "optimizer", "pull"),
    [("auto", "namo", 0.1), ("auto", "adamw", 1.0), (0.5, "namo", 0.5), (None, "namo", None)],
)
def test_value_pull_follows_the_optimizer(stated, optimizer, pull):
    objective = PPO(options(value_warmup_steps=0, value_pull=stated))
    objective.optimizer = optimizer
    objective.begin(1)
    assert objective.forward_request.value_pull == pull


def test_detach_value_stops_the_critic_at_the_trunk(tiny_policy):
    torch.nn.init.normal_(tiny_policy.values.v.weight)
    objective = PPO(options(detach_value=True))
    objective.begin(1)
    micro = objective.prepare(tiny_policy, [two_turns()]).microbatches(100, 0)[0]
    values = tiny_policy(micro, objective.forward_request).values
    gradients = torch.autograd.grad(values.sum(), list(tiny_policy.model.parameters()), allow_unused=True)
    assert all(gradient is None for gradient in gradients)


def test_categories_of_another_range_are_refused():
    """Targets would be sorted into bins of the new range, and read off in the old one."""
    one = PPO(options(value_loss="hl_gauss", value_range=(-0.3, 2.0)))
    policy = load_policy(Model(config=dict(TINY_LLAMA)), texts=lambda: ["abc"], heads=one.heads)
    one.calibrate(policy, [])
    one.start(policy)
    with pytest.raises(RecipeError, match=r"set objective.value_range=\[-0.3,2\]"):
        PPO(options(value_loss="hl_gauss", value_range=(-3.0, 2.0))).start(policy)
    PPO(options()).start(policy)


def test_target_kl_rejects_a_minibatch():
    objective = PPO(options(target_kl=0.1))
    assert objective.rejects({"approx_kl": 0.2}) and not objective.rejects({"approx_kl": 0.05})
    assert objective.rejects({"approx_kl": 0.2, "entropy": 3.0}) and not objective.rejects(
        {"approx_kl": 0.05, "entropy": 0.3}
    )
    assert objective.rejects(
        {"approx_kl": 0.05, "entropy": 0.2}
    )  # the less is left to chance, the less change is borne
    assert bearable(0.1, entropy=-1e-9) == 0.0  # from rounding
    assert not PPO(options(target_kl=None)).rejects({"approx_kl": 99.0})


def test_a_rejected_minibatch_takes_the_policy_back_and_leaves_the_critic(tiny_policy):
    objective, updater = PPO(options(target_kl=1e-9)), Updater(tiny_policy, Optimizer(lr=1e-2), 10)
    batch = objective.prepare(tiny_policy, [two_turns()])
    before = {name: value.clone() for name, value in tiny_policy.state_dict().items()}
    assert "rejected" not in updater.step(tiny_policy, objective, batch)  # nothing has moved yet
    moved, critic = objective.divergence(tiny_policy, batch), tiny_policy.values.v.weight.clone()
    assert moved["approx_kl"] > 1e-3
    stats = updater.step(tiny_policy, objective, batch)
    assert stats["rejected"] == 1
    assert {name: stats[name] for name in moved} == pytest.approx(moved, rel=1e-3)
    assert objective.divergence(tiny_policy, batch)["approx_kl"] < 1e-9
    for name, value in tiny_policy.state_dict().items():
        if not name.startswith("values."):
            torch.testing.assert_close(value, before[name], rtol=0, atol=1e-6)
    assert torch.equal(tiny_policy.values.v.weight, critic) and not torch.equal(critic, before["values.v.weight"])
    assert all(parameter.grad is None for parameter in tiny_policy.parameters())
