"""Fresh episodes by the current policy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lmrl import distributed
from lmrl.engines.base import Sampling
from lmrl.recipe import Rollouts
from lmrl.rewards.scale import Scale
from lmrl.rollouts.sampler import Sampler
from lmrl.rollouts.task import starts_for
from lmrl.seeding import stream
from lmrl.sources.async_rollouts import AsyncRollouts
from lmrl.sources.base import Source, SourceBatch, SourceRequest
from lmrl.sources.best import best_among_all
from lmrl.trajectories.trajectory import Trajectory

REWARDS_FILE = "rewards.json"


class FreshRollouts(Source):
    """Episodes by the current policy; `best` below 1 keeps the share with the highest returns."""

    def __init__(
        self,
        sampler: Sampler,
        options: Rollouts,
        seed: int,
        stage: str,
        best: float = 1.0,
        by_prompt: bool = False,
        resample: int = 0,
    ):
        """by_prompt: keep that share of each prompt's episodes. resample: rounds in which prompts whose episodes all
        earned the same are replaced by further ones."""
        self.sampler, self.options, self.name = sampler, options, (seed, stage)
        self.best, self.by_prompt, self.resample = best, by_prompt, resample
        self.sampling = Sampling.of(options)

    @classmethod
    def build(cls, wanted: SourceRequest) -> FreshRollouts | AsyncRollouts:
        options, recipe = wanted.recipe.source, wanted.recipe
        wanted.sampler.task.check_prompts_fit(recipe.rollouts.max_new_tokens)
        if options.has_log:  # part of a mixture, which selects from the played episodes
            fresh = cls(wanted.sampler, recipe.rollouts, wanted.seed, wanted.stage)
        else:
            by_prompt = options.best_among == "prompt"
            fresh = cls(
                wanted.sampler,
                recipe.rollouts,
                wanted.seed,
                wanted.stage,
                options.best,
                by_prompt,
                getattr(options, "resample", 0),
            )
        return AsyncRollouts(fresh, recipe.training.steps) if recipe.rollouts.ahead else fresh

    def next(self, step: int) -> SourceBatch:
        before = self._statistics()
        try:
            return self._play(step)
        except BaseException:  # the step will be sampled again
            self._restore(before)
            raise

    def _play(self, step: int) -> SourceBatch:
        count, task = self.options.prompts, self.sampler.task
        starts = starts_for(task.training, (step - 1) * count, count, *self.name, "prompts")
        played = self.sampler.play(
            starts, self.options.samples, self.sampling, (*self.name, "rollout", step), shared=True
        )
        judged = task.keep_judged(played)
        failed, dropped = len(played) - len(judged), len(judged)
        judged = task.keep_groups(judged)
        dropped -= len(judged)
        for again in range(1, self.resample + 1):
            zero_variance = distributed.all_gather(zero_variance_groups(judged))
            if not zero_variance:
                break
            name = (*self.name, "again", again)
            # A start state of a self-play game has a group for each side.
            starts = starts_for(task.training, (step - 1) * count, -(-len(zero_variance) // task.sides), *name)
            more = self.sampler.play(starts, self.options.samples, self.sampling, (*name, step), shared=True)
            for trajectory in more:
                trajectory.group += again * count * task.sides
            kept = task.keep_judged(more)
            failed, dropped = failed + len(more) - len(kept), dropped + len(kept)
            kept = task.keep_groups(kept)
            dropped -= len(kept)
            spread = [one for one in kept if one.group not in zero_variance_groups(kept)]
            replaced = zero_variance[: len(set(distributed.all_gather([one.group for one in spread])))]
            judged = [one for one in judged if one.group not in replaced] + spread
            played = played + more
        best = best_among_all(judged, self.best, stream(*self.name, "best", step), self.by_prompt)
        return SourceBatch(best, played, failed, dropped)

    def save(self, folder: Path) -> None:
        if states := self._statistics():
            (folder / REWARDS_FILE).write_text(json.dumps(states) + "\n")

    def load(self, folder: Path) -> None:
        if self._running():
            self._restore(json.loads((folder / REWARDS_FILE).read_text()))

    def _statistics(self) -> dict[str, dict[str, Any]]:
        return {label: scale.state() for label, scale in self._running().items()}

    def _restore(self, states: dict[str, dict[str, Any]]) -> None:
        for label, scale in self._running().items():
            scale.load_state(states[label])

    def _running(self) -> dict[str, Scale]:
        """Rewards that are normalised by running statistics."""
        return {one.label: one.scale for one in self.sampler.task.rewards if one.scale.is_running}


def zero_variance_groups(trajectories: list[Trajectory]) -> list[int]:
    """Groups whose episodes all have the same reward, in order of appearance."""
    rewards: dict[int, set[float | None]] = {}
    for trajectory in trajectories:
        rewards.setdefault(trajectory.group, set()).add(trajectory.reward)
    return [group for group, earned in rewards.items() if len(earned) == 1]
