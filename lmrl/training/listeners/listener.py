"""The listener interface."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from lmrl.sources.base import SourceBatch

if TYPE_CHECKING:
    from lmrl.training.stage import Stage


class Listener:
    """Base of all listeners; each overrides the methods it needs. A stage calls its listeners in order, on every
    rank."""

    name: str
    """Key of its state in checkpoints, and of its factor on the learning rate (`Updater.factors`)."""

    def begin(self, stage: Stage, resumed: bool) -> None:
        """Before the first step, once the objective is ready. resumed: True if the stage resumes from a checkpoint."""

    def measure(self, stage: Stage, step: int, source_batch: SourceBatch, metrics: dict[str, Any]) -> dict[str, Any]:
        """After a step's updates, before it is recorded: returns further metrics."""
        return {}

    def recorded(self, stage: Stage, step: int, source_batch: SourceBatch, metrics: dict[str, Any]) -> None:
        """After a step's metrics, including those of all listeners, are recorded."""

    def after_step(self, stage: Stage, step: int) -> None:
        """After a step, once `stage.progress` counts it."""

    def wants_checkpoint(self, stage: Stage, step: int) -> bool:
        """True to save a checkpoint after this step, whatever the recipe says."""
        return False

    def keeps(self, stage: Stage) -> Iterable[int]:
        """Steps whose checkpoints it may need later, so they are not deleted."""
        return ()

    def rolled_back(self, stage: Stage, step: int) -> None:
        """After the stage was rolled back to the checkpoint of this earlier step."""

    def ends(self, stage: Stage) -> bool:
        """True to end the stage before its next step."""
        return False

    def finish(self, stage: Stage) -> None:
        """After the last step, before the policy is saved in `final/`."""

    def end(self, stage: Stage) -> None:
        """After `final/` is written."""

    def state(self) -> dict[str, Any]:
        """State to resume from a checkpoint, as JSON."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """On resume, after weights, updater and source are loaded; {} if the checkpoint has no state of this
        listener."""
