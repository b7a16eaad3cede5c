"""A whole GRPO step by its phases."""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gpu_checks.building import recipe_of


def step(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    recipe, _ = recipe_of(options, "0.5b", {"name": "grpo"}, steps=4, checkpoint_every=0)
    sizes = (2, 2, 8) if options.tiny else (16, 8, 256)
    recipe.rollouts.prompts, recipe.rollouts.samples, recipe.rollouts.max_new_tokens = sizes
    recipe.training.final = "last"
    with tempfile.TemporaryDirectory() as folder:
        lines = metrics_of(recipe, Path(folder) / "run")
    steps = [line for line in lines if line.get("kind") == "train"][1:]
    names = sorted({name for line in steps for name in line.get("time", {})})
    yield {"case": "0.5b grpo", "episodes": sizes[0] * sizes[1], "new_tokens": sizes[2]} | {
        name: statistics.median(line["time"][name] for line in steps) for name in names
    }


def metrics_of(recipe: Any, folder: Path) -> list[dict[str, Any]]:
    """Rows of metrics of a run in this process."""
    import lmrl

    lmrl.train(recipe, output=folder)
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
