"""The updater: one gradient however the minibatch is cut, schedules, and non-finite steps."""

import json
import math

import pytest
import torch

from lmrl.errors import NonFiniteError
from lmrl.objectives.base import Loss, Objective
from lmrl.objectives.likelihood import Likelihood
from lmrl.policy.heads import HeadsSpec
from lmrl.policy.passes import ForwardRequest
from lmrl.policy.policy import Policy
from lmrl.recipe import LikelihoodObjective, Optimizer
from lmrl.recipe.files import load_recipe
from lmrl.training.replay import replay
from lmrl.training.updater import Updater, schedule
from lmrl.trajectories.batch import to_batch
from lmrl.trajectories.trajectory import Segment, Trajectory


def batch(count: int = 6):
    trajectories = []
    for index in range(count):
        segment = Segment()
        segment.observe([3, 4, 5][: 1 + index % 3])
        segment.act([6 + index, 7, 8, 9][: 1 + index % 4], None, 0)
        trajectories.append(Trajectory([segment], "", ""))
    return to_batch(trajectories)


def gradient(policy, microbatch_tokens):
    policy.zero_grad()
    policy.microbatch_tokens = microbatch_tokens
    updater = Updater(policy, Optimizer(lr=1e-4), 10)
    stats = updater.backward(policy.train(), Likelihood(LikelihoodObjective(name="likelihood")), batch())
    return stats["loss"], {name: p.grad.clone() for name, p in updater.parameters.items() if p.grad is not None}


def test_gradient_does_not_depend_on_microbatches(tiny_policy):
    policy = tiny_policy.double()
    whole_loss, whole = gradient(policy, 10_000)
    for tokens in (1, 8, 20):
        loss, cut = gradient(policy, tokens)
        assert loss == pytest.approx(whole_loss, rel=1e-12)
        for name, value in whole.items():
            torch.testing.assert_close(cut[name], value, rtol=1e-9, atol=1e-12)


def test_loss_is_the_mean_over_action_tokens(tiny_policy):
    loss, _ = gradient(tiny_policy, 10_000)
    scores = tiny_policy.score(batch())["logprobs"]
    assert loss == pytest.approx(-float(torch.cat(scores).mean()), rel=1e-5)


def test_schedules():
    factors = [schedule(Optimizer(lr=1e-4, schedule="linear", warmup_steps=2), step, 6) for step in range(1, 7)]
    assert factors == pytest.approx([0.5, 1, 1, 0.75, 0.5, 0.25])
    assert schedule(Optimizer(lr=1e-4, schedule="cosine"), 3, 4) == pytest.approx(0.5)
    assert schedule(Optimizer(lr=1e-4), 3, 4) == 1


def test_factors_multiply(tiny_policy):
    updater = Updater(tiny_policy, Optimizer(lr=1.0, head_lr=10.0, schedule="linear"), 4)

    def rates(step):
        updater.begin(step)
        return [group["lr"] for group in updater.strategy.optimizer.param_groups]

    assert rates(3) == pytest.approx([0.5, 5])
    updater.factors["gate"] = 0.5
    updater.factors["other"] = 0.2
    assert rates(3) == pytest.approx([0.05, 0.5])
    updater.factors["gate"] = 0.25  # in place of the one before
    assert rates(3) == pytest.approx([0.025, 0.25])


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_an_update_is_taken_back_from_adams_own_state(tiny_policy, decay):
    policy = tiny_policy.double()
    updater = Updater(policy, Optimizer(lr=1e-2, weight_decay=decay), 10)
    objective = Likelihood(LikelihoodObjective(name="likelihood"))
    for _ in range(3):
        updater.step(policy, objective, batch())
    before = {name: weights.detach().clone() for name, weights in updater.parameters.items()}
    updater.step(policy, objective, batch(4))
    learned = {name: weights for name, weights in updater.parameters.items() if weights.grad is not None}
    assert len(learned) > 10
    assert all((weights - before[name]).abs().max() > 1e-4 for name, weights in learned.items())
    updater.undo_step()
    for name, weights in learned.items():
        torch.testing.assert_close(weights.detach(), before[name], rtol=0, atol=1e-12)
        assert not updater.strategy.optimizer.state[weights]["exp_avg"].any()


