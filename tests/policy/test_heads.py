"""Heads: categories, push-down, guidance; hand-computed and against dense float64 references."""

import math

import pytest
import torch

from lmrl.policy.heads import Head, HeadsSpec, bin_centres, guide, hl_gauss, probability_ratio
from lmrl.policy.load import load_policy, open_policy
from lmrl.policy.passes import ForwardRequest
from lmrl.recipe import Model
from lmrl.trajectories.batch import Batch, Sequence
from tests.conftest import TINY_LLAMA

LETTERS = "abcdefghijklmnopqrstuvwxyz .,!?"


def policy_with(spec: HeadsSpec, seed: int = 0):
    torch.manual_seed(seed)
    policy = load_policy(Model(config=dict(TINY_LLAMA)), texts=lambda: [LETTERS], heads=spec)
    for head in (*policy.values.q, *policy.values.target_q):
        for parameter in head.parameters():
            torch.nn.init.normal_(parameter.data, std=0.3)
    policy.values.calibrate(start=-2.0, mean=-1.0, scale=3.0, low=-4.0, high=4.0)
    return policy


def test_categories_hold_the_value_they_were_made_of():
    values = torch.tensor([-1.0, 0.0, 0.37, 2.5])
    probs = hl_gauss(values, -2, 3, 51)
    assert torch.allclose(probs.sum(-1), torch.ones(4))
    assert torch.allclose(probs @ bin_centres(-2, 3, 51, probs), values, atol=1e-3)
    # Three bins of width 1 around 0: the middle one holds erf(.5 / (.75 sqrt 2)) of what all three hold.
    (three,) = hl_gauss(torch.tensor([0.0]), -1.5, 1.5, 3)
    inner, outer = math.erf(0.5 / (0.75 * math.sqrt(2))), math.erf(1.5 / (0.75 * math.sqrt(2)))
    assert math.isclose(float(three[1]), inner / outer, rel_tol=1e-5)


def test_guidance_adds_beta_q_and_masks_what_the_behaviour_never_does():
    logits = torch.tensor([[0.9, 0.09, 0.009, 0.001]]).log()
    q = torch.tensor([[0.0, 1.0, 5.0, 5.0]])
    free = guide(logits, q, beta=2.0, support=0.0).softmax(-1)
    weights = torch.tensor([0.9, 0.09 * math.exp(2), 0.009 * math.exp(10), 0.001 * math.exp(10)])
    assert torch.allclose(free[0], weights / weights.sum(), atol=1e-6)
    masked = guide(logits, q, beta=2.0, support=0.01)
    assert masked[0, 2:].isinf().all() and masked[0, :2].isfinite().all()
    uniform = guide(torch.zeros(1, 500), torch.zeros(1, 500), 1.0, 0.01)  # every token below the support: none is lost
    assert uniform.isfinite().all()


@pytest.mark.parametrize("kind", ["mlp", "linear", "tied"])
def test_q_of_actions_and_push_down_against_dense_float64(kind):
    policy = policy_with(HeadsSpec(q=kind))
    values, matrix = policy.values, policy.vocabulary
    hidden, actions = torch.randn(7, 16), torch.randint(0, values.tokens, (7,))
    head = values.q[0]
    dense = values.all(head, head.features(hidden), matrix).double()
    taken, _ = values.taken(head, hidden, actions, matrix)
    assert torch.allclose(dense.gather(1, actions[:, None])[:, 0], taken.double(), atol=1e-5)
    expected = torch.nn.functional.cross_entropy(dense / 2.0, actions, reduction="none")
    pushed, bound = values.push_down(head, hidden, actions, matrix, temperature=2.0)
    assert bound is None and torch.allclose(pushed.double(), expected, atol=1e-4)
    floors = torch.linspace(-3, 3, 7)
    pushed, bound = values.push_down(head, hidden, actions, matrix, 2.0, floors)
    lifted = torch.maximum(dense, floors[:, None].double())
    reference = (lifted / 2).logsumexp(1) - dense.gather(1, actions[:, None])[:, 0] / 2
    assert torch.allclose(pushed.double(), reference, atol=1e-4)
    assert torch.allclose(bound, (dense < floors[:, None]).float().mean(1))


def test_a_calibrated_floor_bounds_the_push_down_from_below():
    """Cal-QL with a floor above every Q pushes nothing down: only the data's action gets a gradient."""
    policy = policy_with(HeadsSpec(q="linear"))
    head, hidden = policy.values.q[0], torch.randn(3, 16)
    actions = torch.tensor([1, 2, 3])
    pushed, bound = policy.values.push_down(head, hidden, actions, policy.vocabulary, 1.0, torch.full((3,), 1e3))
    pushed.sum().backward()
    touched = head.weight.grad.abs().sum(1) > 0
    assert touched.nonzero()[:, 0].tolist() == [1, 2, 3] and torch.equal(bound, torch.ones(3))


