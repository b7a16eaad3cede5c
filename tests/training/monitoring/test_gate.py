"""The gate by hand, and in runs that are broken on purpose."""

import io
import json
import math
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from lmrl.errors import RecipeError
from lmrl.evaluation.api import evaluator_for
from lmrl.recipe import Gate
from lmrl.recipe.files import load_recipe
from lmrl.training import resume_run, train
from lmrl.training.display import Display
from lmrl.training.listeners.gate import GateMonitor
from lmrl.training.monitoring.gate import GateState, breached, drop, has_given_up, is_due
from lmrl.training.stage import Stage
from lmrl.trajectories.trajectory import Trajectory
from tests.conftest import TINY_WALKS
from tests.runs import metrics, stopped_before


def test_drop_by_hand():
    lost = drop([50.0, 60.0], [40.0, 60.0])  # 10 and 0: mean 5, standard deviation sqrt(50), t(1) = 12.7062
    half = 12.70620 * math.sqrt(50) / math.sqrt(2)
    assert lost["mean"] == 5 and lost["n"] == 2 and lost["ci95"] == pytest.approx([5 - half, 5 + half])
    assert drop([1.0, 2.0], [3.0, 4.0])["mean"] == -2
    with pytest.raises(ValueError):
        drop([1.0, 2.0], [1.0])


def test_only_a_sure_loss_is_a_breach():
    gate = Gate(drop=5)
    for low, expected in ((-3.0, False), (5.0, False), (5.01, True)):
        assert breached(gate, {"mean": 20.0, "ci95": [low, 40.0], "n": 3}) is expected


def test_which_steps_are_measured():
    assert [step for step in range(1, 11) if is_due(Gate(every=3, steps=7), step)] == [3, 6]
    assert [step for step in range(1, 11) if is_due(Gate(every=3), step)] == [3, 6, 9]


def test_giving_up():
    states = [vars(GateState(rollbacks=count)) for count in (0, 1, 2, 3)]
    assert [has_given_up(Gate(max_rollbacks=2), state) for state in states] == [False, False, True, True]


# ----------------------------------------------------------------------------------------------------------------- scale
def test_normalized_is_0_for_random_and_100_for_the_optimum(tmp_path, ilql_run):
    (tmp_path / "suite.yaml").write_text(
        "task: {environment: random_walks, nodes: 8}\nrollouts: {max_new_tokens: 10}\nsamples: 4\n"
        "metrics: [optimality, normalized]\n"
    )
    evaluator = evaluator_for(ilql_run, tmp_path / "suite.yaml")
    low, high = evaluator.scale
    assert 0 < low < high == 1
    assert evaluator.optimum()["normalized"]["mean"] == pytest.approx(100)
    random = evaluator._play("random", [start for start in evaluator.starts() for _ in range(8)])
    assert evaluator.report(random)["normalized"]["mean"] == pytest.approx(0, abs=1e-9)
    scores, trajectories = evaluator()
    assert scores["normalized"]["mean"] == pytest.approx(100 * (scores["optimality"]["mean"] - low) / (high - low))
    by_start = evaluator.by_start(trajectories)
    assert len(by_start) == len(evaluator.starts())
    assert sum(by_start) / len(by_start) == pytest.approx(scores["normalized"]["mean"])


def test_points_of_each_start_by_hand(ilql_run):
    evaluator = evaluator_for(ilql_run)
    evaluator.scale = (0.2, 0.7)
    episodes = [
        Trajectory([], "", "", reward=0.0, metrics={"optimality": value}, group=group)
        for group, value in ((0, 0.2), (0, 0.7), (3, 0.45))
    ]
    assert evaluator.by_start(episodes) == pytest.approx([50, 50])
    evaluator.scale = None
    assert evaluator.by_start(episodes) == pytest.approx([0.45, 0.45])


