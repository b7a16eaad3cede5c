"""Statistics, suites, and `lmrl.evaluate` on everything a policy can be."""

import json
import math

import pytest

import lmrl
from lmrl.errors import RecipeError
from lmrl.evaluation.statistics import summarize
from lmrl.evaluation.suites import load_suite


def test_interval_by_hand():
    # mean 2, standard deviation 1, t(2) = 4.303: half width 4.303 / sqrt(3)
    summary = summarize([1.0, 2.0, 3.0])
    assert summary["mean"] == 2 and summary["n"] == 3
    assert summary["ci95"] == pytest.approx([2 - 4.303 / math.sqrt(3), 2 + 4.303 / math.sqrt(3)])
    assert summarize([5.0])["ci95"] == [5.0, 5.0]


def test_interval_covers_the_mean():
    import numpy as np

    rng = np.random.default_rng(0)
    hits = sum(low <= 0 <= high for low, high in (summarize(rng.normal(size=50))["ci95"] for _ in range(2000)))
    assert 0.935 < hits / 2000 < 0.965


def test_suite_takes_over_the_task_of_a_run():
    suite = load_suite("random_walks", task={"environment": "random_walks", "graph": 7})
    assert suite.task.graph == 7
    assert load_suite("random_walks", ["task.graph=9"], {"environment": "random_walks", "graph": 7}).task.graph == 9
    other = load_suite("sentiment", task={"environment": "random_walks", "graph": 7})
    assert other.task.prompts.path.endswith("prompts.jsonl")
    with pytest.raises(RecipeError, match="no suite called 'random_walk'; did you mean 'random_walks'"):
        load_suite("random_walk")
    with pytest.raises(RecipeError, match="unknown key 'rollouts.tempratur'"):
        load_suite("random_walks", ["rollouts.tempratur=1"])


def test_a_suite_that_does_not_follow_runs_stays_as_it_is(tmp_path):
    (tmp_path / "own.yaml").write_text("task: {environment: random_walks, graph: 2}\nmetrics: [optimality]\n")
    assert load_suite(tmp_path / "own.yaml", task={"environment": "random_walks", "graph": 7}).task.graph == 2


def test_names_of_lmrls_own_metrics_stay_its_own():
    from lmrl.evaluation.evaluate import summarize_trajectories
    from lmrl.trajectories.trajectory import Trajectory

    scores = summarize_trajectories([Trajectory([], "", "", reward=0.5, components={"reward": 3.0})])
    assert scores["reward"]["mean"] == 0.5 and scores["component/reward"]["mean"] == 3.0


def test_evaluate_a_run_and_its_checkpoints(tmp_path):
    recipe = lmrl.load_recipe(
        "random_walks/bc",
        ["training.steps=4", "training.checkpoint_every=2", "evaluation.every=2", "source.episodes=50", "task.graph=5"],
    )
    result = lmrl.train(recipe, output=tmp_path / "run")
    assert set(result.scores) == {"data", "BC", "optimum"} and result.scores["optimum"]["optimality"]["mean"] == 1
    report = lmrl.evaluate(tmp_path / "run")
    # in-run evaluation and evaluation afterwards play the same episodes with the same weights
    assert report.metrics == result.scores["BC"]
    assert lmrl.evaluate(result.checkpoint, "random_walks").metrics == report.metrics
    assert lmrl.evaluate(tmp_path / "run", checkpoint="step-2").metrics != report.metrics
    lmrl.evaluate(tmp_path / "run", checkpoint="best", overrides=["samples=1"])
    saved = json.loads(report.to_json())
    assert set(saved) == {"suite", "policy", "metrics"} and saved["suite"] == "random_walks"
    assert set(saved["metrics"]["optimality"]) == {"mean", "ci95", "n"}
    assert saved["metrics"]["optimality"]["n"] == 20 * 32


def test_evaluate_any_folder_on_heldout_prompts(tiny_folder):
    report = lmrl.evaluate(tiny_folder, "sentiment", ["rollouts.max_new_tokens=4", "task.prompts.max_tokens=200"])
    assert report.metrics["reward"]["n"] == 64 and list(report.metrics)[0] == "reward"
    with pytest.raises(RecipeError, match="name a suite, --suite NAME"):
        lmrl.evaluate(tiny_folder)