@pytest.mark.parametrize("bins", [0, 51])
@pytest.mark.parametrize("kind", ["mlp", "linear", "tied"])
def test_unlearned_heads_say_what_they_were_calibrated_to(kind, bins):
    if bins and kind != "mlp":
        return
    torch.manual_seed(0)
    policy = load_policy(Model(config=dict(TINY_LLAMA)), texts=lambda: [LETTERS], heads=HeadsSpec(q=kind, bins=bins))
    policy.values.calibrate(start=-60.0, mean=-20.0, scale=15.0, low=-70.0, high=5.0)
    hidden = torch.randn(5, 16)
    q = policy.values.guiding(hidden, policy.vocabulary)
    assert torch.allclose(q, torch.full_like(q, -60.0), atol=0.3)
    assert torch.allclose(policy.values.value(hidden)[0], torch.full((5,), -20.0), atol=0.3)


def test_targets_follow():
    policy = policy_with(HeadsSpec(q="linear", trunk="separate"))
    values = policy.values
    before = values.target_q[1].weight.clone()
    values.polyak_update(0.25)
    assert torch.allclose(values.target_q[1].weight, 0.75 * before + 0.25 * values.q[1].weight)
    assert not any(parameter.requires_grad for parameter in values.target_trunk.parameters())


def test_the_lower_twin_guides():
    policy = policy_with(HeadsSpec(q="linear"))
    values, hidden = policy.values, torch.randn(4, 16)
    each = [values.all(head, head.features(hidden), policy.vocabulary) for head in values.target_q]
    assert torch.equal(values.guiding(hidden, policy.vocabulary), torch.minimum(*each))


def test_probability_ratio_is_the_weight_where_the_behaviour_acts():
    """At Q-SFT's optimum, p(a) = pi(a) w(a) + sum_{a' != a} pi(a') (1 - w(a')) / (V - 1): see q_sft.py."""
    size = 1000
    pi = torch.full((size,), 1e-6, dtype=torch.float64)
    pi[:2] = torch.tensor([0.6, 0.4])
    pi /= pi.sum()
    w = torch.zeros(size, dtype=torch.float64)
    w[:2] = torch.tensor([0.9, 0.3])
    left = pi * (1 - w)
    p = pi * w + (left.sum() - left) / (size - 1)
    assert math.isclose(float(p.sum()), 1.0)
    q = probability_ratio(p.log()[None], pi.log()[None])[0]
    assert torch.allclose(q[:2].double(), w[:2], atol=2e-3)
    assert (q[2:] == 1).all()  # the trap: outside the support the ratio is at its highest


def test_autocast_does_not_round_the_logits_of_q_sft():
    """Only the hidden states are in bfloat16, against float64: decoding multiplies an error of the ratio by beta."""
    policy = policy_with(HeadsSpec(value=False, q="probability", twins=1, trunk="separate"))
    policy.autocast_dtype = torch.bfloat16
    models = [policy.values.trunk, policy.values.target_trunk, policy.causal_lm]
    hidden = []
    for model in models:
        torch.nn.init.normal_(model.lm_head.weight.data, mean=0.5, std=2.0)
        model.model.norm.register_forward_hook(lambda _, __, output: hidden.append(output[0].double()))
    tokens = torch.arange(3, 9)
    micro = Batch([Sequence(tokens, torch.arange(5), tokens[1:])]).collate([0], 0)
    with torch.no_grad():
        found = policy.eval()(micro, ForwardRequest(logprobs=False, probability=0.3))
    heads = [model.lm_head.weight.double() for model in (models[0], models[2], models[1])]
    own, pi, target = ((states[:5] @ head.T).log_softmax(-1) for states, head in zip(hidden, heads, strict=True))
    chosen = own.gather(1, tokens[1:, None])[:, 0]
    assert torch.allclose(found.other_logprobs.double(), own.sum(1) - chosen, rtol=1e-5)
    supported = pi >= pi.amax(1, keepdim=True).clamp(max=math.log(0.3))
    best = (target - pi).exp().clamp(max=1).masked_fill(~supported, 0).amax(1)
    assert torch.allclose(found.best_ratio.double(), best, rtol=1e-4) and best.min() < 0.9


@pytest.mark.parametrize("trunk", ["shared", "separate"])
def test_a_saved_policy_guides_as_before(tmp_path, trunk):
    policy = policy_with(HeadsSpec(q="mlp", trunk=trunk, beta=3.0, support=0.02))
    policy.save(tmp_path)
    again = open_policy(str(tmp_path))
    assert again.guidance == policy.guidance and not any(p.requires_grad for p in again.parameters())
    tokens = torch.tensor([[3, 4, 5, 6]])
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    with torch.no_grad():
        one, other = (
            p.eval().next_token_logits(p.new_cache(p.guidance), p.guidance, **inputs) for p in (policy, again)
        )
    assert torch.allclose(one, other)


def test_mlp_is_the_published_head():
    head = Head("mlp", 8, 5)
    assert head.hidden.weight.shape == (16, 8) and head.weight.shape == (5, 16) and not head.weight.any()
