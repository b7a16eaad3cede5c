"""ArCHer raises a reward that comes at the end of several turns."""

import json

import pytest

import lmrl

GAME = '''
"""Say the letter after the one you see, three times; what was right is told at the end."""
import lmrl

class Follow(lmrl.TextEnvironment):
    num_starts = 4

    def texts(self):
        return ["abcde"]

    def reset(self, *, seed=None, options=None):
        self.start, self.turn, self.right = (options or {}).get("start", 0), 0, 0
        return "abcd"[self.start], {}

    def step(self, action):
        shown = "abcd"[(self.start + self.turn) % 4]
        self.right += action[:1] == chr(ord(shown) + 1)
        self.turn += 1
        done = self.turn == 3
        return "abcd"[(self.start + self.turn) % 4], (self.right / 3 if done else 0.0), done, False, {}
'''


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_reward_at_the_end_of_turns_rises(tmp_path, seed):
    """From about 0.15 to 0.35 or more; the optimum is 1."""
    (tmp_path / "follow.py").write_text(GAME)
    config = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
              "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 32}  # fmt: skip
    recipe = {
        "model": {"config": config},
        "task": {"environment": f"{tmp_path / 'follow.py'}:Follow"},
        "rollouts": {"prompts": 16, "samples": 4, "max_new_tokens": 2},
        "objective": {"name": "archer"},
        "evaluation": {"suite": None},
        "optimizer": {"lr": 5e-3},
        "training": {"steps": 80, "threads": 1, "checkpoint_every": 0},
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    lmrl.train(tmp_path / "recipe.yaml", [f"training.seed={seed}"], output=tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    rewards = [line["reward"] for line in lines if line["kind"] == "train"]
    assert sum(rewards[-5:]) / 5 - sum(rewards[:5]) / 5 > 0.15, rewards
