"""PPO provably learns: from a random start on three seeds, and far beyond the data it was warmed up on."""

import json

import pytest

import lmrl
from lmrl.evaluation.statistics import summarize

SMALL = [
    "task.nodes=10",
    "task.edge_probability=0.2",
    "task.graph=1",
    "model.config.hidden_size=32",
    "model.config.intermediate_size=64",
    "stages.warmup.training.steps=80",
    "training.steps=24",
    "rollouts.prompts=32",
    "rollouts.samples=4",
    "objective.minibatches=2",
    "optimizer.lr=1e-3",
    "stages.warmup.optimizer.lr=2e-3",
    "training.checkpoint_every=0",
]


def test_ppo_learns_the_shortest_paths(tmp_path):
    """Three seeds; the lower end of the interval of the gain over imitation is far above zero."""
    gains, finals = [], []
    for seed in range(3):
        recipe = lmrl.load_recipe("random_walks/ppo", [*SMALL, f"training.seed={seed}"])
        scores = lmrl.train(recipe, output=tmp_path / str(seed)).scores
        finals.append(scores["PPO"]["optimality"]["mean"])
        gains.append(finals[-1] - scores["BC"]["optimality"]["mean"])
    assert summarize(gains)["ci95"][0] > 0.5, gains
    assert min(finals) > 0.75, finals


@pytest.mark.parametrize(("sign", "ahead"), [(1, 0), (-1, 0), (1, 1)])
def test_ppo_follows_the_sign_of_a_reward(tmp_path, sign, ahead):
    """A bandit: the same prompts, a reward for one letter or against it; also from what older weights have played."""
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    (tmp_path / "mine.py").write_text("def letters(completions, **_): return [t.count('a') / 4 for t in completions]")
    (tmp_path / "bandit.yaml").write_text(
        "model: {config: {model_type: llama, hidden_size: 16, intermediate_size: 32, num_hidden_layers: 1,"
        " num_attention_heads: 2, num_key_value_heads: 2}}\n"
        "task: {prompts: {path: prompts.jsonl, holdout: 0}, rewards: [{function: 'mine.py:letters'}]}\n"
        "rollouts: {prompts: 16, samples: 4, max_new_tokens: 4}\n"
        "objective: {name: ppo, epochs: 2}\n"
        "optimizer: {lr: 5e-3}\n"
        "training: {steps: 30, checkpoint_every: 0, threads: 1}\n"
    )
    recipe = lmrl.load_recipe(tmp_path / "bandit.yaml", [f"task.rewards.0.weight={sign}", f"rollouts.ahead={ahead}"])
    result = lmrl.train(recipe, output=tmp_path / "run")
    lines = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    rewards = [line["reward/letters"] for line in lines if line["kind"] == "train"]
    first, last = rewards[0], rewards[-1]
    assert last > 0.8 if sign > 0 else last < first / 2
