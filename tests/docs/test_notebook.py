"""The notebook's code runs as it is, and what it shows came from such a run."""

import json
import re
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).resolve().parents[2] / "docs/tutorials/first_run.ipynb"


@pytest.fixture(scope="module")
def cells():
    return [one for one in json.loads(NOTEBOOK.read_text())["cells"] if one["cell_type"] == "code"]


def test_every_cell_was_executed_in_order(cells):
    assert [one["execution_count"] for one in cells] == list(range(1, len(cells) + 1))
    kinds = {output["output_type"] for one in cells for output in one["outputs"]}
    assert kinds <= {"stream", "display_data", "execute_result"} and "execute_result" in kinds
    assert "/tmp/" not in NOTEBOOK.read_text() and "/home/" not in NOTEBOOK.read_text()


def test_the_code_runs(cells, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict = {"__name__": "notebook"}
    for one in cells:
        source = re.sub(r"(training\.steps=|\"steps\": )\d+", r"\g<1>3", "".join(one["source"]))
        source = source.replace('"runs/guess", ["training.steps=3"]', '"runs/guess", ["training.steps=4"]')
        exec(compile(source, NOTEBOOK.name, "exec"), names)
    assert names["written"]["task"]["rewards"][0]["function"] == "python:is_next"
    assert len(names["result"].metrics) == 4
