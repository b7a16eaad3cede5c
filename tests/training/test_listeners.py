"""Listeners of a stage: when they are called, what they change, and what a checkpoint keeps of them."""

import json
import shutil

import pytest

from lmrl.recipe.files import load_recipe
from lmrl.training import build, resume_run, train
from lmrl.training.listeners import Listener
from tests.conftest import TINY_WALKS
from tests.runs import assert_same_run, metrics

QUICK = [*TINY_WALKS, "training.steps=6", "training.checkpoint_every=2", "evaluation.episodes=2", "optimizer.lr=1e-2"]
QUICK += ["training.keep_checkpoints=9", "optimizer.schedule=constant"]


class Halving(Listener):
    """Halves the learning rate at every step but the first, from what it remembers; keeps step 3; may end the stage."""

    name = "halving"
    last = 99

    def __init__(self):
        self.seen, self.calls = 0, []

    def begin(self, stage, resumed):
        self.calls.append(("begin", resumed))
        stage.updater.factors[self.name] = 0.5**self.seen

    def measure(self, stage, step, source_batch, metrics):
        assert stage.progress.step == step - 1 and len(source_batch.learn) == 8 and "loss" in metrics
        self.calls.append(("measure", step))
        return {"lr_used": stage.strategy.optimizer.param_groups[0]["lr"]}

    def recorded(self, stage, step, source_batch, metrics):
        assert stage.run.recorded(stage.name, "train")[-1]["lr_used"] == metrics["lr_used"]
        self.calls.append(("recorded", step))

    def after_step(self, stage, step):
        assert stage.progress.step == step
        self.calls.append(("after_step", step))
        self.seen += 1
        stage.updater.factors[self.name] = 0.5**self.seen

    def wants_checkpoint(self, stage, step):
        return step == 3

    def ends(self, stage):
        return stage.progress.step == self.last

    def end(self, stage):
        assert stage.run.final(stage.name).exists()
        self.calls.append(("end", stage.progress.step))

    def state(self):
        return {"seen": self.seen}

    def load_state(self, state):
        self.calls.append(("load_state", state))
        self.seen = state.get("seen", 0)


@pytest.fixture
def halving(monkeypatch):
    """Lets every stage have one of its own; of these, the list."""
    made, original = [], build.build_listeners

    def with_another(*args):
        made.append(Halving())
        return [*original(*args), made[-1]]

    monkeypatch.setattr(build, "build_listeners", with_another)
    return made


def state_of(folder, name):
    return json.loads((folder / "stages/main" / name / "state/trainer.json").read_text())


def test_what_a_listener_is_told_and_changes(tmp_path, halving):
    train(load_recipe("random_walks/bc", QUICK), output=tmp_path / "run")
    [one] = halving
    steps = [(hook, step) for step in range(1, 7) for hook in ("measure", "recorded", "after_step")]
    assert one.calls == [("begin", False), *steps, ("end", 6)]
    lines = [line for line in metrics(tmp_path / "run") if line["kind"] == "train"]
    assert [line["lr_used"] for line in lines] == pytest.approx([1e-2 * 0.5**step for step in range(6)])
    kept = sorted(path.name for path in (tmp_path / "run/stages/main/checkpoints").iterdir())
    assert kept == [f"step-00000{step}" for step in (2, 3, 4, 6)]
    assert state_of(tmp_path / "run", "final")["listeners"]["halving"] == {"seen": 6}


def test_a_listener_ends_a_stage(tmp_path, halving, monkeypatch):
    monkeypatch.setattr(Halving, "last", 4)
    train(load_recipe("random_walks/bc", QUICK), output=tmp_path / "run")
    assert state_of(tmp_path / "run", "final")["step"] == 4 and halving[0].calls[-1] == ("end", 4)


def test_a_listener_goes_on_from_a_checkpoint(tmp_path, halving):
    train(load_recipe("random_walks/bc", QUICK), output=tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "torn")
    for gone in ("final", "checkpoints/step-000004", "checkpoints/step-000006"):
        shutil.rmtree(tmp_path / "torn/stages/main" / gone)
    resume_run(tmp_path / "torn")
    assert halving[1].calls[:3] == [("load_state", {"seen": 3}), ("begin", True), ("measure", 4)]
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "torn")
    finals = [tmp_path / name / "stages/main/final/model.safetensors" for name in ("whole", "torn")]
    assert finals[0].read_bytes() == finals[1].read_bytes()
    assert state_of(tmp_path / "whole", "final") == state_of(tmp_path / "torn", "final")


def test_checkpoints_without_listeners(tmp_path):
    train(load_recipe("random_walks/bc", [*QUICK, "stages.warm={training: {steps: 1}}"]), output=tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "old")
    for gone in ("final", "checkpoints/step-000004", "checkpoints/step-000006"):
        shutil.rmtree(tmp_path / "old/stages/main" / gone)
    kept = tmp_path / "old/stages/main/checkpoints/step-000002/state/trainer.json"
    state = json.loads(kept.read_text())
    assert state.pop("listeners").keys() == {"guard"} and state.pop("ended") is None
    kept.write_text(json.dumps(state))
    kept.with_name("checksums.json").unlink()  # which came later
    resume_run(tmp_path / "old")
    assert_same_run(tmp_path / "whole", tmp_path / "old")
