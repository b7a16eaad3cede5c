"""The reward-hacking monitor: warnings during a stage, and a table of metrics at its end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lmrl.sources.base import SourceBatch
from lmrl.training.listeners.listener import Listener
from lmrl.training.listeners.recovery import warn
from lmrl.training.monitoring.measures import drift
from lmrl.training.monitoring.reward_hacking import RewardHackingDetector

if TYPE_CHECKING:
    from lmrl.training.stage import Stage


class RewardHackingMonitor(Listener):
    """Warns if the trained reward rises while a watched one falls (see lmrl/training/monitoring/reward_hacking.py)."""

    name = "hacking"

    def __init__(self, watched: Sequence[str]):
        """watched: labels of the rewards that are not trained on."""
        self.detector = RewardHackingDetector(watched)

    def begin(self, stage: Stage, resumed: bool) -> None:
        """Read the earlier steps from the run folder."""
        for line in stage.run.recorded(stage.name, "train"):
            self._add(line["step"], line)
        warnings = stage.run.recorded(stage.name, "warning")
        own = [line for line in warnings if line.get("name", self.name) == self.name]
        self.detector.warned |= {line["text"].partition(" ")[0] for line in own}

    def recorded(self, stage: Stage, step: int, source_batch: SourceBatch, metrics: dict[str, Any]) -> None:
        for warning in self._add(step, metrics):
            warn(stage, step, self.name, warning)

    def end(self, stage: Stage) -> None:
        if len(self.detector.steps) > 1:
            stage.display.number_table(f"Stage {stage.name}, fresh episodes by step", *self.detector.table())

    def _add(self, step: int, metrics: dict[str, Any]) -> list[str]:
        """Add a step's metrics if it sampled fresh episodes; returns new warnings."""
        return self.detector.add(step, drift(metrics)) if "repetition" in metrics else []
