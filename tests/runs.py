"""What two runs that should be one have in common."""

from __future__ import annotations

import json
from pathlib import Path


def metrics(folder: Path) -> list[dict]:
    """All but times, what was measured of memory, and the comparison of engine and learner, which every process makes anew."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        {name: value for name, value in line.items() if name != "time"}
        for line in lines
        if line["kind"] != "check" and "measured_mb" not in line
    ]


def assert_same_run(a: Path, b: Path, weights: int = 3) -> None:
    """Metrics, samples, results and the final weights of two runs are equal. weights: that there are so many files of them."""
    assert metrics(a) == metrics(b)
    for name in ("samples.jsonl", "results.json"):
        assert (a / name).exists() == (b / name).exists(), name
        if (a / name).exists():
            assert (a / name).read_text() == (b / name).read_text(), name
    files = sorted(path.relative_to(a) for path in (a / "stages").glob("*/final/**/*.safetensors"))
    assert len(files) >= weights
    for file in files:
        assert (a / file).read_bytes() == (b / file).read_bytes(), file
