"""`lmrl.evaluate`: score any policy on a suite."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmrl.allocator import keep_freed_memory
from lmrl.errors import RecipeError
from lmrl.evaluation.evaluate import Evaluator, Scores
from lmrl.evaluation.suites import load_suite
from lmrl.policy.load import open_policy
from lmrl.recipe_files import locate_rewards
from lmrl.run import RECIPE_FILE, final_checkpoint
from lmrl.trajectories.trajectory import Trajectory

TASK_FILE = "lmrl.json"
"""Beside the weights of a checkpoint: the task it was trained on, and the suite that scored it."""


@dataclass
class Report:
    suite: str
    policy: str
    rows: dict[str, Scores]
    """By what was varied: `policy` alone, or `beta 1`, `beta 4`, ..."""
    columns: list[str]
    """The metrics that the suite puts into tables."""
    trajectories: list[Trajectory]
    """Of the last row."""

    @property
    def metrics(self) -> Scores:
        """Scores of the only row."""
        (scores,) = self.rows.values()
        return scores

    def to_json(self) -> str:
        scores = {"metrics": self.metrics} if len(self.rows) == 1 else {"rows": self.rows}
        return json.dumps({"suite": self.suite, "policy": self.policy, **scores}, indent=2) + "\n"


def evaluate(
    policy: str | Path,
    suite: str | Path | None = None,
    overrides: Sequence[str] = (),
    checkpoint: str = "final",
    trust_remote_code: bool = False,
    betas: Sequence[float] = (),
) -> Report:
    """Score a policy: a run folder, a checkpoint, any transformers or peft folder, a GGUF file, or a hub name.

    suite: a file or a shipped name (default: the suite of the policy's own recipe). A suite that follows runs, as the
    shipped ones do, scores a policy made by lmrl on the task it was trained for (its graph, its held-out prompts);
    `overrides` such as `task.graph=7` or `samples=4` change the suite. checkpoint: of a run, `final`, `best` or `step-N`.
    betas: weights of Q to try one after the other, of a policy with Q heads (0: without Q).
    """
    import torch

    keep_freed_memory()
    evaluator = evaluator_for(policy, suite, overrides, checkpoint, trust_remote_code)
    if torch.cuda.is_available():
        evaluator.policy.to("cuda")
    if betas and evaluator.policy.guidance is None:
        raise RecipeError(f"--beta weighs Q values, but '{policy}' has no Q heads: train one, for instance maze/ilql")
    rows = {}
    try:
        for beta in betas or (None,):
            rows["policy" if beta is None else f"beta {beta:g}"], trajectories = evaluator(beta)
    finally:
        evaluator.engine.close()
    return Report(evaluator.name, str(policy), rows, evaluator.suite.metrics, trajectories)


def evaluator_for(
    policy: str | Path,
    suite: str | Path | None = None,
    overrides: Sequence[str] = (),
    checkpoint: str = "final",
    trust_remote_code: bool = False,
) -> Evaluator:
    """A saved policy and the suite it is scored on, loaded; see `evaluate`."""
    path = str(policy)
    if (Path(path) / "stages").is_dir():
        path = str(final_checkpoint(Path(path), checkpoint))
    task, dtype = None, "float32"
    if (Path(path) / TASK_FILE).is_file():
        saved = saved_task(Path(path))
        task, dtype, suite = saved["task"], saved["dtype"], suite or saved["suite"]
    if suite is None:
        raise RecipeError(f"'{policy}' does not say what it was trained for: name a suite, --suite NAME")
    loaded = load_suite(suite, list(overrides), task)
    evaluator = Evaluator(open_policy(path, dtype, trust_remote_code), loaded)
    evaluator.name = str(suite)
    return evaluator


def saved_task(checkpoint: Path) -> dict[str, Any]:
    """`{"task", "suite", "dtype"}` as a checkpoint was saved with, its run's reward models found where they lie now."""
    saved = json.loads((checkpoint / TASK_FILE).read_text())
    run = next((one for one in checkpoint.resolve().parents if (one / RECIPE_FILE).is_file()), None)
    return saved | ({"task": locate_rewards(saved["task"], run)} if run else {})
