"""ILQL and its relatives against dense float64 references and hand-computed values."""

import pytest
import torch

from lmrl.errors import DataError
from lmrl.objectives import load_objective
from lmrl.objectives.ilql import expectile_weights, next_values
from lmrl.objectives.q import units
from lmrl.policy.heads import category_loss, hl_gauss
from lmrl.policy.load import load_policy
from lmrl.recipe import ILQLObjective, MCObjective, Model, Optimizer, QSFTObjective
from lmrl.training.updater import Updater
from tests.conftest import TINY_LLAMA
from tests.trajectories.test_chain import episode

LETTERS = "abcdefghijklmnopqrstuvwxyz .,!?"


def build(options, seed=0):
    torch.manual_seed(seed)
    objective = load_objective(options)
    policy = load_policy(Model(config=dict(TINY_LLAMA)), texts=lambda: [LETTERS], heads=objective.heads)
    values = policy.values
    for head in (*values.q, *values.target_q, *(head for head in (values.v, values.target_v) if head is not None)):
        for parameter in head.parameters():
            torch.nn.init.normal_(parameter.data, std=0.2)
    objective.calibrate(policy, [episode()])
    return objective, policy


def compute(objective, policy, trajectories):
    (micro,) = objective.prepare(policy, trajectories).microbatches(10_000, policy.pad_id)
    outputs = policy(micro, objective.forward_request)
    return objective.loss(outputs, micro), outputs, micro


def test_expectile_and_next_values_by_hand():
    assert torch.allclose(expectile_weights(torch.tensor([-2.0, 3.0]), 0.9), torch.tensor([0.1, 0.9]))
    assert next_values(torch.tensor([1.0, 2.0, 3.0])).tolist() == [2, 3, 0]


@pytest.mark.parametrize("q_head", ["mlp", "linear", "tied"])
@pytest.mark.parametrize("trunk", ["shared", "separate"])
def test_the_loss_is_the_published_one(q_head, trunk):
    """Every term recomputed densely in float64 for one terminated and one truncated episode."""
    options = ILQLObjective(
        name="ilql", q_head=q_head, trunk=trunk, gamma=0.9, gamma_token=0.95, expectile=0.8, cql_coef=0.3,
        cql_temperature=2.0, bc_coef=0.5, awbc_beta=0.7, value_normalization="none",
    )  # fmt: skip
    objective, policy = build(options)
    loss, outputs, micro = compute(objective, policy, [episode(), episode(terminated=False)])
    values, unit = policy.values, float(policy.values.scale) ** 2
    states = policy.states(micro)
    hidden, matrix = states.features_ND, policy.vocabulary
    if trunk == "separate":
        hidden = values.trunk(input_ids=micro.tokens_BT, attention_mask=micro.mask_BT).last_hidden_state
        hidden = hidden[micro.rows_N, micro.cols_N]
    q = [values.all(head, head.features(hidden), matrix).double() for head in values.q]
    target_q = states.q_NV.double().gather(1, micro.targets_N[:, None])[:, 0]
    v = values.value(hidden)[0].double()
    next_v = values.value(states.features_ND, values.target_v)[0].tolist()
    logprobs = states.logits_NV.double().log_softmax(-1).gather(1, micro.targets_N[:, None])[:, 0]
    # Two episodes of three actions; the second is truncated, so a fourth state follows.
    rewards, steps = [0, -1, 5, 0, -1, 5], [0.95, 0.9, 0.0, 0.95, 0.9, 0.9]
    total = 0.0
    for place in range(6):
        action = int(micro.targets_N[place])
        target = rewards[place] + steps[place] * next_v[place + 1]
        for one in q:
            total += (float(one[place, action].detach()) - target) ** 2 / unit
            total += 0.3 * float((one[place] / 2).logsumexp(0) - one[place, action] / 2) / unit
        advantage = float(target_q[place] - v[place])
        total += (0.8 if advantage >= 0 else 0.2) * advantage**2 / unit
        weight = min(float(torch.tensor(0.7 * advantage).exp()), 20.0)
        total -= 0.5 * weight * float(logprobs[place])
    assert objective.count(micro) == 6
    assert torch.allclose(loss.sum.double(), torch.tensor(total, dtype=torch.float64), rtol=1e-4)


