"""The run folder's files: what a resumed run keeps of them."""

import errno
import json
import os
import shutil

import pytest

from lmrl.errors import LostFolderError, RunError
from lmrl.recipe.files import load_recipe
from lmrl.run import METRICS_FILE, SAMPLES_FILE, Run
from lmrl.run_folders import RECIPE_FILE, checkpoints_in, final_checkpoint
from lmrl.training.monitoring.bundle import where_kept


@pytest.fixture
def run(tmp_path):
    return Run.create(tmp_path / "run", load_recipe("random_walks/ppo"))


def line(stage, step, kind="train"):
    return json.dumps({"stage": stage, "step": step, "kind": kind})


BROKEN = [
    '{"stage": "main", "st',
    "not json",
    "[1, 2]",
    '{"stage": "main"}',
    '{"stage": "elsewhere", "step": 1}',
    b"\xff\xfe",
]


@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_line_is_put_aside_and_its_neighbours_stay(run, broken, capsys):
    stage = list(run.recipe.stages)[0] if run.recipe.stages else "main"
    path = run.folder / METRICS_FILE
    fine = [line(stage, 1), line("main", 1), line("main", 2)]
    broken = broken if isinstance(broken, bytes) else broken.encode()
    path.write_bytes(b"\n".join([fine[0].encode(), broken, *(one.encode() for one in fine[1:]), b'{"torn']))
    assert [found["step"] for found in run.recorded("main", "train")][-2:] == [1, 2]
    run.cut("main", 2)
    assert path.read_text().splitlines() == fine
    assert (run.folder / f"{METRICS_FILE}.broken").read_bytes() == broken + b"\n"
    assert f"{path}: line 2 cannot be read: moved to {METRICS_FILE}.broken" in capsys.readouterr().err
    run.cut("main", 1)  # later steps are dropped as ever, and nothing is left to be put aside
    assert path.read_text().splitlines() == fine[:2] and not capsys.readouterr().err


def killed(run):
    """Let go of a run's folder, as the end of its process does."""
    run._lock.close()


def test_a_start_that_came_to_nothing_is_replaced(run):
    run.record({"stage": "main", "step": 0, "kind": "eval"})
    run.record_samples([{"stage": "main", "step": 1}])
    (run.stage_folder("main") / "start").mkdir(parents=True)
    killed(run)
    other = Run.create(run.folder, load_recipe("random_walks/ppo", ["training.seed=3"]))
    assert "seed: 3" in (run.folder / RECIPE_FILE).read_text()
    assert not (run.folder / METRICS_FILE).exists() and not (run.folder / "stages").exists()
    with pytest.raises(RunError, match="another process is writing to this run"):
        Run.create(run.folder, other.recipe)


@pytest.mark.parametrize("left", ["train", "torn", "checkpoint", "file"])
def test_what_a_run_has_made_is_not_replaced(run, left):
    if left == "file":
        (run.folder / "notes.txt").write_text("mine")
    elif left == "checkpoint":
        (run.stage_folder("main") / "checkpoints" / "step-000000").mkdir(parents=True)
    else:
        (run.folder / METRICS_FILE).write_text(line("main", 1) + "\n" if left == "train" else '{"stage": "ma')
    killed(run)
    before = sorted(run.folder.rglob("*"))
    with pytest.raises(RunError, match="holds a run: continue it with --resume, or choose another --output"):
        Run.create(run.folder, run.recipe)
    run.discard()
    assert sorted(run.folder.rglob("*")) == before


@pytest.mark.parametrize("after", ["moved", "deleted", "replaced"])
def test_a_run_ends_if_its_folder_is_lost(run, tmp_path, after):
    run.record({"stage": "main", "step": 1, "kind": "train"})
    if after == "moved":
        run.folder.rename(tmp_path / "elsewhere")
    else:
        shutil.rmtree(run.folder)
    other = Run.create(run.folder, run.recipe) if after == "replaced" else None
    with pytest.raises(LostFolderError, match="was moved, deleted or replaced while this run was writing to it"):
        run.record({"stage": "main", "step": 2, "kind": "train"})
    with pytest.raises(LostFolderError):
        run.write_folder(run.final("main"), lambda folder: None)
    assert not run.stage_folder("main").exists() and run.folder.exists() == (other is not None)


def test_a_folder_that_was_not_written_is_removed(run):
    def write(folder):
        (folder / "half").write_text("some")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OSError, match="No space left"):
        run.write_folder(run.final("main"), write)
    assert list(run.stage_folder("main").iterdir()) == []


def test_a_recipe_edited_by_hand_counts_as_changed(run):
    own = run.folder / RECIPE_FILE
    killed(run)
    assert Run.resume(run.folder, None).changed_files() == []
    own.write_text(own.read_text().replace("seed: 0", "seed: 3"))
    edited = Run.resume(run.folder, None)
    assert edited.changed_files() == [str(own)]
    edited.rewrite_recipe()
    assert edited.changed_files() == [] and edited.recipe.training.seed == 3


def test_files_that_look_like_a_run_are_nobodys_to_delete(tmp_path):
    (tmp_path / SAMPLES_FILE).write_text("{}")
    with pytest.raises(RunError, match="exists and is not empty: choose another --output"):
        Run.create(tmp_path, load_recipe("random_walks/ppo"))
    assert (tmp_path / SAMPLES_FILE).read_text() == "{}"


def test_a_discarded_run_takes_its_new_folders_along(tmp_path):
    (tmp_path / "kept").mkdir()
    run = Run.create(tmp_path / "kept" / "new" / "run", load_recipe("random_walks/ppo"))
    run.discard()
    assert list(tmp_path.rglob("*")) == [tmp_path / "kept"]


def test_only_numbered_folders_are_checkpoints(tmp_path):
    for name in ("step-000002", "step-old", "step-10", "step-000002-copy", ".writing-step-000020"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    (tmp_path / "checkpoints" / "step-000099").write_text("a file")
    assert [path.name for path in checkpoints_in(tmp_path)] == ["step-000002", "step-10"]


def test_suggested_commands_quote_folders(tmp_path):
    folder = tmp_path / "my run"
    Run.create(folder, load_recipe("random_walks/ppo")).release()
    with pytest.raises(RunError, match=f"continue it with: lmrl train '{folder}' --resume"):
        final_checkpoint(folder)
    assert where_kept("kept", folder, None).endswith(f"lmrl replay '{folder}'")
