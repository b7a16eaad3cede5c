"""The controller of the learning rate."""

import json
import shutil

import pytest

import lmrl
from lmrl.training.listeners.rate import controlled
from lmrl.training.train import resume_run
from tests.conftest import TINY_WALKS


def test_rule_by_hand():
    assert controlled(1.0, moved=0.12, band=0.03) == 0.5  # the divergence grows with the square of the rate
    assert controlled(0.5, moved=30.0, band=0.03) == 0.125  # at most to a quarter
    assert controlled(0.5, moved=0.02, band=0.03) == 0.5
    assert controlled(0.5, moved=0.01, band=0.03) == pytest.approx(0.55)
    assert controlled(1.0, moved=0.0, band=0.03) == 1.0  # never above the recipe's


def lines(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == "train" and row["stage"] == "main"]


def fast_walks(*changes):
    """The recipe random_walks/ppo, tiny, at a rate that is far too high."""
    own = ["optimizer.lr=3e-2", "objective.value_warmup_steps=0", "rollouts.prompts=5", "rollouts.samples=2"]
    own += ["stages.warmup.training.steps=1", "stages.warmup.source.episodes=60", "evaluation.suite=null"]
    sizes = [change for change in TINY_WALKS if not change.startswith(("source.", "training.", "evaluation."))]
    return lmrl.load_recipe("random_walks/ppo", [*sizes, *own, *changes])


def test_a_rate_whose_first_update_is_undone_is_lowered_too(tmp_path):
    recipe = fast_walks("training.steps=1", "objective.target_kl=1e-4")
    lmrl.train(recipe, output=tmp_path)
    (row,) = lines(tmp_path)
    assert row["updates"] == 1 and row["policy_change"] == row["rejected_kl"] > recipe.training.kl_band
    assert row["kl_factor"] == controlled(1.0, row["rejected_kl"], recipe.training.kl_band)


def test_a_rate_that_is_too_high_is_lowered_and_stays_so_on_resume(tmp_path):
    changes = ["training.steps=4", "training.checkpoint_every=2", "objective.target_kl=null", "training.kl_band=1e-3"]
    recipe = fast_walks(*changes)
    lmrl.train(recipe, output=tmp_path / "run")
    found = lines(tmp_path / "run")
    assert found[0]["policy_change"] > recipe.training.kl_band and found[0]["kl_factor"] < 1
    shutil.copytree(tmp_path / "run", tmp_path / "torn")
    for gone in ("final", "checkpoints/step-000004"):
        shutil.rmtree(tmp_path / "torn" / "stages" / "main" / gone, ignore_errors=True)
    resume_run(tmp_path / "torn")
    keys = ("policy_change", "kl_factor", "loss")
    assert [[row[key] for key in keys] for row in lines(tmp_path / "torn")] == [
        [row[key] for key in keys] for row in found
    ]