def test_a_rollback_keeps_what_the_warmup_collected():
    """Steps that only collect change no weights, so the last of them is as good as the start, and its buffer is full."""
    monitor = GateMonitor(Gate(every=10), SimpleNamespace(evaluator=object()))
    recipe = SimpleNamespace(source=SimpleNamespace(warmup_steps=3))
    stage = SimpleNamespace(recipe=recipe, progress=SimpleNamespace(best={"step": 0, "metric": "return", "value": 1.0}))
    steps = []
    for step in range(1, 6):
        monitor.after_step(stage, step)
        steps.append(stage.progress.best["step"])
    assert steps == [0, 0, 3, 3, 3]


# ------------------------------------------------------------------------------------------------------------------ runs
@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A policy that imitates the optimum well."""
    folder = tmp_path_factory.mktemp("good") / "run"
    changes = ["source.player=optimal", "source.batch_size=32", "training.steps=80", "optimizer.lr=1e-2"]
    result = train("random_walks/bc", [*TINY_WALKS, *changes, "training.checkpoint_every=0"], output=folder)
    assert result.scores["BC"]["optimality"]["mean"] > 0.8
    return result.checkpoint


def gated(start, *changes):
    gate = "evaluation.gate={drop: 5, every: 2, max_rollbacks: 2}"
    options = ["training.steps=9", "training.checkpoint_every=1", "evaluation.episodes=4", gate, *changes]
    return load_recipe("random_walks/bc", [*TINY_WALKS, f"model.path={start}", *options])


def run_of(recipe, folder):
    console = Console(file=io.StringIO(), width=200)
    train(recipe, output=folder, display=Display(console))
    return console.file.getvalue()


def state_of(folder):
    return json.loads((folder / "stages/main/final/state/trainer.json").read_text())


def gates(folder):
    return [line for line in metrics(folder) if line["kind"] == "gate"]


@pytest.fixture(scope="module")
def broken(good, tmp_path_factory):
    """A run with an absurd learning rate, and what it said on the terminal."""
    folder = tmp_path_factory.mktemp("broken") / "run"
    return folder, run_of(gated(good, "optimizer.lr=1.0"), folder)


def test_a_broken_run_ends_with_the_policy_it_began_with(good, broken):
    folder, said = broken
    lines = gates(folder)
    assert [line["step"] for line in lines] == [2, 4] and all(line["rolled_back"] for line in lines)
    assert [(line["back_to"], line["lr_factor"]) for line in lines] == [(0, 0.5), (0, 0.25)]
    assert all(line["drop"]["ci95"][0] > 5 for line in lines)
    assert "gate at step 2: more than the 5 points allowed; back to step 0, learning rate x 0.5" in said
    assert "gate: 2 rollbacks, the stage ends with the policy of step 0" in said
    state = state_of(folder)
    assert state["step"] == 4
    evals = [line for line in metrics(folder) if line["kind"] == "eval"]
    assert evals[-1]["optimality"] == evals[0]["optimality"] == state["scores"]["start"]["optimality"]
    assert state["gate"]["rollbacks"] == 2 and state["gate"]["worst"] == max(line["drop"]["mean"] for line in lines)
    final = folder / "stages/main/final"
    assert (final / "model.safetensors").read_bytes() == (good / "model.safetensors").read_bytes()
    kinds = [(line["step"], line["kind"]) for line in metrics(folder)]
    expected = [(1, "train"), (2, "train"), (2, "eval"), (2, "gate")]
    expected += [
        (3, "train"),
        (4, "train"),
        (4, "eval"),
        (4, "gate"),
        (4, "eval"),
    ]  # before and after the last rollback
    assert kinds == [(0, "eval"), *expected, (4, "final")]
    scores = json.loads((folder / "results.json").read_text())
    assert scores["BC"] == state["scores"]["last"] and "BC, best" not in scores
    low, high = scores["start"]["optimality"]["ci95"]
    assert low < scores["BC"]["optimality"]["mean"] < high and scores["BC"] != scores["start"]


@pytest.mark.parametrize(("step", "kept"), [(1, 0), (3, 2), (4, 3)])
def test_the_gate_survives_a_resume(good, broken, tmp_path, step, kept):
    """Stopped before the first update, after a rollback, and before the last one."""
    with stopped_before(step):
        run_of(gated(good, "optimizer.lr=1.0"), tmp_path / "torn")
    assert (tmp_path / f"torn/stages/main/checkpoints/step-00000{kept}").exists()
    resume_run(tmp_path / "torn")
    assert metrics(tmp_path / "torn") == metrics(broken[0]) and state_of(tmp_path / "torn") == state_of(broken[0])


def test_a_stage_that_gave_up_is_not_trained_further(good, broken, tmp_path, monkeypatch):
    original = Stage._checkpoint

    def unplugged(self, target):
        if target.name == "final":
            raise RuntimeError("stopped on purpose")
        original(self, target)

    monkeypatch.setattr(Stage, "_checkpoint", unplugged)
    with pytest.raises(RuntimeError, match="stopped on purpose"):
        run_of(gated(good, "optimizer.lr=1.0"), tmp_path / "torn")
    monkeypatch.undo()
    resume_run(tmp_path / "torn")
    assert metrics(tmp_path / "torn") == metrics(broken[0]) and state_of(tmp_path / "torn")["step"] == 4


def test_a_healthy_run_is_left_alone(good, tmp_path):
    run_of(gated(good, "source.player=optimal", "optimizer.lr=1e-5", "training.steps=5"), tmp_path / "run")
    assert [(line["step"], line["rolled_back"]) for line in gates(tmp_path / "run")] == [(2, False), (4, False)]
    assert [line["step"] for line in metrics(tmp_path / "run") if line["kind"] == "eval"] == [0, 2, 4, 5]
    state = state_of(tmp_path / "run")
    assert state["step"] == 5 and state["gate"]["rollbacks"] == 0 and state["gate"]["lr_factor"] == 1
    weights = [folder / "model.safetensors" for folder in (good, tmp_path / "run/stages/main/final")]
    assert weights[0].read_bytes() != weights[1].read_bytes()


def test_back_to_the_best_and_not_to_the_start(tmp_path, monkeypatch):
    """Weights that break in the middle of a run which had already improved."""
    original = Stage._step

    def breaks(self, step):
        original(self, step)
        if self.name == "main" and step == 30:
            with torch.no_grad():
                self.policy.vocabulary.normal_(std=3)

    monkeypatch.setattr(Stage, "_step", breaks)
    changes = ["source.player=optimal", "source.batch_size=32", "training.steps=31", "optimizer.lr=1e-2"]
    changes += [
        "stages.warm={training: {steps: 25}}",
        "stages.warm.evaluation.suite=null",
        "training.checkpoint_every=0",
    ]
    changes += ["evaluation.gate={drop: 1, every: 15, lr_factor: 0.1}", "stages.warm.evaluation.gate=null"]
    run_of(load_recipe("random_walks/bc", [*TINY_WALKS, *changes]), tmp_path / "run")
    lines = [line for line in metrics(tmp_path / "run") if line["stage"] == "main"]
    scores = [(line["step"], line["optimality"]["mean"]) for line in lines if line["kind"] == "eval"]
    assert [step for step, _ in scores] == [0, 15, 30, 31] and scores[1][1] > scores[0][1] > scores[2][1] + 0.1
    first, second = gates(tmp_path / "run")
    assert not first["rolled_back"] and second["rolled_back"] and (second["back_to"], second["lr_factor"]) == (15, 0.1)
    assert scores[3][1] > scores[0][1]  # the last update started from step 15 again
    checkpoints = tmp_path / "run/stages/main/checkpoints"
    taken_back, best = (checkpoints / name / "model.safetensors" for name in ("step-000030", "step-000015"))
    assert taken_back.read_bytes() == best.read_bytes()


def test_the_best_policy_is_chosen_by_the_gates_metric(good, tmp_path):
    with pytest.raises(RecipeError, match="by the suite's first metric, 'optimality': leave evaluation.metric=arrived"):
        train(gated(good, "evaluation.metric=arrived"), output=tmp_path / "run")
