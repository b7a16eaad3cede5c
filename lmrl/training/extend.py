"""Continuing a run for more steps than its recipe had: reports what that changes, and refuses what it would
invalidate."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from lmrl.atomic_files import scratch_path
from lmrl.errors import RunError
from lmrl.objectives.policy_gradient import HOLD_ENTROPY
from lmrl.recipe import MAIN_STAGE, MixtureSource, Recipe
from lmrl.recipe.evaluations import OWN_TASK, own_plan
from lmrl.recipe.files import stages_of
from lmrl.recipe.rates import default_schedule
from lmrl.run import Run
from lmrl.run_folders import step_name
from lmrl.training.checkpoint import final_state
from lmrl.training.updater import schedule


def extend(run: Run, before: Recipe) -> list[str]:
    """Make a reopened run ready for the further steps of its recipe; returns a note on each stage that has any.

    before: the run's earlier recipe. A finished stage continues from its last step. Raises RunError if it
    cannot, before anything is changed.
    """
    old, new = stages_of(before), stages_of(run.recipe)
    raised = further_steps(before, run.recipe)
    for name in raised:
        _refuse(run, name, old[name], new[name])
    for name in raised:
        _reopen(run, name)
    if raised:
        run.rewrite_recipe()
    return [_note(name, old[name], new[name]) for name in raised]


def further_steps(before: Recipe, after: Recipe) -> list[str]:
    """The stages that have more steps in the second recipe than in the first."""
    old, new = stages_of(before), stages_of(after)
    return [name for name in new if name in old and new[name].training.steps > old[name].training.steps]


def _refuse(run: Run, name: str, old: Recipe, new: Recipe) -> None:
    key = "training.steps" if name == MAIN_STAGE else f"stages.{name}.training.steps"
    steps, final = old.training.steps, run.final(name)
    if isinstance(old.source, MixtureSource) and old.source.online != old.source.online_end:
        raise RunError(
            f"{run.folder}: {key} cannot be raised: source.online changes over all steps, and the finished ones assumed a total of "
            f"{steps}: start a new run with another --output"
        )
    if not final.exists():
        return
    names = list(stages_of(run.recipe))
    if later := [one for one in names[names.index(name) + 1 :] if run.stage_folder(one).exists()]:
        raise RunError(
            f"{run.folder}: {key} cannot be raised: stage {name} is finished, and {later[0]} started from it: set "
            f"stages.{name}.training.steps={steps}"
        )
    state = final_state(run, name)
    if state.get("ended"):
        raise RunError(
            f"{run.folder}: {key} cannot be raised: the stage ended early ({state['ended']}): start a new run"
        )
    if not _last(run, name, state).exists() and (
        state.get("kept") not in (None, state["step"]) or "updater" not in state
    ):
        raise RunError(
            f"{run.folder}: {key} cannot be raised: stage {name} is finished, and no checkpoint of its last step was kept: "
            "start a new run, with training.checkpoint_every set"
        )


def _last(run: Run, name: str, state: dict[str, Any]) -> Path:
    """The checkpoint of a finished stage's last step."""
    return run.stage_folder(name) / "checkpoints" / step_name(state["step"])


def _reopen(run: Run, name: str) -> None:
    """Turn a finished stage's result into the checkpoint of its last step, unless that checkpoint exists."""
    final = run.final(name)
    if not final.exists():
        return
    last = _last(run, name, final_state(run, name))
    if not last.exists():
        last.parent.mkdir(exist_ok=True)
        final.rename(last)
        return
    doomed = scratch_path(final)  # so that a half-deleted folder is not taken for a result
    final.rename(doomed)
    shutil.rmtree(doomed)


def _note(name: str, old: Recipe, new: Recipe) -> str:
    """The difference between the further steps and those of a run that was planned this long."""
    before, after = old.training.steps, new.training.steps
    changes = []
    options = new.optimizer
    shape = options.schedule or default_schedule(new)
    if shape != "constant":
        options = options.model_copy(update={"schedule": shape})
        then, now = (schedule(options, min(before, one), one) for one in (before, after))
        changes.append(
            f"optimizer.schedule={shape} now spans {after} steps (at step {before} the learning rate was "
            f"{then:.2g} of its peak, and is {now:.2g} of it with the new length)"
        )
    held = getattr(new.objective, "hold_entropy", None)
    if held is not None and (held != "auto" or options.name is None or options.name in HOLD_ENTROPY):
        changes.append(f"entropy, where it is held (objective.hold_entropy), is so by a line over {after} steps")
    if new.rollouts.ahead:
        changes.append("rollouts.ahead=1 starts afresh where the stage had ended")
    if new.evaluation.suite == OWN_TASK and own_plan(old) != own_plan(new):
        changes.append(f"evaluations now span {after} steps")
    same = "the steps are those of a run planned for this length"
    return f"stage {name} continues to step {after} instead of {before}: {'; '.join(changes) or same}"
