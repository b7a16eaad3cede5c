"""`lmrl.evaluate`: score any policy on a suite."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lmrl.allocator import keep_freed_memory
from lmrl.errors import RecipeError
from lmrl.evaluation.evaluate import Evaluator, Scores
from lmrl.evaluation.suites import load_suite
from lmrl.policy.load import open_policy
from lmrl.run import final_checkpoint
from lmrl.trajectories.trajectory import Trajectory

TASK_FILE = "lmrl.json"
"""Beside the weights of a checkpoint: the task it was trained on, and the suite that scored it."""


@dataclass
class Report:
    suite: str
    policy: str
    metrics: Scores
    columns: list[str]
    """The metrics that the suite puts into tables."""
    trajectories: list[Trajectory]

    def to_json(self) -> str:
        return json.dumps({"suite": self.suite, "policy": self.policy, "metrics": self.metrics}, indent=2) + "\n"


def evaluate(
    policy: str | Path,
    suite: str | Path | None = None,
    overrides: Sequence[str] = (),
    checkpoint: str = "final",
    trust_remote_code: bool = False,
) -> Report:
    """Score a policy: a run folder, a checkpoint, any transformers or peft folder, a GGUF file, or a hub name.

    suite: a file or a shipped name (default: the suite of the policy's own recipe). A suite that follows runs, as the
    shipped ones do, scores a policy made by lmrl on the task it was trained for (its graph, its held-out prompts);
    `overrides` such as `task.graph=7` or `samples=4` change the suite. checkpoint: of a run, `final`, `best` or `step-N`.
    """
    import torch

    keep_freed_memory()
    path = str(policy)
    if (Path(path) / "stages").is_dir():
        path = str(final_checkpoint(Path(path), checkpoint))
    task, dtype = None, "float32"
    if (Path(path) / TASK_FILE).is_file():
        saved = json.loads((Path(path) / TASK_FILE).read_text())
        task, dtype, suite = saved["task"], saved["dtype"], suite or saved["suite"]
    if suite is None:
        raise RecipeError(f"'{policy}' does not say what it was trained for: name a suite, --suite NAME")
    loaded = load_suite(suite, list(overrides), task)
    evaluator = Evaluator(open_policy(path, dtype, trust_remote_code), loaded)
    if torch.cuda.is_available():
        evaluator.policy.to("cuda")
    metrics, trajectories = evaluator()
    return Report(str(suite), str(policy), metrics, loaded.metrics, trajectories)
