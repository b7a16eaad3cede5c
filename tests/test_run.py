"""The run folder's files: what a resumed run keeps of them."""

import json

import pytest

from lmrl.recipe.files import load_recipe
from lmrl.run import METRICS_FILE, Run


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
    assert f"{path}: line 2 cannot be read: kept in {METRICS_FILE}.broken" in capsys.readouterr().err
    run.cut("main", 1)  # later steps are dropped as ever, and nothing is left to be put aside
    assert path.read_text().splitlines() == fine[:2] and not capsys.readouterr().err
