"""`lmrl.evaluate`: score any policy on a suite, or on the task it was trained for."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmrl.allocator import keep_freed_memory
from lmrl.errors import RecipeError, ScoreError
from lmrl.evaluation.evaluate import Evaluator, Scores
from lmrl.evaluation.suites import load_suite, own_suite
from lmrl.policy.load import open_policy
from lmrl.recipe.files import locate_rewards
from lmrl.run import RECIPE_FILE, checkpoint_of, read_recipe
from lmrl.trajectories.trajectory import Trajectory

TASK_FILE = "lmrl.json"
"""Beside the weights of a checkpoint: the task it was trained on, how it sampled, and the suite that scored it."""
OWN_TASK = "its own task"
"""Stands for a suite where a policy is scored on the task of its own run."""
OWN_EPISODES, OWN_STARTS = 100, 500
"""Of an own task: the fewest episodes that score it (several from each start state if need be), and the most starts."""


@dataclass
class Report:
    suite: str
    """The suite's name, or `OWN_TASK`."""
    policy: str
    rows: dict[str, Scores]
    """By what was varied: `policy` alone, or `beta 1`, `beta 4`, ..."""
    columns: list[str]
    """The metrics that the suite puts into tables."""
    trajectories: list[Trajectory]
    """Of the last row."""
    played: str = ""
    """What was played: how many start states or prompts, which, and how often."""

    @property
    def metrics(self) -> Scores:
        """Scores of the only row."""
        (scores,) = self.rows.values()
        return scores

    def require(self, floors: Mapping[str, float]) -> None:
        """Raise ScoreError if a metric's mean is below its floor in any row, RecipeError if there is no such metric."""
        known = list(dict.fromkeys(name for scores in self.rows.values() for name in scores))
        for metric in floors:
            if metric not in known:
                raise RecipeError(
                    f"there is no metric '{metric}' to be held to: this evaluation has {', '.join(known)}"
                )
        low = [
            f"{metric} of {label} is {scores[metric]['mean']:.4g}, below {floor:g}"
            for metric, floor in floors.items()
            for label, scores in self.rows.items()
            if metric in scores and not scores[metric]["mean"] >= floor
        ]
        if low:
            raise ScoreError("; ".join(low))

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

    suite: a file or a shipped name (default: the suite of the policy's own recipe; without one the recipe's own task:
    fresh episodes of its environment, or its held-out prompts). A suite that follows runs, as the shipped ones do,
    scores a policy made by lmrl on the task it was trained for (its graph, its held-out prompts); `overrides` such as
    `task.graph=7` or `samples=4` change the suite. checkpoint: of a run, `final`, `best` or `step-N`.
    betas: weights of Q to try one after the other, of a policy with Q heads (0: without Q).
    """
    from lmrl.accelerators import default_device

    keep_freed_memory()
    evaluator = evaluator_for(policy, suite, overrides, checkpoint, trust_remote_code)
    evaluator.policy.to(default_device())
    if betas and evaluator.policy.guidance is None:
        raise RecipeError(f"--beta weighs Q values, but '{policy}' has no Q heads: train one, for instance maze/ilql")
    rows = {}
    try:
        for beta in betas or (None,):
            rows["policy" if beta is None else f"beta {beta:g}"], trajectories = evaluator(beta)
    finally:
        evaluator.engine.close()
    return Report(evaluator.name, str(policy), rows, evaluator.suite.metrics, trajectories, evaluator.played)


def evaluator_for(
    policy: str | Path,
    suite: str | Path | None = None,
    overrides: Sequence[str] = (),
    checkpoint: str = "final",
    trust_remote_code: bool = False,
) -> Evaluator:
    """A saved policy and the suite it is scored on, loaded; see `evaluate`."""
    path = checkpoint_of(str(policy), checkpoint)
    task, dtype = None, "float32"
    if (Path(path) / TASK_FILE).is_file():
        saved = saved_task(Path(path))
        task, dtype, suite = saved["task"], saved["dtype"], suite or saved["suite"]
    if suite is None:
        if task is None:
            raise RecipeError(f"'{policy}' does not say what it was trained for: name a suite, --suite NAME")
        loaded = own_suite(task, saved.get("rollouts") or run_rollouts(Path(path)), list(overrides))
    else:
        loaded = load_suite(suite, list(overrides), task)
    evaluator = Evaluator(open_policy(path, dtype, trust_remote_code), loaded)
    evaluator.name = OWN_TASK if suite is None else str(suite)
    if suite is None:
        size_own(evaluator, {override.partition("=")[0] for override in overrides})
    return evaluator


def size_own(evaluator: Evaluator, overridden: set[str]) -> None:
    """Decide how many episodes an own task is scored by, where overrides do not."""
    if "episodes" not in overridden and len(evaluator.starts()) > OWN_STARTS:
        evaluator.suite.episodes = OWN_STARTS
    if "samples" not in overridden:
        evaluator.suite.samples = math.ceil(OWN_EPISODES / len(evaluator.starts()))


def saved_task(checkpoint: Path) -> dict[str, Any]:
    """`{"task", "suite", "dtype", "rollouts"}` as a checkpoint was saved with, its run's reward models found where they
    lie now. Checkpoints of older versions lack `rollouts`."""
    saved: dict[str, Any] = json.loads((checkpoint / TASK_FILE).read_text())
    run = run_of(checkpoint)
    return saved | ({"task": locate_rewards(saved["task"], run)} if run else {})


def run_rollouts(checkpoint: Path) -> dict[str, Any]:
    """How the run around a checkpoint sampled; {} for a checkpoint outside of its run."""
    run = run_of(checkpoint)
    return read_recipe(run).rollouts.model_dump(mode="json") if run else {}


def run_of(checkpoint: Path) -> Path | None:
    return next((one for one in checkpoint.resolve().parents if (one / RECIPE_FILE).is_file()), None)
