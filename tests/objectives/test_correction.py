"""Importance weights by hand, against trl's formula, and where they enter."""

import math

import numpy as np
import pytest
import torch

from lmrl.objectives import load_objective
from lmrl.objectives.correction import OLD, WEIGHTS, Correction, importance_weights, mismatch
from lmrl.recipe import OBJECTIVES, Rollouts
from lmrl.trajectories.trajectory import CONTEXT, Segment, Trajectory

MODES = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
# Two episodes, of three tokens and of two, with these ratios; their products are 8/3 and 2.
RATIOS, EPISODES = [4.0, 2.0, 1 / 3, 0.5, 4.0], [0, 0, 0, 1, 1]
BY_HAND = {
    "token_truncate": [2.5, 2.0, 1 / 3, 0.5, 2.5],
    "token_mask": [0.0, 2.0, 1 / 3, 0.5, 0.0],
    "sequence_truncate": [2.5, 2.5, 2.5, 2.0, 2.0],
    "sequence_mask": [0.0, 0.0, 0.0, 2.0, 2.0],
}


@pytest.mark.parametrize("mode", MODES)
def test_by_hand(mode):
    weights, beyond = importance_weights(torch.tensor(RATIOS).log(), torch.zeros(5), torch.tensor(EPISODES), mode, 2.5)
    assert weights.tolist() == pytest.approx(BY_HAND[mode], rel=1e-5)
    assert beyond.tolist() == ([True, False, False, False, True] if "token" in mode else [True] * 3 + [False] * 2)


def test_unknown_log_probabilities_count_as_equal():
    old, sampled = torch.tensor([-1.0, -2.0]), torch.tensor([math.nan, -2.5])
    weights, beyond = importance_weights(old, sampled, torch.zeros(2, dtype=torch.long), "token_truncate", 3.0)
    assert weights.tolist() == pytest.approx([1.0, math.exp(0.5)]) and not beyond.any()
    assert mismatch(old, sampled) == pytest.approx({"sampler_kl": -0.5, "sampler_gap": 0.5})
    assert mismatch(old, torch.full((2,), math.nan)) == {}


def padded_reference(old_BT, sampled_BT, mask_BT, mode, cap):
    """trl 1.16's `vllm_importance_sampling_mode`, on padded rows: a row is an episode, C_max = cap, no C_min."""
    difference_BT = np.where(mask_BT, old_BT - sampled_BT, 0.0)
    level = difference_BT if mode.startswith("token") else difference_BT.sum(1, keepdims=True)
    ratio = np.exp(level)
    ratio = np.minimum(ratio, cap) if mode.endswith("truncate") else np.where(ratio > cap, 0.0, ratio)
    return np.broadcast_to(ratio, mask_BT.shape)


@pytest.mark.parametrize("mode", MODES)
def test_equals_trl(mode):
    rng = np.random.default_rng(0)
    lengths = np.array([3, 1, 7, 5])
    mask_BT = np.arange(7) < lengths[:, None]
    old_BT, sampled_BT = -rng.exponential(1.0, (2, 4, 7))
    expected = padded_reference(old_BT, sampled_BT, mask_BT, mode, 1.5)[mask_BT]
    found, _ = importance_weights(
        torch.tensor(old_BT[mask_BT]),
        torch.tensor(sampled_BT[mask_BT]),
        torch.arange(4).repeat_interleave(torch.tensor(lengths)),
        mode,
        1.5,
    )
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12)
    assert len({*found.tolist()}) > 1


def test_which_correction_is_meant():
    assert Correction.of(Rollouts()) is None
    assert Correction.of(Rollouts(engine="vllm")) == Correction("token_truncate", 3.0)
    assert Correction.of(Rollouts(engine="vllm", correction="none")) is None
    assert Correction.of(Rollouts(correction="sequence_mask", correction_cap=2)) == Correction("sequence_mask", 2.0)


def episode(action, reward, group=0, sampled=-1.0):
    tokens = [1, 2, 3, *action]
    logprobs = [None] * 3 + [sampled] * len(action)
    turns, rewards = [CONTEXT] * 3 + [0] * len(action), [0.0] * (len(tokens) - 1) + [reward]
    return Trajectory([Segment(tokens, turns, logprobs, rewards)], "", "", reward=reward, group=group)


