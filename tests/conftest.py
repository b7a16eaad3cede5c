"""Shared fixtures: tiny models and tasks that need no network."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

from tests.fast import is_fast, is_unit

torch.set_num_threads(1)

needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")

TINY_LLAMA = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.02,
}
"""Small weights: nearly uniform distributions, so that rounding stays small and no token is out of reach."""

TINY_WALKS = [
    "task.nodes=8",
    "model.config.hidden_size=16",
    "model.config.intermediate_size=32",
    "rollouts.max_new_tokens=10",
    "source.episodes=60",
    "source.batch_size=8",
    "training.threads=1",
]
"""Overrides that make a recipe like random_walks/bc a matter of a second."""


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With `-m fast`, files that have no fast test are not imported, which would take as long as the tests."""
    is_test = collection_path.match("test_*.py")
    return True if config.option.markexpr == "fast" and is_test and not is_unit(collection_path) else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if is_fast(item):
            item.add_marker("fast")


@pytest.fixture
def tiny_config() -> dict:
    return dict(TINY_LLAMA)


@pytest.fixture
def tiny_policy():
    """A seeded character-level policy from scratch with a value head."""
    from lmrl.policy.heads import HeadsSpec
    from lmrl.policy.load import load_policy
    from lmrl.recipe import Model

    torch.manual_seed(0)
    return load_policy(
        Model(config=dict(TINY_LLAMA)), texts=lambda: ["abcdefghijklmnopqrstuvwxyz .,!?"], heads=HeadsSpec()
    )


def save_tiny_model(folder: Path) -> None:
    """Write a transformers folder with a tiny character-level model and a chat template, standing in for a hub model."""
    from lmrl.policy.load import load_policy
    from lmrl.recipe import Model

    torch.manual_seed(0)
    letters = "\n" + "".join(chr(code) for code in range(32, 127))
    policy = load_policy(Model(config=dict(TINY_LLAMA) | {"max_position_embeddings": 256}), texts=lambda: [letters])
    policy.tokenizer.chat_template = (
        "{% for message in messages %}[{{ message.role }}]{{ message.content }}<eos>\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    policy.save(folder)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_tiny_model(folder)
    return folder


@pytest.fixture(scope="session")
def ilql_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with tied Q heads that guide strongly and without a support mask."""
    import lmrl

    objective = "objective={name: ilql, q_head: tied, trunk: detached, beta: 8, support: 0, polyak: 0.5}"
    changes = [*TINY_WALKS, objective, "training.steps=20", "training.checkpoint_every=0", "optimizer.lr=1e-2"]
    folder = tmp_path_factory.mktemp("ilql") / "run"
    lmrl.train("random_walks/bc", changes, output=folder)
    return folder
