"""Base of all listeners."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from lmrl.training.sources import SourceBatch

if TYPE_CHECKING:
    from lmrl.training.stage import Stage


class Listener:
    """Told by a stage where it stands; each overrides what it needs. A stage calls its listeners in their order, in all
    processes of a run alike."""

    name: str
    """Of its state in checkpoints, and of its factor on the learning rate (`Updater.factors`)."""

    def begin(self, stage: Stage, resumed: bool) -> None:
        """Before the first step, once the objective is ready. resumed: the stage goes on from a checkpoint."""

    def measure(self, stage: Stage, step: int, source_batch: SourceBatch, metrics: dict[str, Any]) -> dict[str, Any]:
        """After a step's updates, before it is recorded: returns further metrics."""
        return {}

    def recorded(self, stage: Stage, step: int, source_batch: SourceBatch, metrics: dict[str, Any]) -> None:
        """Once a step's metrics, those of all listeners with them, are recorded."""

    def after_step(self, stage: Stage, step: int) -> None:
        """Once a step is done, and `stage.progress` says so."""

    def wants_checkpoint(self, stage: Stage, step: int) -> bool:
        """Whether to save a checkpoint after this step, whatever the recipe says."""
        return False

    def keeps(self, stage: Stage) -> Iterable[int]:
        """Steps whose checkpoints it may need later, and which are not to be deleted."""
        return ()

    def rolled_back(self, stage: Stage, step: int) -> None:
        """When the stage goes on from the checkpoint of this earlier step."""

    def ends(self, stage: Stage) -> bool:
        """Whether the stage is to end before its next step."""
        return False

    def finish(self, stage: Stage) -> None:
        """After the last step, before `final/` is written with the policy as it is then."""

    def end(self, stage: Stage) -> None:
        """After the last step, with `final/` written."""

    def state(self) -> dict[str, Any]:
        """What it has to know to go on from a checkpoint, as JSON."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """On resume, when weights, updater and source are as the checkpoint left them; {} where that has no state of it."""
