"""Bundles of failed updates and passes: `lmrl replay` computes what the run computed."""

import gc
import json
import math
import resource
import shutil
from importlib.metadata import version
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import lmrl
from lmrl import cli
from lmrl.engines.slot_batch import SlotBatch
from lmrl.errors import MemoryShortError, RunError
from lmrl.policy import policy as policy_module
from lmrl.recipe import Optimizer
from lmrl.recipe.files import load_recipe
from lmrl.training import train
from lmrl.training.monitoring.bundle import batch_of, batch_tensors, memory_limits
from lmrl.training.monitoring.collapse import Tracker
from lmrl.training.replay import alike, replay
from lmrl.training.updater import Updater
from tests.conftest import TINY_WALKS
from tests.training.test_updater_memory import batch, likelihood, short_of_memory

SIZES = [change for change in TINY_WALKS if not change.startswith("source.")]
PPO = [
    *SIZES, "objective={name: ppo, epochs: 2, minibatches: 2, value_warmup_steps: 0, entropy_coef: 0.1}", "source={name: rollouts}",
    "rollouts.prompts=4", "rollouts.samples=2", "evaluation.suite=null", "training.checkpoint_every=0",
    "model.config.attention_dropout=0.2",
]  # fmt: skip


def info_of(folder):
    return json.loads((folder / "info.json").read_text())


def command(*arguments):
    return CliRunner().invoke(cli.app, ["replay", *map(str, arguments)])


# --------------------------------------------------------------------------------------------------------------- collapse
@pytest.fixture(scope="module")
def collapsed(tmp_path_factory):
    """A run of PPO whose guard finds a collapse at step 16."""
    patch = pytest.MonkeyPatch()
    patch.setattr(Tracker, "collapsed", lambda self, closing=False: self.total == 16)
    patch.setattr(Tracker, "total", 0, raising=False)
    original = Tracker.add

    def add(self, step, measured):
        self.total = step
        original(self, step, measured)

    patch.setattr(Tracker, "add", add)
    patch.setattr(Tracker, "loss", lambda self: "collapse: as told")
    folder = tmp_path_factory.mktemp("collapsed") / "run"
    train(load_recipe("random_walks/bc", [*PPO, "training.steps=17", "training.on_collapse=warn"]), output=folder)
    patch.undo()
    return folder / "bundles" / "main-step-000016-collapse"


def test_a_collapse_leaves_loss_and_norm_of_its_last_update(collapsed):
    info = info_of(collapsed)
    assert info["event"] == "collapse" and info["step"] == 16 and info["last_steps"][-1]["grad_norm"] > 0
    assert info["environment"]["name"] == "random_walks" and info["versions"]["torch"] == version("torch")
    loss, norm = (float(info["stats"][name]) for name in ("loss", "grad_norm"))
    assert norm > 0 and math.isfinite(loss)
    replayed = replay(collapsed)
    assert replayed.same and f"loss {loss:.9g}, recorded {loss:.9g}: the same" in replayed.lines
    assert f"grad_norm {norm:.9g}, recorded {norm:.9g}: the same" in replayed.lines


def test_other_weights_are_not_the_same(collapsed, tmp_path):
    other = shutil.copytree(collapsed, tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    save_file({name: 1.5 * one for name, one in weights.items()}, other / "model.safetensors", {"format": "pt"})
    result = command(other)
    assert result.exit_code == 1 and ": not the same" in result.output
    assert command(collapsed).exit_code == 0


def test_other_versions_are_named(collapsed, tmp_path):
    other = shutil.copytree(collapsed, tmp_path / "other")
    info = info_of(other)
    info["versions"]["torch"] = "1.0"
    (other / "info.json").write_text(json.dumps(info))
    lines = replay(other).lines
    assert f"torch was 1.0 then, and is {version('torch')} now" in lines
    assert not any("transformers was" in line for line in lines)


def test_a_run_folder_names_its_bundles(collapsed):
    with pytest.raises(RunError, match=r"is not a bundle: name one of .*bundles: main-step-000016-collapse$"):
        replay(collapsed.parent.parent)


def test_a_probe_changes_nothing(tiny_policy):
    """Neither weights, generators, modes nor gradients; its numbers are those of a step, dropout included."""
    objective = likelihood()
    objective.dropout = True
    updater = Updater(tiny_policy.eval(), Optimizer(lr=1e-2), 10)
    before = {name: one.clone() for name, one in updater.parameters.items()}
    state = torch.get_rng_state()
    found = updater.probe(tiny_policy, objective, batch())
    assert torch.equal(torch.get_rng_state(), state) and not tiny_policy.training
    assert all(torch.equal(before[name], one) and one.grad is None for name, one in updater.parameters.items())
    stats = updater.step(tiny_policy, objective, batch())
    assert (found["loss"], found["grad_norm"]) == (stats["loss"], stats["grad_norm"])


def test_minibatches_come_back_whole():
    whole = batch(4)
    whole.sequences[1].chain, whole.sequences[2].zero_gradient = 7, True
    whole.sequences[3].fields["floors"] = torch.ones(2)
    again = batch_of(batch_tensors(whole))
    assert [one.chain for one in again.sequences] == [None, 7, None, None]
    assert [one.zero_gradient for one in again.sequences] == [False, False, True, False]
    for one, other in zip(whole.sequences, again.sequences, strict=True):
        assert torch.equal(one.tokens, other.tokens) and torch.equal(one.targets, other.targets)
        assert one.fields.keys() == other.fields.keys()


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [(1.0, 1.00005, True), (1.0, 1.001, False), (math.nan, math.inf, True), (math.nan, 1.0, False), (0.0, 1e-9, True)],
)
def test_the_same_number(one, other, same):
    assert alike(one, other) is same


