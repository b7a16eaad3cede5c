"""The memory listener: checks that the largest update fits, and reports when memory runs out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lmrl.policy.policy import Policy
from lmrl.sources.base import SourceBatch
from lmrl.training.listeners.listener import Listener
from lmrl.training.monitoring.worst_case import worst_case

if TYPE_CHECKING:
    from lmrl.training.stage import Stage


class Memory(Listener):
    """Tries the largest update before the first step; reports and records when microbatches become smaller."""

    name = "memory"

    def __init__(self, policy: Policy):
        self.policy = policy
        self.told = policy.microbatch_tokens
        """Microbatch size (tokens) last reported."""

    def load_state(self, state: dict[str, Any]) -> None:
        self.told = self.policy.microbatch_tokens

    def begin(self, stage: Stage, resumed: bool) -> None:
        """Rehearse the passes of the largest possible update."""
        wanted = stage.recipe.training.try_worst_case
        if not (self.policy.device.type != "cpu" if wanted is None else wanted):
            return
        if stage.recipe.source.plays:  # the engine's memory counts too
            with stage.strategy.gathered_weights():
                stage.engine.refresh()
        stage.engine.release_memory()
        stage.objective.begin(stage.recipe.training.steps)  # after all warm-up
        batch = worst_case(stage.recipe, self.policy, stage.task, stage.objective.compares)
        stage.updater.rehearse(self.policy, stage.objective, batch)
        self._report(stage, stage.progress.step)
        longest = max(len(sequence.tokens) for sequence in batch.sequences)
        stage.display.say(
            f"the longest sequences, {longest} tokens, fit into memory in microbatches of {self.policy.microbatch_tokens}"
        )

    def measure(self, stage: Stage, step: int, source_batch: SourceBatch, metrics: dict[str, Any]) -> dict[str, Any]:
        self._report(stage, step)
        return {}

    def _report(self, stage: Stage, step: int) -> None:
        now, before = self.policy.microbatch_tokens, self.told
        if now == before:
            return
        self.told = now
        stage.record(step, "memory", {"microbatch_tokens": now, "before": before})
        stage.display.say(
            f"step {step}: memory ran out; microbatches now have {now} tokens instead of {before}, which does not change "
            "gradients but takes longer"
        )
