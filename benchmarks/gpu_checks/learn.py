"""Final scores of small runs, on the CPU in float32 and on the GPU in bfloat16."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gpu_checks.building import SHAPES


def learn(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Small runs in processes of their own; those of a CPU beside those of the GPU."""
    steps = 20 if options.tiny else 300
    small = [f"training.steps={steps}", "training.checkpoint_every=0"]
    cases = {"tiny BC, CPU float32": (["training.precision=float32"], True)}
    if options.device.type == "cuda":
        sizes = [f"model.config.{name}={value}" for name, value in SHAPES["0.5b"].items()]
        large = [*sizes, "optimizer.lr=1e-4", "training.steps=100", "training.threads=null"]
        cases |= {
            "tiny BC, GPU bfloat16": ([], False),
            "0.5b BC, GPU float32": ([*large, "training.precision=float32"], False),
            "0.5b BC, GPU bfloat16": (large, False),
        }
    with tempfile.TemporaryDirectory() as scratch:
        on_cpu = [start_run(Path(scratch), name, small + more, cpu) for name, (more, cpu) in cases.items() if cpu]
        for name, (more, cpu) in cases.items():
            if not cpu:
                yield finished_run(*start_run(Path(scratch), name, small + more, cpu))
        for started in on_cpu:
            yield finished_run(*started)


def start_run(
    scratch: Path, name: str, overrides: list[str], cpu: bool
) -> tuple[str, Path, subprocess.Popen[bytes], float]:
    """`random_walks/bc` in a process of its own: its name, folder, process, and when it began."""
    folder = scratch / name.replace(" ", "-")
    code = f"import lmrl; lmrl.train('random_walks/bc', overrides={overrides!r}, output={str(folder)!r})"
    environment = os.environ | ({"CUDA_VISIBLE_DEVICES": ""} if cpu else {})
    root = Path(__file__).parents[2]  # where Python finds lmrl
    with open(folder.with_suffix(".log"), "w") as log:
        process = subprocess.Popen([sys.executable, "-c", code], cwd=root, env=environment, stdout=log, stderr=log)
    return name, folder, process, time.perf_counter()


def finished_run(name: str, folder: Path, process: subprocess.Popen[bytes], started: float) -> dict[str, Any]:
    """What a run came to, once it has ended."""
    if process.wait():
        return {"case": name, "error": folder.with_suffix(".log").read_text()[-500:]}
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    scores = [line for line in lines if line.get("kind") == "eval"]
    losses = [line["loss"] for line in lines if line.get("kind") == "train"]
    return {
        "case": name,
        "score": scores[-1] if scores else None,
        "loss": statistics.mean(losses[-20:]),
        "seconds": time.perf_counter() - started,
    }
