"""ArCHer: targets by hand, the entries of each state, and advantages that all tokens of a turn share."""

import copy
import math

import pytest
import torch

from lmrl.errors import RecipeError
from lmrl.objectives.archer import AFTER, BEGIN, END, INSIDE, KIND, ArCHer, to_turns, turn_targets
from lmrl.objectives.base import Loss
from lmrl.policy.load import load_policy
from lmrl.policy.passes import ForwardRequest, Outputs
from lmrl.recipe import ArCHerObjective, Model
from lmrl.recipe.files import load_recipe
from lmrl.trajectories.batch import Microbatch
from lmrl.trajectories.trajectory import Segment, Trajectory
from tests.conftest import TINY_LLAMA


def options(**changes) -> ArCHerObjective:
    return ArCHerObjective(name="archer", **{"value_warmup_steps": 0, **changes})


@pytest.fixture
def policy():
    torch.manual_seed(0)
    made = load_policy(
        Model(config=dict(TINY_LLAMA)), texts=lambda: ["abcdefghijklmnopqrstuvwxyz"], heads=ArCHer(options()).heads
    ).eval()
    torch.nn.init.normal_(made.values.v.weight, std=0.3)  # the target's stays at 0
    return made


def two_turns(terminated: bool = True) -> Trajectory:
    """Context 3 tokens, turn 0 of 2 tokens, observation of 1, turn 1 of 3 tokens; rewards 1 and 2."""
    segment = Segment()
    segment.observe([3, 4, 5])
    segment.act([6, 7], [-1.0, -1.5], 0)
    segment.observe([8])
    segment.act([9, 10, 1], [-0.5, -0.25, -1.0], 1)
    trajectory = Trajectory([segment], "", "", terminated=terminated)
    trajectory.place_reward(1.0, 0)
    trajectory.place_reward(2.0, 1)
    if not terminated:
        segment.observe([11])
    return trajectory


def targets(lam, last=0.0):
    rewards, values, q = torch.tensor([[1.0, 2.0], [10.0, 20.0], [30.0, 40.0]]).double()
    return [found.tolist() for found in turn_targets(rewards, values, q, last, 0.5, lam)]


def test_targets_by_hand():
    # lam 0: Q_0 <- 1 + .5 V_1 = 11, Q_1 <- 2; V <- Q of the target
    assert targets(0) == [[30, 40], [11, 2]]
    # lam 1: the discounted returns, 1 + .5 * 2 and 2
    assert targets(1) == [[2, 2], [2, 2]]
    # lam .5: V_1 <- .5 * 40 + .5 * 2 = 21; after turn 0: .5 * 20 + .5 * 21 = 20.5, Q_0 <- 11.25; V_0 <- 15 + 5.625
    assert targets(0.5) == [[20.625, 21], [11.25, 2]]
    # a truncated episode goes on: Q_1 <- 2 + .5 * 8, and with lam 1 Q_0 <- 1 + .5 * 6
    assert targets(0, 8.0)[1] == [11, 6] and targets(1, 8.0) == [[4, 6], [4, 6]]


def test_states_of_turns():
    (sequence,) = to_turns(two_turns(terminated=False))
    # tokens 0-2 context, 3 4 a turn, 5 an observation, 6 7 8 a turn, 9 the last observation
    assert sequence.states.tolist() == [2, 3, 4, 5, 6, 7, 8, 9]
    assert sequence.targets.tolist() == [6, 7, 0, 9, 10, 1, 0, 0]
    assert sequence.fields[KIND].tolist() == [BEGIN, INSIDE, END, BEGIN, INSIDE, INSIDE, END, AFTER]


def test_what_an_action_was_chosen_from_stays_with_it():
    trajectory = two_turns()
    trajectory.segments[0].allowed = {4: (6, 7), 7: (9, 10)}
    (sequence,) = to_turns(trajectory)
    assert sequence.allowed == {1: (6, 7), 4: (9, 10)}
    assert [int(sequence.targets[row]) for row in sequence.allowed] == [7, 10]


def test_turns_without_an_observation_between_them():
    segment = Segment()
    segment.observe([3])
    segment.act([6], [-1.0], 0)
    segment.act([7], [-1.0], 1)
    (sequence,) = to_turns(Trajectory([segment], "", "", terminated=True))
    assert sequence.states.tolist() == [0, 1, 1, 2] and sequence.fields[KIND].tolist() == [BEGIN, END, BEGIN, END]


def values_at(policy, trajectory, head=None, trunk=None):
    tokens = torch.tensor([trajectory.segments[0].tokens])
    with torch.no_grad():
        hidden = (trunk or policy.values.trunk)(tokens).last_hidden_state[0]
        return policy.values.to_returns(policy.values.value(hidden, head)[0])


