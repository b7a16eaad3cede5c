"""A policy that plays a game with itself alone learns to win it."""

import json

import pytest

import lmrl
from lmrl.engines.base import Sampling
from lmrl.engines.hf import HFEngine
from lmrl.policy.load import open_policy
from lmrl.recipe import NimTask
from lmrl.rollouts.sampler import Sampler
from lmrl.rollouts.task import build_task

SETTINGS = {
    "model": {
        "config": {
            "model_type": "llama",
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "max_position_embeddings": 32,
        }
    },
    "task": {"environment": "nim", "sticks": 5, "most": 2},
    "rollouts": {"prompts": 10, "samples": 8, "max_new_tokens": 2},
    "optimizer": {"lr": 3e-3},
    "training": {"steps": 50, "threads": 1, "checkpoint_every": 0, "on_collapse": "warn"},
    "evaluation": {"suite": None},
}


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ppo", "grpo"])
def test_self_play_learns_the_winning_move(tmp_path, method):
    """One or two of five sticks: of heaps 1, 2, 4 and 5 the winning move leaves none or 3, and beats the optimal player."""
    recipe = SETTINGS | {"objective": {"name": method, "epochs": 2, "entropy_coef": 0.03}}
    (tmp_path / "nim.yaml").write_text(json.dumps(recipe))
    policy = open_policy(str(lmrl.train(tmp_path / "nim.yaml", output=tmp_path / "run").checkpoint))
    task = build_task(NimTask(environment="nim", sticks=5, most=2, opponent="optimal"), policy.tokenizer)
    sampler = Sampler(task, HFEngine(policy), policy.decode)
    starts = [2 * (heap - 1) for heap in (1, 2, 4, 5)]  # as the first player
    played = sampler.play(starts, 1, Sampling(max_new_tokens=2, temperature=0), ("nim",))
    first = {one.turns[0].observation: one.turns[0].action.strip() for one in played}
    assert first == {"1 left": "1", "2 left": "2", "4 left": "1", "5 left": "2"}
    assert [one.reward for one in played] == [1.0] * 4
