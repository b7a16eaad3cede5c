"""A curriculum by success rate: start states that are always or never solved rest, and come back.

A policy gradient learns nothing from a prompt whose samples all earn the same, so rollouts of such prompts are wasted;
but what is never solved now may be within reach later, and what is always solved may be forgotten.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from lmrl.recipe.blend import Curriculum
from lmrl.seeding import stream
from lmrl.trajectories.trajectory import same_reward


@dataclass
class Record:
    """A start state's episodes since it was last judged, and its rest."""

    tried: int = 0
    solved: int = 0
    until: int = 0
    """The last step of its rest."""
    rest: int = 0
    """Length of its last rest, in steps; 0 once it was solved sometimes."""


@dataclass
class Schedule:
    """Which start states of a part are played next. Depends only on its seed and the recorded episodes."""

    starts: list[int]
    options: Curriculum
    name: tuple[int | str, ...]
    """Name of the random stream."""
    position: int = 0
    """Position in the endless sequence of shuffled passes."""
    records: dict[int, Record] = field(default_factory=dict)

    def next(self, step: int, count: int) -> list[int]:
        """`count` start states for a step: the next in the sequence that do not rest. If all rest, those whose rest
        ends first."""
        awake = [start for start in self.starts if not self.rests(start, step)]
        if not awake:
            ending = sorted(self.starts, key=lambda start: (self.records[start].until, start))
            return [ending[place % len(ending)] for place in range(count)]
        chosen: list[int] = []
        while len(chosen) < count:
            order = stream(*self.name, "pass", self.position // len(self.starts)).permutation(self.starts).tolist()
            for start in order[self.position % len(self.starts) :]:
                self.position += 1
                if not self.rests(start, step):
                    chosen.append(start)
                if len(chosen) == count:
                    break
        return chosen

    def rests(self, start: int, step: int) -> bool:
        return start in self.records and step <= self.records[start].until

    def resting(self, step: int) -> int:
        """The number of start states that rest in a step."""
        return sum(self.rests(start, step) for start in self.starts)

    def record(self, step: int, rewards: Iterable[tuple[int, float]]) -> None:
        """Record a step's episodes. rewards: start state and reward of each."""
        options, touched = self.options, set()
        for start, reward in rewards:
            record = self.records.setdefault(start, Record())
            record.tried += 1
            record.solved += reward >= options.solved or same_reward(reward, options.solved)
            touched.add(start)
        for start in touched:
            record = self.records[start]
            if record.tried < options.episodes:
                continue
            share = record.solved / record.tried
            record.tried = record.solved = 0
            if options.low < share < options.high:
                record.rest = 0
                continue
            record.rest = min(2 * record.rest or options.rest, options.longest)
            record.until = step + record.rest

    def state(self) -> dict[str, Any]:
        return {"position": self.position, "records": {str(start): asdict(one) for start, one in self.records.items()}}

    def load_state(self, state: dict[str, Any]) -> None:
        self.position = state["position"]
        self.records = {int(start): Record(**one) for start, one in state["records"].items()}
