"""Diagnostics of a stage whose policy has values, every few steps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lmrl import distributed
from lmrl.sources.base import SourceBatch
from lmrl.training.listeners.listener import Listener
from lmrl.training.monitoring.diagnostics import Probe, discounts_of, probe_states
from lmrl.trajectories.store import read_episodes, write_episodes
from lmrl.trajectories.trajectory import Trajectory

if TYPE_CHECKING:
    from lmrl.training.stage import Stage

PROBE_FILE, PROBE_EPISODES = "probe.parquet", 32


class Diagnostics(Listener):
    name = "diagnostics"

    def __init__(self) -> None:
        self.probe: Probe | None = None

    def recorded(self, stage: Stage, step: int, source_batch: SourceBatch, metrics: dict[str, Any]) -> None:
        if step % stage.recipe.evaluation.diagnostics_every and step != stage.recipe.training.steps:
            return
        if self.probe is None:
            states = probe_states(len(stage.policy.vocabulary))
            self.probe = Probe(self._episodes(stage, source_batch.played), states, *discounts_of(stage.recipe))
        with stage.strategy.gathered_weights():
            found = self.probe(stage.policy)
        stage.record(step, "diagnostics", found)
        stage.track({f"{stage.name}/diagnostics/{name}": value for name, value in found.items()}, step)

    def _episodes(self, stage: Stage, played: list[Trajectory]) -> list[Trajectory]:
        """Logged episodes, or the first fresh ones, which are saved in the stage's folder."""
        if stage.source.dataset:
            return stage.source.dataset.probe(PROBE_EPISODES)
        kept = stage.run.stage_folder(stage.name) / PROBE_FILE
        if distributed.broadcast(kept.exists()):
            return read_episodes(kept, stage.policy.tokenizer)
        own = [one for one in played if one.reward is not None][:PROBE_EPISODES]
        found = distributed.all_gather(own)[:PROBE_EPISODES]
        stage.run.write_file(kept, lambda path: write_episodes(path, found, stage.policy.tokenizer))
        return found
