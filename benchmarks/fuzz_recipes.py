"""Small recipes and rows of their data, which run as they are, for fuzz.py to mutate."""

from __future__ import annotations

from typing import Any

REWARD = (
    "def vowels(prompts, completions, **columns): return [sum(c in 'aeiou' for c in text) for text in completions]\n"
)
CHAT = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "say a"},
    {"role": "assistant", "content": "a b c"},
    {"role": "user", "content": "and d"},
    {"role": "assistant", "content": "d"},
]
CALL = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
ROWS: dict[str, list[dict[str, Any]]] = {
    "prompts": [{"prompt": f"say {word}", "answer": word} for word in ("one", "two", "three", "four")],
    "messages": [
        {"messages": CHAT, "reward": 1.0},
        {"messages": CHAT[:3], "rewards": [0.5]},
        {
            "messages": [
                CHAT[1],
                {"role": "assistant", "content": "", "tool_calls": [CALL]},
                {"role": "tool", "content": "1", "tool_call_id": "1"},
                CHAT[4],
            ],
            "reward": 0,
        },
    ],
    "pairs": [
        {"prompt": "say one", "chosen": "one", "rejected": "two"},
        {"chosen": CHAT[:3], "rejected": [*CHAT[:2], {"role": "assistant", "content": "no"}]},
        {"chosen": "\n\nHuman: hi\n\nAssistant: hello", "rejected": "\n\nHuman: hi\n\nAssistant: go"},
    ],
    "episodes": [
        {
            "turns": [
                {"observation": "a", "action": "b", "reward": 0.0},
                {"observation": "c", "action": "d", "reward": 1.0, "cut": False},
            ],
            "final_observation": "e",
            "terminated": False,
            "reward": 1.0,
            "metrics": {"won": 1.0},
            "components": {"x": 0.5},
            "columns": {"answer": "d"},
            "group": 0,
            "episode": 0,
            "seed": 3,
            "start": None,
            "player": "me",
        },
        {"prompt": "a", "completion": "b", "reward": -1},
        {"prompt": CHAT[:2], "completion": CHAT[2:3], "reward": 0.5},
    ],
}
COMMON: dict[str, Any] = {
    "model": {"path": "model"},
    "rollouts": {"prompts": 2, "samples": 2, "max_new_tokens": 4},
    "training": {"steps": 1, "threads": 1, "microbatch_tokens": 512, "seed": 1},
    "optimizer": {"lr": 1e-3, "betas": [0.9, 0.95], "schedule": "linear"},
    "evaluation": {"episodes": 2, "diagnostics_every": 0},
}
PROMPTS = {
    "prompts": {"path": "rows.jsonl", "holdout": 0.3},
    "rewards": [{"function": "reward.py:vowels", "weight": 1.5}],
}
WALKS = {"environment": "random_walks", "nodes": 6, "max_turns": 3, "history": 2}
DATASET = {"name": "dataset", "path": "rows.jsonl", "batch_size": 2}
RECIPES: dict[str, dict[str, Any]] = {
    "prompts": COMMON | {"task": PROMPTS, "objective": {"name": "grpo", "epochs": 2, "kl_coef": 0.1}},
    "messages": COMMON | {"task": WALKS, "source": DATASET, "objective": {"name": "likelihood"}},
    "pairs": COMMON
    | {"task": {"prompts": {"holdout": 0.3}}, "source": DATASET, "objective": {"name": "dpo", "beta": 0.1}},
    "episodes": COMMON | {"task": WALKS, "source": DATASET, "objective": {"name": "ilql", "q_head": "tied"}},
    "environment": COMMON
    | {
        "model": {
            "config": {
                "model_type": "llama",
                "hidden_size": 16,
                "intermediate_size": 32,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "max_position_embeddings": 64,
            }
        },
        "task": WALKS,
        "stages": {
            "warmup": {
                "source": {"name": "dataset", "player": "random", "episodes": 6, "batch_size": 2},
                "objective": {"name": "likelihood"},
            }
        },
        "objective": {"name": "ppo", "epochs": 1, "minibatches": 1},
    },
}
SMALL = (
    "training.steps=1",
    "rollouts.prompts=2",
    "rollouts.samples=2",
    "rollouts.max_new_tokens=4",
    "evaluation.episodes=2",
)
"""Of a training that is to be one step, whatever was changed."""
