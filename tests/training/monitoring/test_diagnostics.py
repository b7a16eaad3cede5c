"""Diagnostics: the mathematics by hand, a probe of bounded size, and what runs record of them."""

import math
from types import SimpleNamespace

import pytest
import torch

from lmrl.policy.heads import HeadsSpec
from lmrl.policy.passes import Guidance, States
from lmrl.recipe.files import load_recipe
from lmrl.training import resume_run, train
from lmrl.training.monitoring.diagnostics import (
    Probe,
    dead_units,
    effective_rank,
    guided_diagnostics,
    neighbour_products,
    probe_states,
    start_values,
)
from lmrl.trajectories.batch import to_batch
from tests.conftest import TINY_WALKS
from tests.runs import metrics, stopped_before
from tests.trajectories.test_chain import episode

FEATURES = {"effective_rank", "dead_units", "neighbour_products"}
GUIDED = {"q_data", "kl_behaviour", "outside_mass", "guided_entropy", "q_outside"}
STARTS = {"value_start", "realised_start"}


# ----------------------------------------------------------------------------------------------------------- mathematics
@pytest.mark.parametrize(
    ("singular", "rank"),
    [([1.0, 1.0, 1.0], 3), ([97.0, 2.5, 0.5], 2), ([99.5, 0.3, 0.2], 1), ([50.0, 48.5, 1.5], 3), ([4.0, 0.0, 0.0], 1)],
)
def test_effective_rank(singular, rank):
    assert effective_rank(torch.diag(torch.tensor(singular))) == rank


def test_dead_units():
    live, still, faint, weak = [0.0, 2.0], [7.0, 7.0], [0.0, 0.001], [0.0, 0.004]  # spreads 1, 0, 0.0005 and 0.002
    assert dead_units(torch.tensor([live, still, faint, weak]).T) == 0.5


def test_neighbour_products():
    features = torch.tensor([[2.0, 0.0], [2.0, 0.0], [0.0, 2.0]])  # mean square 2, so products of (4 + 0) / 2 / 2 and 0
    for same, expected in (([True, True], 0.5), ([True, False], 1.0), ([False, True], 0.0), ([False, False], 0.0)):
        assert neighbour_products(features, torch.tensor(same)) == pytest.approx(expected)
    assert neighbour_products(torch.tensor([[3.0, 3.0], [-3.0, -3.0]]), torch.tensor([True])) == pytest.approx(1)


@pytest.mark.parametrize("support", [0.01, 0.0])
def test_guidance_by_hand(support):
    """Three actions of which the last is outside the behaviour."""
    pi, q = [0.9, 0.095, 0.005], [0.0, 1.0, 3.0]
    states = States(torch.zeros(1, 1), torch.tensor([pi]).log(), q_NV=torch.tensor([q]))
    values = SimpleNamespace(spec=HeadsSpec(q="mlp"), to_returns=lambda q: 10 + 2 * q)
    policy = SimpleNamespace(guidance=Guidance(2.0, support), values=values)
    weights = [p * math.exp(2 * value) for p, value in zip(pi, q, strict=True)]
    if support:
        weights[2] = 0.0
    mass = [weight / sum(weights) for weight in weights]
    found = guided_diagnostics(policy, states, torch.tensor([1]))
    assert found == pytest.approx(
        {
            "q_data": 12.0,  # in the unit of the reward
            "q_outside": 16.0,
            "outside_mass": mass[2],
            "kl_behaviour": sum(m * math.log(m / p) for m, p in zip(mass, pi, strict=True) if m),
            "guided_entropy": -sum(m * math.log(m) for m in mass if m),
        },
        abs=1e-5,
    )


def test_start_values_by_hand(tiny_policy):
    """The value before the first action, beside r_1 + 0.8 (r_2 + 0.5 r_3) = -0.8 + 2 of that episode."""
    one, unjudged = episode(), episode()
    unjudged.reward = None
    torch.nn.init.normal_(tiny_policy.values.v.weight.data)
    with torch.no_grad():
        micro = to_batch([one]).collate([0], tiny_policy.pad_id)
        features_ND, values = tiny_policy.states(micro).features_ND, tiny_policy.values
        first = float(values.value(features_ND, values.v)[0][0])
    found = start_values(tiny_policy, [one, unjudged], gamma=0.5, gamma_token=0.8)
    assert abs(first) > 1e-3 and found == {
        "value_start": pytest.approx(first, rel=1e-4),
        "realised_start": pytest.approx(1.2),
    }
    tiny_policy.values.v = None
    assert start_values(tiny_policy, [one], 0.5, 0.8) == {}


# ----------------------------------------------------------------------------------------------------------------- probe
def test_the_probe_is_bounded_by_the_vocabulary():
    assert [probe_states(size) for size in (30, 8192, 16384, 65536, 151_936)] == [1024, 1024, 512, 128, 64]


@pytest.mark.parametrize("states", [1, 2, 4, 100])
def test_a_probe_holds_actions_alone(tiny_policy, states):
    """Of two truncated episodes of three actions, as many as there is room for; no pseudo-action is among them."""
    truncated = [episode(terminated=False), episode(terminated=False)]
    probe = Probe(truncated, states, 1.0, 1.0)
    parts, targets = probe._states(tiny_policy)
    actions = [segment.tokens[at] for one in truncated for segment in one.segments for at in segment.actions]
    assert targets.tolist() == actions[:states] and len(parts.logits_NV) == len(probe.episodes)
    assert probe.episodes == [0, 0, 0, 1, 1, 1][:states]


# ------------------------------------------------------------------------------------------------------------------ runs
RUNS = {
    "ilql": ["objective={name: ilql, support: 0.08}", "source.player=random"],
    "ppo": ["source={name: rollouts}", "rollouts.prompts=6", "objective={name: ppo, missing_eos_penalty: 1}"],
}


@pytest.mark.parametrize("kind", RUNS)
def test_runs_record_diagnostics_and_resume_with_the_same_probe(tmp_path, kind):
    tiny = [change for change in TINY_WALKS if kind == "ilql" or not change.startswith("source.")]
    changes = ["training.steps=5", "training.checkpoint_every=1", "evaluation.episodes=2"]
    recipe = load_recipe("random_walks/bc", [*tiny, *RUNS[kind], *changes, "evaluation.diagnostics_every=2"])
    train(recipe, output=tmp_path / "whole")
    lines = [line for line in metrics(tmp_path / "whole") if line["kind"] == "diagnostics"]
    assert [line["step"] for line in lines] == [2, 4, 5]
    expected = FEATURES | STARTS | (GUIDED if kind == "ilql" else set())
    assert all(set(line) == {"stage", "step", "kind"} | expected for line in lines)
    assert all(math.isfinite(line[name]) for line in lines for name in expected)
    assert len({line["realised_start"] for line in lines}) == 1  # the same episodes throughout
    assert len({line["value_start"] for line in lines}) == 3  # by a policy that learns
    assert all(STARTS <= set(line) for line in metrics(tmp_path / "whole") if line["kind"] == "eval")

    with stopped_before(4):
        train(recipe, output=tmp_path / "torn")
    probe = tmp_path / "torn/stages/main/probe.parquet"
    assert probe.exists() == (kind == "ppo")  # logged episodes are there anyway
    kept = probe.read_bytes() if kind == "ppo" else b""
    resume_run(tmp_path / "torn")
    assert metrics(tmp_path / "torn") == metrics(tmp_path / "whole")
    assert kind == "ilql" or probe.read_bytes() == kept