@pytest.mark.parametrize("terminated", [True, False])
def test_prepare_follows_the_definition(policy, terminated):
    torch.nn.init.normal_(policy.values.target_v.weight, std=0.3)
    trajectory = two_turns(terminated)
    policy.values.renormalise(0.5, 2.0)
    online = values_at(policy, trajectory)
    target = values_at(policy, trajectory, policy.values.target_v, policy.values.target_trunk)
    batch = ArCHer(options(gamma=0.5, lam=0.0)).prepare(policy, [trajectory])
    (sequence,) = batch.sequences
    fields = sequence.fields
    assert sequence.states.tolist() == [2, 3, 4, 5, 6, 7, 8] and KIND not in fields  # the end of the episode is dropped
    assert fields["real"].tolist() == [1, 1, 0, 1, 1, 1, 0]
    assert fields["critic"].tolist() == [1.25, 0, 1.25, 1.25, 0, 0, 1.25]  # 5 actions, 4 states of turns

    after = float(target[9]) if not terminated else 0.0
    expected = [target[4], 1 + 0.5 * target[5], target[8], 2 + 0.5 * after]  # V_0, Q_0, V_1, Q_1
    regressed = policy.values.to_returns(fields["returns"])[[0, 2, 3, 6]]
    torch.testing.assert_close(regressed, torch.tensor([float(one) for one in expected]).double(), rtol=1e-4, atol=1e-5)

    advantages = torch.stack([online[4] - online[2]] * 2 + [online[8] - online[5]] * 3)
    whitened = (advantages - advantages.mean()) / advantages.std(correction=0)
    found = fields["advantages"]
    torch.testing.assert_close(found[fields["real"] > 0].double(), whitened, rtol=1e-4, atol=1e-5)
    assert found[2] == found[6] == 0
    assert batch.stats["turn_advantage_std"] == pytest.approx(
        float((advantages[0] - advantages[2]).abs()) / 2, rel=1e-4
    )


def test_without_a_discount_a_limit_ends_the_episode(policy):
    torch.nn.init.constant_(policy.values.target_v.bias, 3.0)
    batch = ArCHer(options(lam=1.0)).prepare(policy, [two_turns(terminated=False)])
    found = policy.values.to_returns(batch.sequences[0].fields["returns"])[[0, 2, 3, 6]]
    assert found.tolist() == pytest.approx([3, 3, 2, 2])


def test_turns_with_a_context_each(policy):
    """The second turn's value reaches the first across segments."""
    first, second = Segment(), Segment()
    first.observe([3])
    first.act([4], [-1.0], 0)
    second.observe([5])
    second.act([6, 7], [-1.0, -1.0], 1)
    trajectory = Trajectory([first, second], "", "")
    trajectory.place_reward(1.0, 1)
    batch = ArCHer(options(lam=1.0)).prepare(policy, [trajectory])
    found = [policy.values.to_returns(sequence.fields["returns"]).tolist() for sequence in batch.sequences]
    assert found[0] == pytest.approx([1, 1]) and found[1][::2] == pytest.approx([1, 1])  # between them stands an action


def test_divergence_is_taken_from_the_turns_reward(policy):
    other = copy.deepcopy(policy.causal_lm)
    for parameter in other.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    policy._reference = [other]
    trajectory = two_turns()
    prepared = ArCHer(options(kl_coef=0.7, lam=1.0)).prepare(policy, [trajectory])
    tokens = torch.tensor([trajectory.segments[0].tokens])
    with torch.no_grad():
        own, theirs = (lm(tokens).logits[0].log_softmax(-1) for lm in (policy.causal_lm, other))
    states, actions = [2, 3, 5, 6, 7], [6, 7, 9, 10, 1]
    gap = (own - theirs)[states, actions]
    returns = policy.values.to_returns(prepared.sequences[0].fields["returns"])[[2, 6]]
    expected = [3 - 0.7 * float(gap.sum()), 2 - 0.7 * float(gap[2:].sum())]
    assert returns.tolist() == pytest.approx(expected, rel=1e-4) and gap.abs().max() > 1e-3
    assert prepared.stats["kl"] == pytest.approx(float(gap.sum()), rel=1e-3)