def test_targets_get_no_gradient_and_a_detached_trunk_none_of_q():
    objective, policy = build(ILQLObjective(name="ilql", q_head="tied", trunk="detached", bc_coef=0.0))
    loss, _, _ = compute(objective, policy, [episode()])
    loss.sum.backward()
    assert all(parameter.grad is None for parameter in policy.values.target_q.parameters())
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in policy.model.parameters())
    assert all(parameter.grad.any() for head in policy.values.q for parameter in head.parameters())


def test_categories_replace_squares():
    options = ILQLObjective(name="ilql", value_loss="hl_gauss", cql_coef=0.0, bc_coef=0.0)
    objective, policy = build(options)
    loss, outputs, micro = compute(objective, policy, [episode()])
    low, high = objective.range
    target = micro.fields["rewards"] + micro.fields["discounts"] * next_values(outputs.target_values)
    expected = sum(category_loss(logits, target, low, high).sum() for logits in outputs.q_logits)
    weights = expectile_weights((outputs.target_q - outputs.values).detach(), options.expectile)
    expected = expected + (weights * category_loss(outputs.value_logits, outputs.target_q, low, high)).sum()
    assert torch.allclose(loss.sum, expected) and loss.sum.requires_grad
    assert torch.allclose(hl_gauss(target, low, high, 51).sum(-1), torch.ones(3))


def test_mc_learns_observed_returns():
    options = MCObjective(name="mc", gamma=0.5, gamma_token=0.8, cql_coef=0.0, bc_coef=0.0)
    objective, policy = build(options)
    loss, outputs, _ = compute(objective, policy, [episode()])
    returns = torch.tensor([1.2, 1.5, 5.0])
    expected = (policy.values.to_returns(outputs.q[0]) - returns) ** 2 / policy.values.std**2
    assert torch.allclose(loss.sum.double(), expected.sum()) and len(policy.values.q) == 1
    objective, policy = build(options.model_copy(update={"value_normalization": "none"}))
    loss, outputs, _ = compute(objective, policy, [episode()])
    assert torch.allclose(loss.sum, ((outputs.q[0] - returns) ** 2).sum() / policy.values.scale**2)


def test_mc_learns_no_return_that_a_truncation_hides():
    """Of the truncated episode's three tokens the last lacks a twentieth of the value that follows, and is left out."""
    options = MCObjective(name="mc", gamma=0.05, gamma_token=0.5, cql_coef=0.3, cql_temperature=2.0, bc_coef=0.5)
    options.value_normalization = "none"
    objective, policy = build(options)
    loss, outputs, micro = compute(objective, policy, [episode(terminated=False), episode()])
    known = torch.tensor([1.0, 1, 0, 0, 1, 1, 1])  # the fourth asks for the value of the last state
    real = torch.tensor([1.0, 1, 1, 0, 1, 1, 1])
    returns = torch.tensor([-0.375, -0.75, 0, 0, -0.375, -0.75, 5])
    q = policy.values.all(
        policy.values.q[0], policy.values.q[0].features(policy.states(micro).features_ND), policy.vocabulary
    )
    taken = q.gather(1, micro.targets_N[:, None])[:, 0]
    push = (q / 2).logsumexp(1) - taken / 2
    expected = known * ((taken - returns) ** 2 + 0.3 * push) / policy.values.scale**2 - 0.5 * real * outputs.logprobs
    assert torch.allclose(loss.sum, expected.sum(), rtol=1e-4)
    assert float(loss.stats["known"]) == 5 and objective.count(micro) == 6
    (gradient,) = torch.autograd.grad(loss.sum, outputs.q, retain_graph=True)
    assert gradient[0][known == 0].tolist() == [0, 0] and gradient[0][known == 1].all()


def test_a_truncated_episode_has_no_floor():
    """Floors of the terminated episode alone lift Q; without a floor the push-down is the plain one."""
    units = {"gamma": 1.0, "value_normalization": "none"}
    objective, policy = build(ILQLObjective(name="ilql", calibrated=True, **units))
    loss, outputs, micro = compute(objective, policy, [episode(terminated=False), episode()])
    plain, plain_policy = build(ILQLObjective(name="ilql", **units))
    _, expected, _ = compute(plain, plain_policy, [episode(terminated=False), episode()])
    assert micro.fields["floors"].tolist() == [-torch.inf] * 3 + [0, 4, 4, 5]
    assert outputs.bound[:3].tolist() == [0, 0, 0] and (outputs.bound[4:] > 0).all()
    assert torch.allclose(outputs.push[:, :3], expected.push[:, :3])
    assert (outputs.push[:, 4:] > expected.push[:, 4:]).all() and loss.sum.isfinite()


