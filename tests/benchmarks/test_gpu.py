"""The measurements of benchmarks/gpu.py run end to end, with tiny shapes, on a CPU."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"
NAMES = {"parity", "head", "attention", "update", "decode", "step", "fsdp1"}


def test_measurements_run_and_are_not_repeated(tmp_path):
    out = tmp_path / "gpu.jsonl"
    command = [sys.executable, str(SCRIPT), *sorted(NAMES), "--tiny", "--device", "cpu", "--out", str(out)]
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert {line["measurement"] for line in lines if line.get("done")} == NAMES
    assert not [line for line in lines if "error" in line]
    parity = {line["way"]: line for line in lines if line["measurement"] == "parity" and "way" in line}
    assert parity["float32 shared prompts"]["logprob_max_abs"] < 1e-5
    assert 0 < parity["bfloat16 padded"]["logprob_max_abs"] < 0.02
    one, other = [line["losses"] for line in lines if line["measurement"] == "fsdp1" and "losses" in line]
    assert other == pytest.approx(one, rel=1e-2, abs=1e-4)  # norms gathered in bfloat16
    computed = [line["computed_tokens"] for line in lines if "computed_tokens" in line]
    assert computed[0] > computed[1] > computed[2]  # padded, end to end, prompts once

    subprocess.run(command, check=True, capture_output=True, timeout=60)
    assert len(out.read_text().splitlines()) == len(lines)
    table = subprocess.run(
        [sys.executable, str(SCRIPT), "table", "--out", str(out)], check=True, capture_output=True, text=True
    )
    assert "### update (CPU" in table.stdout


def test_a_stopped_or_failed_measurement_begins_anew(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(SCRIPT.parent)
    import gpu

    def fails(options):
        yield {"case": 1, "error": "no network"}

    options = argparse.Namespace(out=tmp_path / "gpu.jsonl", device=torch.device("cpu"))
    lines = [{"measurement": "head", "way": "a"}, {"measurement": "decode", "way": "b"}, {"measurement": "step"}]
    options.out.write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.setitem(gpu.MEASUREMENTS, "head", lambda options: iter([{"way": "c"}]))
    monkeypatch.setitem(gpu.MEASUREMENTS, "decode", fails)
    assert gpu.execute(options, ["head", "decode"]) == 1
    found = [(line["measurement"], line.get("way"), "done" in line) for line in gpu.read(options.out)]
    assert found == [("step", None, False), ("head", "c", False), ("head", None, True), ("decode", None, False)]
