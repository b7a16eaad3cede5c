"""The end of a run: its table of results, its warnings, and the commands for what comes next."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

from lmrl.atomic_files import write_atomically
from lmrl.recipe import MAIN_STAGE, OWN_TASK, PromptTask, any_weighted
from lmrl.recipe.files import stages_of
from lmrl.run import RESULTS_FILE, Run
from lmrl.training.checkpoint import final_state


def ended_early(run: Run, stage: str) -> str | None:
    """Why a finished stage ended before its last step, with its best policy; None if it did not."""
    return final_state(run, stage).get("ended")


def warnings_of(run: Run) -> list[tuple[str, int, str]]:
    """Stage, step and text of each warning of the run."""
    lines = [line for name in stages_of(run.recipe) for line in run.recorded(name, "warning")]
    return [(line["stage"], line["step"], line["text"]) for line in lines]


def closing_table(run: Run) -> tuple[dict[str, dict[str, dict[str, Any]]], list[str]]:
    """Rows for data, start, every stage and the optimum, also written to results.json; and the columns to show.

    A stage's row is for the policy that is its result. If its best and its last policy differ, the other one has its
    own row.
    """
    rows: dict[str, Any] = {}
    columns: dict[str, None] = {}
    for number, (name, recipe) in enumerate(stages_of(run.recipe).items()):
        if not run.final(name).exists():  # an earlier stage ended the run
            break
        state = final_state(run, name)
        scores, label = state["scores"], state["label"]
        if "data" in scores:
            rows["data"] = scores["data"]
        if number == 0 and recipe.model.path is not None and "start" in scores:
            rows["start"] = scores["start"]
        label = label if label not in rows else f"{label} ({name})"
        kept = "last" if state.get("kept") in (None, state["step"]) else "best"
        for which in sorted({"best", "last"} & set(scores), key=lambda which: which == kept):
            rows[label if which == kept else f"{label}, {which}"] = scores[which]
        optimum = scores.get("optimum")
        columns |= dict.fromkeys(state["columns"])
    if optimum:
        rows["optimum"] = optimum
    if run.writes:
        write_atomically(run.folder / RESULTS_FILE, json.dumps(rows, indent=2) + "\n")
    return rows, list(columns)


def closing_lines(run: Run) -> list[str]:
    """The place of the result, and commands to continue with."""
    recipe, folder = run.recipe, run.folder
    folder = folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder
    checkpoint = folder / "stages" / MAIN_STAGE / "final"
    quoted = shlex.quote(str(folder))
    if not recipe.objective.leaves_policy:
        judge = shlex.quote(str(checkpoint))
        return [
            f"checkpoint:  {checkpoint}",
            f"score texts: lmrl reward score {judge} --data SAMPLES.jsonl",
            f"serve it:    lmrl reward serve {judge}",
        ]
    judged = not isinstance(recipe.task, PromptTask) or any_weighted(recipe.task.rewards)
    scored = judged or recipe.evaluation.suite not in (None, OWN_TASK)
    options = recipe.resolved_objective.export_options
    return [
        f"checkpoint: {checkpoint}",
        f"score it:   lmrl eval {quoted}{'' if scored else ' --suite SUITE'}",
        *([f"talk to it: lmrl chat {quoted}"] if isinstance(recipe.task, PromptTask) else []),
        f"export it:  lmrl export {quoted} FOLDER {options}".rstrip(),
    ]