def test_returns_that_are_all_hidden_are_refused():
    cut = [[episode(terminated=False)], [episode(terminated=False)]]
    mc, policy = build(MCObjective(name="mc"))
    with pytest.raises(DataError, match="'mc' needs the returns .* all 2 .* are truncated.*terminated=True.*name=ilql"):
        mc.ready(policy, cut, fresh=True)
    calibrated, policy = build(ILQLObjective(name="ilql", calibrated=True))
    with pytest.raises(
        DataError, match="`objective.calibrated` needs the returns .*[.] Else set objective.calibrated=false"
    ):
        calibrated.ready(policy, cut, fresh=True)
    mc.ready(policy, [*cut, [episode()]], fresh=True)
    mc.ready(policy, [], fresh=True)  # fresh episodes alone
    build(MCObjective(name="mc", gamma=0.05, gamma_token=0.5))[0].ready(policy, cut, fresh=True)
    build(ILQLObjective(name="ilql"))[0].ready(policy, cut, fresh=True)


@pytest.mark.parametrize(
    "options", [ILQLObjective(name="ilql", gamma=1.0), QSFTObjective(name="q_sft", gamma=1.0, return_range=(-1.0, 5.0))]
)
def test_values_that_nothing_fixes_are_refused(options):
    """Three tokens of value V(end), V(end), V(end) plus what they earned: any V(end) fits, unless something is discounted."""
    cut = [[episode(terminated=False)], [episode(terminated=False)]]
    objective, policy = build(options)
    with pytest.raises(
        DataError, match=f"'{options.name}' bootstraps .* all 2 logged ones .*: set objective.gamma=0.99"
    ):
        objective.ready(policy, cut, fresh=True)
    objective.ready(policy, [*cut, [episode()]], fresh=True)
    for discounted in ({"gamma": 0.99}, {"gamma_token": 0.99}):  # the first turn has two tokens
        load_objective(options.model_copy(update=discounted)).ready(policy, cut, fresh=True)


def test_cal_ql_reports_how_often_its_bound_binds():
    objective, policy = build(ILQLObjective(name="ilql", calibrated=True, gamma=1.0, value_normalization="none"))
    loss, outputs, micro = compute(objective, policy, [episode()])
    dense = policy.values.all(
        policy.values.q[0], policy.values.q[0].features(policy.states(micro).features_ND), policy.vocabulary
    )
    lifted = (dense < torch.tensor([4.0, 4.0, 5.0])[:, None]).float().mean(1)
    assert float(loss.stats["bound"]) > 0 and outputs.bound.shape == (3,)
    assert (outputs.bound - lifted).abs().max() < 0.5  # the mean over both twins


def test_q_sft_weights_come_from_the_best_supported_ratio():
    options = QSFTObjective(name="q_sft", gamma=0.9, gamma_token=1.0, return_range=(-1.0, 5.0))
    objective, policy = build(options)
    for parameter in policy.values.trunk.parameters():
        torch.nn.init.normal_(parameter.data, std=0.1)
    loss, outputs, micro = compute(objective, policy, [episode()])
    trunk = policy.values.trunk
    p = trunk(input_ids=micro.tokens_BT, attention_mask=micro.mask_BT).logits[micro.rows_N, micro.cols_N]
    p = p.double().log_softmax(-1)
    best = outputs.best_ratio
    # Return-to-go in units of the range: G = -1 + 6 q, so the targets are (r + discount G' + 1) / 6.
    following = [-1 + 6 * float(best[1]), -1 + 6 * float(best[2]), 0.0]
    total = 0.0
    for place, (reward, step) in enumerate([(0, 1.0), (-1, 0.9), (5, 0.0)]):
        weight = min(max((reward + step * following[place] + 1) / 6, 0), 1)
        action = int(micro.targets_N[place])
        others = float(p[place].sum() - p[place, action])
        total -= weight * float(p[place, action]) + (1 - weight) / (p.shape[1] - 1) * others
    assert torch.allclose(loss.sum.double(), torch.tensor(total, dtype=torch.float64), rtol=1e-4)