def test_the_update_before_a_rejected_minibatch_is_taken_back(tiny_policy):
    class Rejects(Likelihood):
        def rejects(self, stats):
            return len(seen) > 1

    policy, seen = tiny_policy.double(), []
    updater = Updater(policy, Optimizer(lr=1e-2), 10)
    objective = Rejects(LikelihoodObjective(name="likelihood"))
    before = {name: weights.detach().clone() for name, weights in updater.parameters.items()}
    seen.append(updater.step(policy, objective, batch()))
    seen.append(None)
    assert "rejected" not in seen[0] and updater.step(policy, objective, batch())["rejected"] == 1
    for name, weights in updater.parameters.items():
        torch.testing.assert_close(weights.detach(), before[name], rtol=0, atol=1e-12)


def test_weights_without_a_gradient_in_the_last_step_keep_what_they_have(tiny_policy):
    policy = tiny_policy.double()
    updater = Updater(policy, Optimizer(lr=1e-2), 10)
    objective = Likelihood(LikelihoodObjective(name="likelihood"))
    updater.step(policy, objective, batch())
    left = policy.causal_lm.get_input_embeddings().weight
    others = [weights for weights in updater.parameters.values() if weights.grad is not None and weights is not left]
    before = [weights.detach().clone() for weights in (left, *others)]
    left.requires_grad_(False)
    updater.step(policy, objective, batch(4))
    updater.undo_step()
    assert torch.equal(left, before[0])
    for weights, old in zip(others, before[1:], strict=True):
        torch.testing.assert_close(weights.detach(), old, rtol=0, atol=1e-12)


class Critic(Objective):
    """Values alone while they warm up, then the policy as well."""

    label, warming_up = "critic", True

    @property
    def forward_request(self):
        return ForwardRequest(logprobs=not self.warming_up, values=True)

    def loss(self, outputs, micro) -> Loss:
        critic = (outputs.values - 1).square().sum()
        return Loss(critic if self.warming_up else critic - outputs.logprobs.sum())


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_critic_on_its_own_trunk_keeps_an_update_that_the_policy_takes_back(tiny_policy, optimizer):
    policy = Policy(tiny_policy.model, tiny_policy.tokenizer, HeadsSpec(trunk="separate")).double()
    updater, objective = Updater(policy, Optimizer(name=optimizer, lr=1e-2), 10), Critic()
    for _ in range(2):
        updater.step(policy, objective, batch())
    objective.warming_up = False
    updater.step(policy, objective, batch())
    before = {name: weights.detach().clone() for name, weights in updater.parameters.items()}
    updater.step(policy, objective, batch(4))
    moved = {name: weights.detach().clone() for name, weights in updater.parameters.items()}
    updater.undo_step()
    for name, weights in updater.parameters.items():
        expected = moved if name.startswith("values.") else before
        torch.testing.assert_close(weights.detach(), expected[name], rtol=0, atol=1e-12)
        assert (moved[name] - before[name]).abs().max() > 1e-5


def test_the_first_minibatch_of_a_step_is_not_rejected_and_nothing_older_is_undone(tiny_policy):
    class Rejects(Likelihood):
        def rejects(self, stats):
            return True

    updater = Updater(tiny_policy, Optimizer(lr=1e-2), 10)
    objective = Rejects(LikelihoodObjective(name="likelihood"))
    for step in (1, 2):
        updater.begin(step)
        assert "rejected" not in updater.step(tiny_policy, objective, batch())
    updater.begin(3)
    before = {name: weights.detach().clone() for name, weights in updater.parameters.items()}
    updater.undo_step()
    assert all(torch.equal(weights, before[name]) for name, weights in updater.parameters.items())