@pytest.mark.parametrize("name", ["ppo", "grpo", "dr_grpo", "rloo", "reinforce_pp"])
def test_weights_multiply_only_the_policy_loss(tiny_policy, name):
    """The loss differs from the uncorrected one by (weight - 1) times each token's own term: value loss and the rest stay."""
    episodes = [episode([4, 5], 1.0), episode([6], 0.0, sampled=-4.0), episode([7, 8, 9], 0.5)]
    more = (
        {"value_coef": 0.7, "value_warmup_steps": 0, "value_normalization": "none"}
        if name == "ppo"
        else {"share_prompts": False}
    )
    corrected, plain = (load_objective(OBJECTIVES[name](name=name, entropy_coef=0.1, **more)) for _ in range(2))
    corrected.correction = Correction("token_truncate", 1.2)
    losses = []
    for method in (plain, corrected):
        batch = method.prepare(tiny_policy, episodes)
        (micro,) = batch.microbatches(10_000, tiny_policy.pad_id)
        losses.append(method.loss(tiny_policy(micro, method.forward_request), micro).sum.detach())
    weights, advantages = micro.fields[WEIGHTS], micro.fields["advantages"]
    assert batch.stats["correction_capped"] == pytest.approx(float((weights == 1.2).float().mean())) != 0
    assert batch.stats["correction_mean"] == pytest.approx(float(weights.mean()))
    share = {
        "ppo": torch.ones_like(weights),
        "grpo": micro.fields.get("share"),
        "dr_grpo": torch.full_like(weights, 1 / 256),
        "rloo": torch.ones_like(weights),
        "reinforce_pp": torch.ones_like(weights),
    }[name]
    if name == "rloo":  # a turn is one action, and bears the mean of its tokens' weights
        share = micro.fields["share"]
    expected = ((weights - 1) * -advantages * share).sum()  # the ratio to the old policy is 1 on the first update
    assert float(losses[1] - losses[0]) == pytest.approx(float(expected), abs=1e-5)
    assert abs(float(expected)) > 1e-4


def test_packed_episodes_keep_their_own_weights(tiny_policy):
    episodes = [episode([4, 5], 1.0), episode([6], 0.0, sampled=-4.0), episode([7, 8, 9], 0.5, sampled=-2.0)]
    found = []
    for share in (False, True):
        method = load_objective(OBJECTIVES["grpo"](name="grpo", share_prompts=share))
        method.correction = Correction("sequence_mask", 100.0)
        batch = method.prepare(tiny_policy, episodes)
        assert len(batch.sequences) == (1 if share else 3)
        found.append(torch.cat([sequence.fields[WEIGHTS] for sequence in batch.sequences]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)
    assert len(found[0].unique()) == 3


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "rloo", "reinforce_pp"])
def test_a_single_update_needs_no_further_pass(tiny_policy, name, monkeypatch):
    """The loss, its gradient and what is reported are those with old log-probabilities from an earlier pass."""
    episodes = [episode([4, 5], 1.0), episode([6], 0.0, sampled=-4.0), episode([7, 8, 9], 0.5)]
    assert tiny_policy.shares_prompts  # found out with passes of its own
    scores, own = [], tiny_policy.score
    monkeypatch.setattr(tiny_policy, "score", lambda *args, **options: scores.append(args) or own(*args, **options))
    found = []
    for minibatches in (1, 2):
        method = load_objective(OBJECTIVES[name](name=name, epochs=1, minibatches=minibatches))
        method.correction = Correction("token_truncate", 1.2)
        batch = method.prepare(tiny_policy, episodes)
        assert len(scores) == minibatches - 1
        micro = batch.collate(range(len(batch.sequences)), tiny_policy.pad_id)
        loss = method.loss(tiny_policy(micro, method.forward_request), micro)
        gradient = torch.autograd.grad(loss.sum, tiny_policy.vocabulary)[0]
        means = {key: float(value) / method.count(batch) for key, value in loss.stats.items()} | batch.stats
        found.append((float(loss.sum.detach()), gradient, means))
    (loss, gradient, means), (expected_loss, expected_gradient, expected_means) = found
    assert loss == pytest.approx(expected_loss, abs=1e-5)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-6)
    assert means.keys() == expected_means.keys() and 0 < means["correction_capped"] < 1
    _, stat_N = method.weights(batch.fields)  # reported as the objective's other means are
    expected = float((stat_N * batch.get(WEIGHTS)).sum()) / method.count(batch)
    assert means["correction_mean"] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(("mode", "sampled"), [("sequence_mask", -1.0), ("token_mask", None)])
def test_other_ratios_take_a_pass(tiny_policy, mode, sampled):
    method = load_objective(OBJECTIVES["grpo"](name="grpo", epochs=1, minibatches=1))
    method.correction = Correction(mode, 1.2)
    batch = method.prepare(tiny_policy, [episode([4, 5], 1.0, sampled=sampled), episode([6], 0.0)])
    assert all(OLD in one.fields and WEIGHTS in one.fields for one in batch.sequences)
