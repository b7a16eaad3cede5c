"""Methods without a critic raise a reward from nothing, with every seed."""

import json

import pytest

import lmrl
from lmrl.evaluation.statistics import summarize

SEEDS = (0, 1, 2)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """Write as many letters a as you can: a random policy has about one in twenty."""
    folder = tmp_path_factory.mktemp("letters")
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"say {word}"}) + "\n" for word in "bcde"))
    (folder / "vowels.py").write_text(
        "def share(completions, **_):\n    return [text.count('a') / 6 for text in completions]\n"
    )
    config = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
              "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 32}  # fmt: skip
    path = folder / "recipe.yaml"
    settings = {
        "model": {"config": config},
        "task": {
            "prompts": {"path": str(folder / "prompts.jsonl"), "holdout": 0},
            "rewards": [{"function": f"{folder / 'vowels.py'}:share"}],
        },
        "rollouts": {"prompts": 4, "samples": 8, "max_new_tokens": 6},
        "objective": {"name": "grpo"},
        "optimizer": {"lr": 2e-2},
        "training": {"steps": 30, "threads": 1, "checkpoint_every": 0},
    }
    path.write_text(json.dumps(settings))
    return path


@pytest.mark.parametrize(
    "objective",
    [
        "{name: grpo}",
        "{name: rloo, kl_coef: 0.001}",
        pytest.param("{name: grpo, epochs: 2, kl_coef: 0.001}", marks=pytest.mark.slow),  # close to the two above
        pytest.param("{name: dr_grpo, constant_length: 6}", marks=pytest.mark.slow),
        pytest.param("{name: reinforce_pp}", marks=pytest.mark.slow),
        "{name: dpo, beta: 0.5}",
    ],
)
def test_reward_rises(recipe, tmp_path, objective):
    gains = []
    for seed in SEEDS:
        run = tmp_path / str(seed)
        lmrl.train(recipe, [f"objective={objective}", f"training.seed={seed}"], output=run)
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        rewards = [line["reward"] for line in lines if line["kind"] == "train"]
        gains.append(sum(rewards[-3:]) / 3 - sum(rewards[:3]) / 3)
    low, _ = summarize(gains)["ci95"]
    assert low > 0.1 and min(gains) > 0.1, gains


def test_prompts_that_teach_nothing_are_replaced(recipe, tmp_path):
    """With a reward that most groups never earn, resampling finds more groups that differ."""
    shares = []
    for rounds in (0, 3):
        run = tmp_path / str(rounds)
        changes = [
            "rollouts.samples=2",
            "training.steps=6",
            "optimizer.lr=1e-6",
            f"source={{name: rollouts, resample: {rounds}}}",
        ]
        lmrl.train(recipe, changes, output=run)
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        shares.append([line["zero_spread"] for line in lines if line["kind"] == "train"])
    assert sum(shares[1]) < 0.7 * sum(shares[0])
