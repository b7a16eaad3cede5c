"""The controller of the entropy bonus."""

import shutil

import pytest

import lmrl
from lmrl.objectives import load_objective
from lmrl.recipe import PPOObjective
from lmrl.training.listeners.entropy import LARGEST_BONUS, bonus_for, target_entropy
from lmrl.training.train import resume_run
from tests.training.test_rate import lines


def test_rules_by_hand():
    assert [target_entropy(2.0, step, 8.0) for step in (0, 2, 8, 9)] == [2.0, 1.5, 0.0, 0.0]
    assert bonus_for(0.5, target=2.0) == pytest.approx(0.75 * LARGEST_BONUS)
    assert bonus_for(2.0, target=2.0) == bonus_for(3.0, target=2.0) == 0
    assert bonus_for(0.0, target=2.0) == LARGEST_BONUS and bonus_for(0.0, target=0.0) == 0
    assert bonus_for(-1.0, target=-0.5) == 0  # densities may have an entropy below 0


@pytest.mark.parametrize(
    ("stated", "optimizer", "share"),
    [("auto", "namo", 0.5), ("auto", "muon", 0.5), ("auto", "adamw", None), (0.3, "adamw", 0.3), (None, "namo", None)],
)
def test_the_default_follows_the_optimizer(stated, optimizer, share):
    objective = load_objective(PPOObjective(name="ppo", hold_entropy=stated))
    objective.optimizer = optimizer
    assert objective.hold_entropy == share


def one_letter(tiny_folder, **objective):
    """A recipe that rewards a single letter, at a rate at which a policy soon writes little else."""
    return {
        "model": {"path": str(tiny_folder)},
        "task": {
            "prompts": {"path": [{"prompt": f"say {number}"} for number in range(12)]},
            "rewards": [{"function": lambda completions, **_: [float(text.count("e")) for text in completions]}],
        },
        "rollouts": {"prompts": 4, "samples": 8, "max_new_tokens": 4},
        "objective": {"target_kl": None, **objective},
        "optimizer": {"lr": 3e-2},
        "training": {"steps": 16, "checkpoint_every": 4, "keep_checkpoints": 9, "threads": 1, "kl_band": None},
    }


@pytest.mark.parametrize("objective", ["ppo", "grpo"])
def test_entropy_falls_no_faster_than_the_line(tmp_path, tiny_folder, objective):
    rows = {}
    for share in (1.0, None):
        lmrl.train(one_letter(tiny_folder, name=objective, hold_entropy=share), output=tmp_path / str(share))
        rows[share] = [row for row in lines(tmp_path / str(share)) if "entropy" in row]
    assert all("entropy_bonus" not in row for row in rows[None])
    first = rows[1.0][0]["entropy"]
    for row in rows[1.0]:
        assert row["entropy_bonus"] == pytest.approx(
            bonus_for(row["entropy"], target_entropy(first, row["step"], 16.0))
        )
    assert max(row["entropy_bonus"] for row in rows[1.0]) > 0.05 and rows[1.0][-1]["entropy_bonus"] == 0
    held, free = (sum(row["entropy"] for row in rows[share]) for share in (1.0, None))
    assert held > free


def test_a_stated_bonus_is_the_least():
    objective = load_objective(PPOObjective(name="ppo", entropy_coef=0.01))
    assert objective.entropy_coef == 0.01


def test_it_goes_on_where_it_was_on_resume(tmp_path, tiny_folder):
    recipe = one_letter(tiny_folder, name="grpo", hold_entropy=1.0)
    lmrl.train(recipe, output=tmp_path / "run")
    shutil.copytree(tmp_path / "run", tmp_path / "torn")
    for gone in ("final", "checkpoints/step-000016"):
        shutil.rmtree(tmp_path / "torn" / "stages" / "main" / gone, ignore_errors=True)
    resume_run(tmp_path / "torn")
    found, again = (
        [[row[key] for key in ("entropy_bonus", "entropy", "loss")] for row in lines(tmp_path / name)]
        for name in ("run", "torn")
    )
    assert found == again and found[11][0] > 0
