"""Listeners' reactions: warn, roll back to an earlier checkpoint, end the stage with its best policy."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmrl.training.checkpoint import STATE, checkpoint_path

if TYPE_CHECKING:
    from lmrl.training.listeners.evaluation import Evaluation
    from lmrl.training.stage import Stage


def warn(stage: Stage, step: int, name: str, text: str) -> None:
    """Show a warning and record it. name: of the detector."""
    stage.record(step, "warning", {"name": name, "text": text})
    stage.display.say(f"warning at step {step}: {text}")


def go_back(stage: Stage, step: int, to: int, name: str, lr_factor: float, why: str) -> dict[str, Any]:
    """Continue from an earlier step's checkpoint with a lower learning rate; returns the metrics to record.

    name: of the listener, whose factor on the rate this becomes. It is multiplied with the factors of others, so none
    of them can raise the rate above it.
    """
    stage.roll_back(to)
    stage.updater.factors[name] = lr_factor
    stage.display.say(f"{name} at step {step}: {why}; back to step {to}, learning rate x {lr_factor:g}")
    return {"back_to": to, "lr_factor": lr_factor}


def leave_checkpoint(stage: Stage, step: int, to: int, name: str, why: str) -> None:
    """End the stage with the checkpoint of step `to` as its result, if the policy itself cannot be rolled back."""
    stage.progress.ended = f"{name}: {why}, the stage ends with the policy of step {to}"
    stage.display.say(f"{stage.progress.ended} ({stage.strategy.name} cannot go back to it in the middle of a stage)")

    def write(folder: Path) -> None:
        shutil.copytree(checkpoint_path(stage.run, stage.name, to), folder, dirs_exist_ok=True)
        file = folder / STATE / "trainer.json"
        state = json.loads(file.read_text()) | {"ended": stage.progress.ended, "step": step}
        file.write_text(json.dumps(state, indent=2) + "\n")

    stage.run.write_folder(stage.run.final(stage.name), write)


def end_with_best(stage: Stage, step: int, name: str, to: int, why: str, evaluation: Evaluation) -> None:
    """End the stage before its next step. The policy of step `to` is already loaded; its scores become the stage's
    last."""
    stage.progress.ended = f"{name}: {why}, the stage ends with the policy of step {to}"
    stage.display.say(stage.progress.ended)
    evaluation.evaluate(stage, step)