# ----------------------------------------------------------------------------------------------------------------- memory
def stopped_by_memory(folder, *changes, recipe=PPO):
    with pytest.raises(MemoryShortError, match="reproduce with: lmrl replay") as caught:
        train(load_recipe("random_walks/bc", [*recipe, "training.steps=2", *changes]), output=folder)
    (bundle,) = (folder / "bundles").iterdir()
    assert str(caught.value).endswith(f"lmrl replay {bundle}") and "\n" not in str(caught.value)
    return bundle, info_of(bundle)


def memory_for(monkeypatch, tokens, gradient):
    """Memory for passes of so many tokens, of those with gradient or of those without."""
    original = policy_module.run_pass

    def run(policy, lm, micro, want):
        if micro.tokens_BT.numel() > tokens and torch.is_grad_enabled() == gradient:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return original(policy, lm, micro, want)

    monkeypatch.setattr(policy_module, "run_pass", run)


@pytest.mark.parametrize(("gradient", "kind"), [(True, "update"), (False, "score")])
def test_a_pass_runs_short_again(tmp_path, monkeypatch, gradient, kind):
    memory_for(monkeypatch, 2, gradient)
    bundle, info = stopped_by_memory(tmp_path / "run")
    assert bundle.name == "main-step-000001-memory" and info["pass"] == kind
    assert info["shape"][0] == 1 and info["shape"][1] > 2 and info["limits"]["total_mb"] > 0
    replayed = replay(bundle)
    assert replayed.same and "it runs out of memory again: a pass over one sequence" in replayed.lines[-1]
    assert any("microbatches of" in line and "CUDA out of memory" in line for line in replayed.lines)
    monkeypatch.undo()  # a larger machine
    result = command(bundle)
    assert result.exit_code == 1 and "it fits this time, with a peak of" in result.output


def test_a_rehearsal_runs_short_again(tmp_path, monkeypatch):
    short_of_memory(monkeypatch, 8)
    bundle, info = stopped_by_memory(tmp_path / "run", "training.try_worst_case=true", recipe=TINY_WALKS)
    assert info["pass"] == "rehearsal" and info["step"] == 0 and info["shape"] == [1, 31]
    assert replay(bundle).same
    monkeypatch.undo()
    assert replay(bundle).same is False


def test_the_optimizer_runs_short_again(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(torch.optim.AdamW, "step", fail)
    bundle, info = stopped_by_memory(tmp_path / "run")
    assert info["pass"] == "update" and info["options"] == {"step": True}
    assert replay(bundle).same
    monkeypatch.undo()
    assert replay(bundle).same is False


def test_sampling_runs_short_again(tmp_path, monkeypatch):
    sampled = []

    def fail(self):
        sampled.append([(request.tokens, request.sampling, request.key) for request in self.requests])
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(SlotBatch, "_admit", fail)
    bundle, info = stopped_by_memory(tmp_path / "run")
    assert info["pass"] == "generate" and info["shape"][0] == 8
    assert replay(bundle).same
    assert sampled[0] == sampled[1]  # contexts, sampling and the keys of random streams
    monkeypatch.undo()
    assert replay(bundle).same is False


def test_another_try_replaces_the_bundle(tmp_path, monkeypatch):
    """With other settings a resumed run fails elsewhere at the same step."""
    memory_for(monkeypatch, 2, gradient=True)
    bundle, first = stopped_by_memory(tmp_path / "run")
    gc.collect()  # the first run, with its lock on the folder
    memory_for(monkeypatch, 2, gradient=False)
    with pytest.raises(MemoryShortError):
        lmrl.train(tmp_path / "run" / "recipe.yaml", output=tmp_path / "run", resume=True)
    assert first["pass"] == "update" and info_of(bundle)["pass"] == "score"


def test_a_full_disk_does_not_hide_the_cause(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    memory_for(monkeypatch, 2, gradient=True)
    monkeypatch.setattr("lmrl.training.monitoring.bundle.save_file", full)
    with pytest.raises(
        MemoryShortError, match=r"^a pass over one sequence .*; no bundle: .* No space left on device\)$"
    ):
        train(load_recipe("random_walks/bc", [*PPO, "training.steps=2"]), output=tmp_path / "run")


def test_limits_name_the_address_space(monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (3 << 30, 3 << 30))
    found = memory_limits(torch.device("cpu"))
    assert (found["device"], found["limit_mb"]) == ("cpu", 3072) and found["peak_mb"] > 0


def test_one_of_several_processes_runs_short(tmp_path, monkeypatch):
    """It writes alone, without weights: those of the newest checkpoint, or of the beginning, do as well."""
    memory_for(monkeypatch, 2, gradient=True)
    monkeypatch.setattr("lmrl.training.monitoring.bundle.distributed", SimpleNamespace(size=lambda: 2, rank=lambda: 1))
    bundle, info = stopped_by_memory(tmp_path / "run")
    assert bundle.name == "main-step-000001-memory-rank1" and info["weights"] == "stages/main/start"
    assert not (bundle / "model.safetensors").exists()
    replayed = replay(bundle)
    assert replayed.same and "computed by 2 processes (ddp) then, and by one now" in replayed.lines
    (tmp_path / "run/stages/main/start").rename(tmp_path / "elsewhere")
    with pytest.raises(RunError, match=r"its weights are in .*stages/main/start, which does not exist"):
        replay(bundle)
