"""A hundred mutations of recipes and rows, always the same ones; `benchmarks/fuzz.py` tries thousands."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import fuzz
import fuzz_run
from fuzz import table
from fuzz_mutations import Case, as_yaml, resolved
from fuzz_recipes import RECIPES, ROWS
from fuzz_run import run_case

import lmrl.cli


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return fuzz.prepare(tmp_path_factory.mktemp("fuzz"))


def case(name, command="train --dry-run", recipe=None, **changes):
    rows = "".join(json.dumps(row) + "\n" for row in ROWS.get(name, ()))
    return Case("as it is", command, as_yaml(recipe or RECIPES[name]), rows.encode(), **changes)


@pytest.mark.parametrize("name", RECIPES)
def test_what_is_mutated_runs(tmp_path, model, name):
    assert run_case(case(name, "train"), model, tmp_path).name == "fine"
    assert run_case(case(name, "show", resolved(name)), model, tmp_path).name == "fine"


@pytest.mark.slow
def test_a_hundred_mutations(tmp_path, model):
    found = [one for number in (1, 2) for one in fuzz.run_batch(number, 50, model, tmp_path)]
    assert [f"{case!r}\n{outcome.defect}" for case, outcome in found if outcome.defect] == []
    assert len(found) == 100
    names = [outcome.name for _, outcome in found]
    assert names.count("fine") >= 10 and names.count("refused") >= 30
    assert {case.kind.split(":")[0] for case, _ in found} == {"recipe", *ROWS}


def leave(path):
    return lambda: Path(path).write_text("")


def say(text, code=0):
    def act():
        print(text, file=sys.stderr)
        sys.exit(code)

    return act


def raise_():
    raise KeyError("x")


@pytest.mark.parametrize(
    ("act", "defect"),
    [
        (leave("evil"), r"left behind: ['here/evil']"),
        (leave("../evil"), r"left behind: ['evil']"),
        (leave("../../evil"), r"left behind: ['../evil']"),
        (raise_, "KeyError: 'x'"),
        (say("Traceback (most recent call last)", 1), "exit code 1 without a line"),
        (say("lmrl: x\nTraceback", 1), "Traceback"),
        (say("lmrl: " + "x" * 3000, 2), "a line of 3006 characters"),
        (say("lmrl: \x1b[31m", 2), r"control character '\x1b'"),
        (say("", 70), "exit code 70"),
    ],
    ids=["file", "file above", "file beside", "exception", "no line", "traceback", "long", "control", "code"],
)
def test_defects_are_found(tmp_path, model, monkeypatch, act, defect):
    monkeypatch.setattr(lmrl.cli, "main", act)
    outcome = run_case(case("prompts"), model, tmp_path)
    assert outcome.name == "defect" and defect in outcome.defect


def test_what_takes_too_long_is_found(tmp_path, model, monkeypatch):
    import time

    monkeypatch.setattr(fuzz_run, "MAX_SECONDS", 0)
    monkeypatch.setattr(lmrl.cli, "main", lambda: time.sleep(30))
    assert "TookTooLong" in run_case(case("prompts"), model, tmp_path).defect


def test_smallest_mutation_with_a_defect(tmp_path, model, monkeypatch):
    monkeypatch.setattr(lmrl.cli, "main", raise_)
    text = fuzz.smallest(1, 5, model, tmp_path)
    assert "lmrl show recipe.yaml" in text and text.splitlines()[-1].startswith("KeyError: 'x'")


def test_table_by_kind():
    lines = [{"kind": "a", "outcome": "fine"}, {"kind": "b", "outcome": "defect"}, {"kind": "a", "outcome": "refused"}]
    assert table(lines).splitlines()[2:] == [
        "| a | 1 | 1 | 0 | 0 |",
        "| b | 0 | 0 | 0 | 1 |",
        "| all | 1 | 1 | 0 | 1 |",
    ]
