"""Scoring the completions of a log again, by the same rewards or others, without playing anything."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lmrl.errors import RecipeError
from lmrl.evaluation.identity import suite_version
from lmrl.evaluation.log import EvalLog, LogWriter, episode_row, write_scores
from lmrl.evaluation.scoring import Scores, Scoring, check_metrics
from lmrl.evaluation.suites import Suite, allow_code, load_suite, refuse_code
from lmrl.recipe import PromptTask, any_weighted
from lmrl.recipe.document import Document
from lmrl.recipe.overrides import apply_overrides
from lmrl.recipe.paths import resolve_files
from lmrl.recipe.validation import validate
from lmrl.rewards.load import load_rewards
from lmrl.rewards.rewards import drop_failed, judge
from lmrl.trajectories.trajectory import Trajectory


def rescore_log(
    log: EvalLog,
    suite: str | Path | None = None,
    overrides: Sequence[str] = (),
    target: Path | None = None,
    run_code: bool = False,
) -> tuple[Suite, Scores, list[Trajectory]]:
    """Score a log's episodes by the rewards of a suite (None: the log's own suite), changed by overrides.

    Only rewards and metrics of the suite count: prompts, completions and sampling are the log's. target: a folder for a
    new log with the new scores; the old one stays as it is. run_code: allow rewards to run code that the policy wrote.
    Raises RecipeError if there are no rewards to score by, RunError for an incomplete log.
    """
    judged_by, task = judging_suite(log, suite, overrides)
    judged_by = allow_code(judged_by) if run_code else judged_by
    refuse_code(judged_by)
    rewards = load_rewards(task.rewards, task.special_tokens, task.call_timeout)
    rows, trajectories = log.rows(), [cleared(one) for one in log.complete()]
    width = log.header["part"] * log.header["samples"]
    parts = [trajectories[first : first + width] for first in range(0, len(trajectories), width)]
    for part in parts:
        judge(rewards, [one for one in part if not one.failure])
    fixed, unit = log.scoring.fixed, log.scoring.unit
    scoring = Scoring(judged_by.metrics, unit, fixed=fixed)
    kept = drop_failed(trajectories, task.max_failed, "reward")
    scores = scoring.report(kept)
    if target is not None:
        writer = LogWriter(target, _header(log, judged_by, scoring))
        try:
            for number in range(writer.parts_done, len(parts)):
                old = rows[number * width : (number + 1) * width]
                writer.write([_row(one, row) for one, row in zip(parts[number], old, strict=True)])
            write_scores(target, scores)
        finally:
            writer.close()
    return judged_by, scores, kept


def judging_suite(log: EvalLog, suite: str | Path | None, overrides: Sequence[str] = ()) -> tuple[Suite, PromptTask]:
    """The log's suite with the rewards and metrics of another one and with overrides, and its task."""
    data = json.loads(json.dumps(log.header["suite"]["resolved"]))
    if log.header["judged_by"] != "reward":
        raise RecipeError(f"--rescore: the episodes of {log.folder} were judged by their environment, not by rewards")
    if data.get("choices") is not None:
        raise RecipeError(
            f"--rescore: the episodes of {log.folder} are choices by log-likelihood, which have no rewards to score by"
        )
    if data.get("run_code"):
        data["run_code"] = False  # permission was given to an earlier call
    if suite is not None:
        other = load_suite(suite)
        if not isinstance(other.task, PromptTask):
            raise RecipeError(f"--suite: '{suite}' has no rewards to score completions by")
        plain = other.model_dump(mode="json")
        data["task"]["rewards"], data["metrics"] = plain["task"]["rewards"], plain["metrics"]
        data["run_code"] = plain["run_code"]
    document = Document(data, log.folder)
    apply_overrides(document, overrides)
    resolve_files(document.data, Path.cwd())
    found = validate(Suite, document)
    task = found.task
    if not isinstance(task, PromptTask) or not any_weighted(task.rewards):
        raise RecipeError("task.rewards: no reward has a weight to score by: name a suite, --suite NAME")
    check_metrics(found.metrics, log.header["samples"])
    return found, task


def cleared(trajectory: Trajectory) -> Trajectory:
    """An episode without its scores; changed in place. One that failed before the policy's answer has nothing to score."""
    if not trajectory.turns:
        return trajectory
    trajectory.reward, trajectory.components, trajectory.failure = 0.0, {}, None
    for segment in trajectory.segments:
        segment.rewards = [0.0] * len(segment.tokens)
    for turn in trajectory.turns:
        turn.reward = 0.0
    return trajectory


def _header(log: EvalLog, suite: Suite, scoring: Scoring) -> dict[str, Any]:
    old = log.header
    version = suite_version(suite)
    return old | {
        "suite": {"name": old["suite"]["name"], "version": version, "resolved": suite.model_dump(mode="json")},
        "scoring": scoring.to_plain(),
        "max_failed": suite.task.max_failed,
        "rescored": {"from": old["suite"]["version"], "at": datetime.now(UTC).isoformat(timespec="seconds")},
    }


def _row(trajectory: Trajectory, old: dict[str, Any]) -> dict[str, Any]:
    return episode_row(trajectory, old["tokenizer"]) | {name: old[name] for name in ("began", "seconds")}
