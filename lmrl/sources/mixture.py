"""Fresh and logged episodes in one batch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from lmrl import distributed
from lmrl.recipe import MixtureSource
from lmrl.seeding import stream
from lmrl.sources.async_rollouts import AsyncRollouts
from lmrl.sources.base import Source, SourceBatch, SourceRequest
from lmrl.sources.dataset import Dataset
from lmrl.sources.fresh import FreshRollouts
from lmrl.trajectories.store import read_episodes, write_episodes
from lmrl.trajectories.trajectory import Trajectory

REPLAY_FILE = "replay.parquet"


class Mixture(Source):
    """Fresh episodes go into a replay buffer; a share of each batch comes from it, the rest from the log."""

    def __init__(
        self, fresh: FreshRollouts | AsyncRollouts, dataset: Dataset, options: MixtureSource, steps: int, tokenizer: Any
    ):
        self.fresh, self.options, self.steps = fresh, options, steps
        self.dataset: Dataset = dataset
        self.tokenizer = tokenizer
        self.replay: list[Trajectory] = []

    @classmethod
    def build(cls, wanted: SourceRequest) -> Mixture:
        recipe = wanted.recipe
        dataset = Dataset.build(wanted)
        fresh = FreshRollouts.build(wanted)
        options = cast(MixtureSource, recipe.source)
        return cls(fresh, dataset, options, recipe.training.steps, wanted.task.renderer.tokenizer)

    def online(self, step: int) -> int:
        """Episodes of a step's batch that come from the replay buffer."""
        options = self.options
        if step <= options.warmup_steps:
            return 0
        done = (step - 1 - options.warmup_steps) / max(self.steps - 1 - options.warmup_steps, 1)
        return round((options.online + (options.online_end - options.online) * done) * options.batch_size)

    def next(self, step: int) -> SourceBatch:
        options, source_batch = self.options, self.fresh.next(step)
        # The same buffer on every rank.
        self.replay = (self.replay + distributed.all_gather(source_batch.learn))[-options.replay :]
        if step <= options.warmup_steps:
            return replace(source_batch, learn=[])
        count = self.online(step)
        rng = stream(*self.fresh.name, "replay", step)
        # The buffer is empty as long as no group has been kept.
        rows = rng.integers(len(self.replay), size=count).tolist() if self.replay else []
        first = sum(options.batch_size - self.online(earlier) for earlier in range(options.warmup_steps + 1, step))
        replayed = self.dataset.pieces([self.replay[row] for row in rows], "replayed", step)
        learn = [*distributed.shard(replayed), *self.dataset.take(first, options.batch_size - count)]
        return replace(source_batch, learn=learn)

    def wait(self) -> list[Trajectory]:
        return self.fresh.wait()

    def stop(self, forget: bool = False) -> None:
        self.fresh.stop(forget)

    def save(self, folder: Path) -> None:
        self.fresh.save(folder)
        write_episodes(folder / REPLAY_FILE, self.replay, self.tokenizer)

    def load(self, folder: Path) -> None:
        self.fresh.load(folder)
        self.replay = read_episodes(folder / REPLAY_FILE, self.tokenizer)
