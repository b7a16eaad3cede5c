"""Runs that are stopped on purpose, and comparisons of runs that should be equal."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def stopped_before(step: int, stage: str | None = None) -> Iterator[None]:
    """Inside, a run must fail before it begins this step. stage: only of this stage."""
    from lmrl.training.stage import Stage

    original = Stage._step

    def stop(self, number):
        if number == step and stage in (None, self.name):
            raise RuntimeError("stopped on purpose")
        original(self, number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stage, "_step", stop)
        with pytest.raises(RuntimeError, match="stopped on purpose"):
            yield


def metrics(folder: Path) -> list[dict]:
    """Metrics lines without times, memory measurements, and the sampler check, which every process repeats."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        {name: value for name, value in line.items() if name != "time"}
        for line in lines
        if line["kind"] != "check" and "measured_mb" not in line
    ]


def assert_same_run(a: Path, b: Path, weights: int = 3) -> None:
    """Metrics, samples, results and the final weights of two runs are equal. weights: minimum number of weight files."""
    assert metrics(a) == metrics(b)
    for name in ("samples.jsonl", "results.json"):
        assert (a / name).exists() == (b / name).exists(), name
        if (a / name).exists():
            assert (a / name).read_text() == (b / name).read_text(), name
    files = sorted(path.relative_to(a) for path in (a / "stages").glob("*/final/**/*.safetensors"))
    assert len(files) >= weights
    for file in files:
        assert (a / file).read_bytes() == (b / file).read_bytes(), file
