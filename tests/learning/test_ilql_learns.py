"""Value-based learning from logged data does better than the data, and stays inside its support."""

import pytest

import lmrl
from lmrl.evaluation.evaluate import Evaluator
from lmrl.evaluation.statistics import summarize
from lmrl.evaluation.suites import load_suite
from lmrl.policy.load import open_policy

STITCHING = [
    "task.nodes=10",
    "task.edge_probability=0.2",
    "model.config.hidden_size=32",
    "model.config.intermediate_size=64",
    "source.episodes=300",
    "stages.bc.training.steps=80",
    "stages.filtered_bc.training.steps=80",
    "stages.bc.optimizer.lr=3e-3",
    "stages.filtered_bc.optimizer.lr=3e-3",
    "optimizer.lr=3e-3",
    "training.steps=120",
    "evaluation.diagnostics_every=0",
]


def stitch(folder, graph, seed):
    """Optimality after ILQL, and by how much that is more than after filtered BC. No walk in the data is a shortest one."""
    overrides = [*STITCHING, f"training.seed={seed}", f"task.graph={graph}"]
    scores = lmrl.train(lmrl.load_recipe("random_walks/stitching", overrides), output=folder).scores
    final = scores["ILQL"]["optimality"]["mean"]
    return final, final - scores["filtered BC"]["optimality"]["mean"]


def test_ilql_stitches_what_imitation_cannot(tmp_path):
    final, gain = stitch(tmp_path / "run", graph=1, seed=0)
    assert final > 0.85 and gain > 0.05


@pytest.mark.slow
def test_ilql_stitches_on_other_graphs(tmp_path):
    found = [stitch(tmp_path / str(seed), graph, seed) for seed, graph in enumerate((1, 2, 4, 5, 6))]
    finals, gains = zip(*found, strict=True)
    assert summarize(finals)["mean"] > 0.95 and min(finals) > 0.85, finals
    assert summarize(gains)["ci95"][0] > 0.05, gains


COLLAPSE = [
    "source.episodes=60",
    "stages.bc.training.steps=150",
    "stages.filtered_bc.training.steps=1",
    "training.steps=60",
    "objective.cql_coef=0",
    "objective.start_value=0",
    "evaluation.episodes=2",
    "evaluation.diagnostics_every=0",
]


@pytest.mark.slow
def test_without_push_down_decoding_collapses_and_the_support_mask_cures_it(tmp_path):
    """Tokens never seen keep Q = 0, above all that is legal, where every step costs 1: -4 for each illegal move."""
    result = lmrl.train(lmrl.load_recipe("maze/ilql", COLLAPSE), output=tmp_path / "run")
    policy = open_policy(str(result.checkpoint))
    returns = {}
    for support in (0.0, 0.01):
        suite = load_suite(
            "maze", [f"rollouts.support={support}", "rollouts.beta=64", "samples=1", "rollouts.max_new_tokens=4"]
        )
        returns[support] = Evaluator(policy, suite)()[0]["return"]["mean"]
    assert returns[0.0] < -300, returns
    assert returns[0.01] > -110, returns


@pytest.mark.slow
def test_a_pessimistic_start_cures_it_too(tmp_path):
    overrides = [*COLLAPSE, "objective.start_value=lowest", "training.steps=30"]
    result = lmrl.train(lmrl.load_recipe("maze/ilql", overrides), output=tmp_path / "run")
    suite = load_suite("maze", ["rollouts.support=0", "rollouts.beta=4", "samples=1", "rollouts.max_new_tokens=4"])
    assert Evaluator(open_policy(str(result.checkpoint)), suite)()[0]["return"]["mean"] > -150