class Poison(Objective):
    """A loss that is not finite at chosen calls."""

    label = "poison"

    def __init__(self, bad: tuple[int, ...] = (), every: bool = False):
        self.bad, self.every, self.calls = bad, every, 0

    def loss(self, outputs, micro) -> Loss:
        self.calls += 1
        factor = math.nan if self.every or self.calls in self.bad else 1.0
        return Loss(-outputs.logprobs.sum() * factor)


def test_a_non_finite_step_changes_nothing(tiny_policy):
    updater = Updater(tiny_policy, Optimizer(lr=0.1), 10)
    before = {name: p.clone() for name, p in updater.parameters.items()}
    stats = updater.step(tiny_policy, Poison(bad=(1,)), batch())
    assert math.isnan(stats["loss"]) and (updater.skipped, updater.skipped_in_a_row) == (1, 1)
    assert all(torch.equal(before[name], p) for name, p in updater.parameters.items())
    assert not updater.tensors()
    updater.step(tiny_policy, Poison(), batch())
    assert (updater.skipped, updater.skipped_in_a_row) == (1, 0)
    assert any(not torch.equal(before[name], p) for name, p in updater.parameters.items())


def test_the_run_stops_and_keeps_what_broke_it(tmp_path):
    """A plug-in objective turns bad: its minibatch, seed and recipe are kept, and `lmrl replay` sees it again."""
    from lmrl.recipe.files import load_recipe
    from lmrl.training import train

    overrides = [
        f"objective.name={__file__}:Poison",
        "objective.every=true",
        "training.max_nonfinite=2",
        "training.steps=5",
        "source.episodes=20",
        "source.batch_size=4",
        "evaluation.suite=null",
    ]
    with pytest.raises(NonFiniteError, match=r"step 2: 2 updates in a row.*lmrl replay") as caught:
        train(load_recipe("random_walks/bc", overrides), output=tmp_path / "run")
    assert caught.value.exit_code == 1
    (kept,) = (tmp_path / "run" / "bundles").iterdir()
    info = json.loads((kept / "info.json").read_text())
    assert (info["step"], info["seed"], info["reproduce"]) == (2, 0, f"lmrl replay {kept}")
    assert kept.name == "main-step-000002-nonfinite" and info["event"] == "nonfinite"
    replayed = replay(kept)
    assert "loss nan, recorded nan: the same" in replayed.lines and replayed.same
    assert any("gradient of" in line for line in replayed.lines)

    for name in ("event", "pass", "weights", "device", "versions", "microbatch_tokens"):  # as older runs have left it
        del info[name]
    (kept / "info.json").write_text(json.dumps(info))
    (kept / "rng.safetensors").unlink()
    old = kept.rename(tmp_path / "old")
    assert "loss nan, recorded nan: the same" in replay(old).lines


def test_gradient_checkpointing_changes_no_gradient(tiny_policy):
    from lmrl.trajectories.batch import Batch, Sequence

    tokens = torch.arange(3, 15)
    batch = Batch([Sequence(tokens, torch.arange(4, 11), tokens[5:])])
    recipe = load_recipe("random_walks/bc", ["training.gradient_checkpointing=true"])
    gradients, layers = [], []
    first = tiny_policy.causal_lm.model.layers[0].mlp
    first.register_forward_pre_hook(lambda *_: layers.append(1))
    for checkpointed in (False, True):
        if checkpointed:
            tiny_policy.configure(recipe)
            assert tiny_policy.causal_lm.is_gradient_checkpointing
        tiny_policy.begin_update(dropout=False)
        tiny_policy.zero_grad()
        [micro] = batch.microbatches(100, tiny_policy.pad_id)
        tiny_policy(micro).logprobs.sum().backward()
        gradients.append([p.grad.clone() for p in tiny_policy.model.parameters()])
    assert len(layers) == 3  # once without, twice with
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)
