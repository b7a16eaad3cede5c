"""Ready-made models and runs, and a command line that runs in this process and reaches no network."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

import pytest
from harness import Place

from lmrl.cli import main

TINY_WALKS = [
    "task.nodes=8",
    "model.config.hidden_size=16",
    "model.config.intermediate_size=32",
    "source.episodes=60",
    "source.batch_size=8",
    "training.threads=1",
]


@pytest.fixture(scope="session")
def assets(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> dict[str, Path]:
    """By name: see `harness.copied`."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    import lmrl

    root = tmp_path_factory.mktemp("assets")
    walks = [*TINY_WALKS, "evaluation.suite=null", "training.checkpoint_every=2", "rollouts.max_new_tokens=6"]
    lmrl.train("random_walks/bc", [*walks, "training.steps=4"], output=root / "run")
    adapter = [change for change in walks if not change.startswith("model.config")]
    adapter += [f"model.path={tiny_folder}", "model.lora={r: 2, alpha: 4}", "training.steps=2"]
    lmrl.train("random_walks/bc", adapter, output=root / "lora")
    torch.manual_seed(0)
    judge = AutoModelForSequenceClassification.from_pretrained(tiny_folder, num_labels=1)
    judge.save_pretrained(root / "judge")
    AutoTokenizer.from_pretrained(tiny_folder).save_pretrained(root / "judge")
    return {"model": tiny_folder, **{name: root / name for name in ("run", "lora", "judge")}}


@pytest.fixture
def place(tmp_path: Path, assets: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.chdir(tmp_path)
    return Place(tmp_path, assets)


@pytest.fixture
def lmrl(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path):
    """Runs a command in this process: exit code, and what it wrote to the two streams."""
    monkeypatch.chdir(tmp_path)
    connect = socket.socket.connect

    def local_only(self, address):
        if isinstance(address, tuple) and not str(address[0]).startswith(("127.", "::1", "localhost")):
            pytest.fail(f"the network was reached for: {address}")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", local_only)

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["lmrl", *arguments])
        with pytest.raises(SystemExit) as left:
            main()
        return left.value.code or 0, *capsys.readouterr()

    return run