def test_loss_by_hand():
    # two actions and a turn's end: ratios 1.5 and .5 with advantages 1 and -1, clipped at .2; values off by 1, 0 and 2
    numbers = {
        "old_logprobs": [0.0, 0.0, 0.0],
        "advantages": [1.0, -1.0, 0.0],
        "returns": [1.0, 0.0, 2.0],
        "real": [1.0, 1.0, 0.0],
        "critic": [0.5, 0.0, 0.5],
    }
    batch = Microbatch(*[torch.zeros(1)] * 5, {name: torch.tensor(own) for name, own in numbers.items()}, [0], [3])
    outputs = Outputs(
        logprobs=torch.tensor([math.log(1.5), math.log(0.5), 9.0]),
        entropy=torch.tensor([1.0, 2.0, 50.0]),
        values=torch.tensor([0.0, 7.0, 0.0]),
    )
    objective = ArCHer(options(entropy_coef=0.1, value_coef=2.0))
    loss = objective.loss(outputs, batch)
    assert isinstance(loss, Loss)
    # policy -1.2 + .8, critic .5 * (.5 * 1 + .5 * 4) = 1.25 times 2, entropy 3 times .1
    assert float(loss.sum) == pytest.approx(-0.4 + 2.5 - 0.3)
    assert float(loss.stats["entropy"]) == 3.0 and objective.count(batch) == 2.0
    objective.warmup.begin(1, 1)
    assert float(objective.loss(outputs, batch).sum) == 2.5


def test_critic_and_policy_do_not_share_weights(policy):
    objective = ArCHer(options())
    (micro,) = objective.prepare(policy, [two_turns()]).microbatches(100, 0)
    outputs = policy(micro, objective.forward_request)
    assert not any(p.grad is not None for p in policy.parameters())
    outputs.values.sum().backward()
    assert all(parameter.grad is None for parameter in policy.model.parameters())
    assert policy.values.trunk.layers[0].mlp.up_proj.weight.grad.abs().sum() > 0
    assert objective.forward_request == ForwardRequest(logprobs=True, values=True)


def test_the_critic_fits_its_targets(policy):
    """Alone, on one batch: from the whole loss to a hundredth of it."""
    objective = ArCHer(options(value_warmup_steps=99))
    objective.begin(1)
    (micro,) = objective.prepare(policy, [two_turns()]).microbatches(100, 0)
    torch.nn.init.zeros_(policy.values.v.weight)
    weights = [parameter for parameter in policy.values.parameters() if parameter.requires_grad]
    optimizer, losses = torch.optim.Adam(weights, lr=1e-2), []
    for _ in range(150):
        optimizer.zero_grad()
        loss = objective.loss(policy(micro, objective.forward_request), micro).sum
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.01 * losses[0]


def test_a_process_without_episodes_prepares_nothing(policy):
    objective = ArCHer(options())
    objective.begin(1)
    assert objective.prepare(policy, []).sequences == []


def test_the_target_follows(policy):
    before = policy.values.target_v.weight.clone()
    policy.values.polyak_update(0.25)
    expected = before + 0.25 * (policy.values.v.weight - before)
    torch.testing.assert_close(policy.values.target_v.weight, expected)


def test_parameters_are_estimated(policy):
    counts = {True: 0, False: 0}
    for name, parameter in policy.values.named_parameters():
        if "trunk" not in name:
            counts[parameter.requires_grad] += parameter.numel()
    assert options().head_parameters(16, 99) == (counts[True], counts[False])
    own = sum(parameter.numel() for parameter in policy.values.trunk.parameters())
    assert own == sum(parameter.numel() for parameter in policy.values.target_trunk.parameters())
    assert options().trained_parameters(7, 11) == (7, 11)


@pytest.mark.parametrize(
    "changes, said",
    [
        (["task={prompts: {path: x.jsonl}, rewards: ['r.py:f']}"], "has a turn-level critic"),
        (["model.path=m", "model.lora={r: 4}"], "a second copy of all weights"),
        (["rollouts.top_p=0.9"], "needs the full distribution"),
    ],
)
def test_what_it_cannot_train_is_refused(tmp_path, changes, said):
    (tmp_path / "r.py").write_text("def f(): ...")
    (tmp_path / "x.jsonl").write_text("{}")
    (tmp_path / "m").mkdir()
    with pytest.raises(RecipeError, match=said):
        load_recipe("random_walks/ppo", ["objective={name: archer}", "start=model", *located(changes, tmp_path)])


def located(changes, folder):
    return [change.replace("x.jsonl", f"{folder}/x.jsonl").replace("r.py", f"{folder}/r.py") for change in changes]


@pytest.mark.parametrize("coef", [0.0, 0.1])
def test_only_a_bonus_sends_entropy_a_gradient(policy, coef):
    objective = ArCHer(options(entropy_coef=coef))
    (micro,) = objective.prepare(policy, [two_turns()]).microbatches(100, 0)
    outputs = policy(micro, objective.forward_request)
    outputs.entropy.retain_grad()
    objective.loss(outputs, micro).sum.backward()
    assert (outputs.entropy.grad is not None) == (coef > 0)