def test_returns_outside_the_range_are_refused_at_once():
    objective, policy = build(QSFTObjective(name="q_sft", gamma=1.0))
    with pytest.raises(
        DataError, match=r"returns-to-go are 4.0 to 5.0, outside .*\[0, 1\]: set objective.return_range=\[4.0,5.0\]"
    ):
        objective.ready(policy, [[episode()]], fresh=True)
    objective.ready(policy, [[episode()]], fresh=False)  # checked when the stage began
    build(QSFTObjective(name="q_sft", gamma=1.0, return_range=(4.0, 5.0)))[0].ready(policy, [[episode()]], fresh=True)


def test_restricted_actions_are_refused_by_q_sft():
    objective, policy = build(QSFTObjective(name="q_sft", gamma=1.0, return_range=(4.0, 5.0)))
    one = episode()
    (place, *_) = one.segments[0].actions
    one.segments[0].allowed = {place: (one.segments[0].tokens[place],)}
    with pytest.raises(
        DataError, match="actions that were restricted .* set objective.name=ilql, or `segments` to null"
    ):
        objective.ready(policy, [[one]], fresh=True)


def test_the_updater_moves_targets_after_each_step():
    objective, policy = build(ILQLObjective(name="ilql", q_head="linear", polyak=0.5))
    updater = Updater(policy, Optimizer(lr=1e-2), 10)
    before = policy.values.target_q[0].weight.clone()
    updater.step(policy, objective, objective.prepare(policy, [episode()]))
    after = policy.values.q[0].weight
    assert torch.allclose(policy.values.target_q[0].weight, 0.5 * before + 0.5 * after)


def test_calibration_reads_the_data():
    # Returns-to-go 1.2, 1.5, 5 with mean 2.567 and deviation 1.725; rewards -1 and 5 of root mean square 3.606.
    _, policy = build(ILQLObjective(name="ilql", gamma=0.5, gamma_token=0.8, start_value="lowest"))
    values = policy.values
    assert float(values.mean) == pytest.approx(7.7 / 3) and float(values.std) == pytest.approx(1.72498, abs=1e-4)
    assert float(values.offset) == pytest.approx((1.2 - 7.7 / 3) / 1.72498, abs=1e-4)  # the lowest return-to-go
    _, policy = build(ILQLObjective(name="ilql", gamma=0.5, gamma_token=0.8))  # the mean
    assert float(policy.values.offset) == pytest.approx(0, abs=1e-6)
    _, policy = build(
        ILQLObjective(name="ilql", gamma=0.5, gamma_token=0.8, start_value="lowest", value_normalization="none")
    )
    assert float(policy.values.offset) == pytest.approx(1.2) and float(policy.values.scale) == pytest.approx(13**0.5)
    _, policy = build(ILQLObjective(name="ilql", start_value=-3.0))
    assert float(policy.values.offset) == -3.0


def test_units_by_hand():
    # Rewards of -1 a turn: one reward is less than the spread of returns. A lone reward at the end: their spread.
    returns = torch.tensor([-4.0, -3.0, -2.0, -1.0], dtype=torch.float64)
    assert units(returns, -torch.ones(4, dtype=torch.float64)) == (-2.5, 1.0, 1.0)
    lone = torch.tensor([10.0, 10.0, 11.0, 11.0], dtype=torch.float64)
    assert units(lone, torch.tensor([0.0, 10.0, 0.0, 11.0], dtype=torch.float64))[:2] == (10.5, 0.5)
    assert units(torch.zeros(2), torch.zeros(2)) == (0.0, 1.0, 1.0)
    assert units(-torch.ones(2), -torch.ones(2)) == (-1.0, 1.0, 1.0)


def test_targets_in_units_mean_the_same_return():
    objective, policy = build(ILQLObjective(name="ilql", gamma=0.9, gamma_token=0.95))
    trajectories = [episode(), episode(terminated=False)]
    micro = objective.prepare(policy, trajectories).microbatches(10_000, policy.pad_id)[0]
    rewards, steps = torch.tensor([0, -1, 5, 0, -1, 5, 0.0]), torch.tensor([0.95, 0.9, 0.0, 0.95, 0.9, 0.9, 0.0])
    following = torch.linspace(-2, 2, 7)  # normalised values of the next states
    target = policy.values.to_returns(micro.fields["rewards"] + micro.fields["discounts"] * following)
    expected = rewards + steps * policy.values.to_returns(following)
    assert torch.allclose(target[:6].float(), expected[:6].float(), atol=1e-5)
