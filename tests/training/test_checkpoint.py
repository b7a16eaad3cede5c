"""Damaged checkpoints: found by their checksums, named, and an older complete one is suggested."""

import json
import shutil

import pytest

from lmrl.errors import RunError
from lmrl.recipe.files import load_recipe
from lmrl.training import resume_run, train
from lmrl.training.checkpoint import CHECKSUMS, damage, verify, write_checksums
from tests.conftest import TINY_WALKS


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run of six steps as one that was stopped after its fourth."""
    folder = tmp_path_factory.mktemp("run") / "run"
    changes = [*TINY_WALKS, "training.steps=4", "training.checkpoint_every=2", "training.keep_checkpoints=9"]
    train(load_recipe("random_walks/bc", [*changes, "evaluation.suite=null"]), output=folder)
    shutil.rmtree(folder / "stages/main/final")
    shutil.rmtree(folder / "stages/main/checkpoints/step-000004")
    shutil.copytree(folder / "stages/main/checkpoints/step-000002", folder / "stages/main/checkpoints/step-000003")
    return folder


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGES = {
    "a flipped byte in the weights": (lambda one: flip(one / "model.safetensors"), "'model.safetensors' is damaged"),
    "a truncated optimizer": (
        lambda one: (one / "state/optimizer.safetensors").write_bytes(b"\0" * 9),
        "'state/optimizer.safetensors' is damaged",
    ),
    "a broken trainer.json": (
        lambda one: (one / "state/trainer.json").write_text('{"st'),
        "'state/trainer.json' is dam",
    ),
    "no state": (lambda one: shutil.rmtree(one / "state"), "'state/trainer.json' is missing"),
    "no weights": (lambda one: (one / "model.safetensors").unlink(), "'model.safetensors' is missing"),
}


@pytest.mark.parametrize("sums", [True, False], ids=["checksums", "as of old"])
@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_checkpoint_offers_an_older_one(stopped, tmp_path, how, sums):
    run = shutil.copytree(stopped, tmp_path / "run")
    newest, older = (run / "stages/main/checkpoints" / name for name in ("step-000003", "step-000002"))
    break_it, message = DAMAGES[how]
    if not sums:
        if "weights" in how:
            pytest.skip("without checksums only what goes on from it is opened")
        (newest / CHECKSUMS).unlink()
        message = message.partition(" is dam")[0].strip("'") if "missing" in message else "cannot be read"
    break_it(newest)
    with pytest.raises(RunError, match=message) as caught:
        verify(newest, [older])
    assert f"step-000002 is complete: delete {newest} and resume again" in str(caught.value)
    assert caught.value.exit_code == 2 and "\n" not in str(caught.value)
    break_it(older)
    if sums or "state" in how:
        with pytest.raises(RunError, match="no older checkpoint is complete: delete .*checkpoints and resume again"):
            verify(newest, [older])


def test_a_resumed_run_checks_its_checkpoint_and_goes_on_from_the_one_before(stopped, tmp_path):
    run = shutil.copytree(stopped, tmp_path / "run")
    newest = run / "stages/main/checkpoints/step-000003"
    flip(newest / "state/optimizer.safetensors")
    with pytest.raises(RunError, match="'state/optimizer.safetensors' is damaged"):
        resume_run(run)
    shutil.rmtree(newest)
    assert resume_run(run).checkpoint.is_dir()


def test_checksums_cover_every_file(stopped):
    folder = stopped / "stages/main/checkpoints/step-000002"
    sums = json.loads((folder / CHECKSUMS).read_text())
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert set(sums) == files - {CHECKSUMS.as_posix()} and damage(folder) is None


def test_checksums_by_hand(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    write_checksums(tmp_path)
    assert json.loads((tmp_path / CHECKSUMS).read_text()) == {"a": "cf4ab791c62b8d2b2109c90275287816"}
