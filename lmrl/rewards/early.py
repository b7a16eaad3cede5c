"""Scoring while episodes are still being played: rewards outside this process are called as groups complete."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from lmrl.coroutines import in_thread
from lmrl.rewards.rewards import RewardFunction, Scores, arguments_of, score
from lmrl.trajectories.trajectory import Trajectory

PARTS = 8
"""Maximum number of parts in which a batch is scored."""


class EarlyScores:
    """Calls the rewards with `is_remote` from threads, so that they are computed during sampling.

    A part is a number of whole groups, in the order in which they complete, with at least an eighth of all episodes. So
    if that order does not depend on timing, neither do the parts.
    """

    def __init__(self, rewards: Sequence[RewardFunction], episodes: int):
        self.rewards = [reward for reward in rewards if reward.is_remote]
        self.size = -(-episodes // PARTS)
        self.complete: list[Trajectory] = []
        self.parts: list[list[Trajectory]] = []
        self.calls: list[asyncio.Task[list[Scores]]] = []

    def add(self, group: list[Trajectory]) -> None:
        """Add a complete group, without episodes that have failed."""
        if not self.rewards:
            return
        self.complete += [one for one in group if not one.failure]
        if len(self.complete) >= self.size:
            self._ask()

    def _ask(self) -> None:
        part, self.complete = self.complete, []
        arguments = arguments_of(part)
        before = self.calls[-1] if self.calls else None

        async def ask() -> list[Scores]:
            if before is not None:  # a reward gets one part at a time
                await asyncio.wait([before])
            return await in_thread(lambda: [score(reward, arguments) for reward in self.rewards])

        self.parts.append(part)
        self.calls.append(asyncio.ensure_future(ask()))

    async def finish(self) -> None:
        """Score what is left, and wait for all scores."""
        if self.complete:
            self._ask()
        await asyncio.gather(*self.calls)

    def scores(self, reward: RewardFunction, trajectories: Sequence[Trajectory]) -> Scores | None:
        """A reward's scores of these episodes, in their order; None if it was not called early."""
        place = next((place for place, one in enumerate(self.rewards) if one is reward), None)
        if place is None:
            return None
        found: dict[int, tuple[float | None, str | None, dict[str, float]]] = {}
        for part, call in zip(self.parts, self.calls, strict=True):
            scores = call.result()[place]
            rows = zip(scores.values, scores.causes, scores.extras, strict=True)
            found |= {id(trajectory): row for trajectory, row in zip(part, rows, strict=True)}
        result = Scores()
        for trajectory in trajectories:
            result.add(*found[id(trajectory)])
        return result
