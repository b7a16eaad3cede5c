"""Metrics and sample lines of a step's episodes, over all ranks."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch

from lmrl import distributed
from lmrl.accelerators import has_memory
from lmrl.evaluation.scoring import RESERVED
from lmrl.process_memory import peak_resident_mb
from lmrl.trajectories.rows import to_row
from lmrl.trajectories.trajectory import Trajectory

SAMPLES_KEPT, FAILED_KEPT = 8, 64
"""Samples per step that are written to samples.jsonl with their text; and of unjudged ones, with the cause."""
OWN = (
    *("stage", "step", "kind", "time", "reward_std", "cut", "repetition"),
    *("failed", "skipped", "dropped", "staleness", "updates"),
)
"""Names that lmrl itself gives to what it records of a step, in addition to RESERVED and the objective's statistics."""
EPISODE = ("group", "episode", "seed", "start", "turns", "final_observation", "terminated")
"""Fields of lmrl's own format (see lmrl/trajectories/rows.py) that a sample of an environment's episode keeps."""


def measure(trajectories: Sequence[Trajectory], taken: Collection[str] = ()) -> dict[str, float]:
    """Means of reward, components, metrics and length over the processes' episodes, and the spread of the reward.

    taken: see `numbers_of`.
    """
    rows = distributed.all_gather([numbers_of(trajectory, taken) for trajectory in trajectories])
    columns: dict[str, list[float]] = {}
    for row in rows:
        for name, value in row.items():
            columns.setdefault(name, []).append(value)
    found: dict[str, float] = {
        name: sum(columns[name]) / len(columns[name]) for name in ("length", "cut") if name in columns
    }
    if "reward" in columns:
        spread = torch.tensor(columns["reward"], dtype=torch.float64)
        found |= {"reward": float(spread.mean()), "reward_std": float(spread.std(correction=0))}
    return found | {name: sum(column) / len(column) for name, column in columns.items() if name not in found}


def numbers_of(trajectory: Trajectory, taken: Collection[str] = ()) -> dict[str, float]:
    """The numbers of one episode. A metric of its environment with a name in OWN or `taken` becomes `component/NAME`."""
    found = {"length": trajectory.num_actions, "cut": float(bool(trajectory.cut_turns))}
    if trajectory.reward is not None:
        found["reward"] = trajectory.reward if trajectory.steady is None else trajectory.steady
    for name, value in {**trajectory.components, **trajectory.metrics}.items():
        if value is not None:
            is_taken = name in OWN or name in RESERVED or name in taken
            own = f"component/{name}" if is_taken else name
            found[f"reward/{name}" if name in trajectory.components else own] = value
    return found


def repetition_of_all(trajectories: Sequence[Trajectory]) -> float:
    """Mean share of repeated trigrams in the processes' completions."""
    return distributed.mean([repetition(one.completion) for one in trajectories])


def repetition(text: str) -> float:
    """Share of the trigrams of words that occurred before in the text, in [0, 1]."""
    words = text.split()
    trigrams = list(zip(words, words[1:], words[2:], strict=False))
    return (len(trigrams) - len(set(trigrams))) / len(trigrams) if trigrams else 0.0


def fresh(metrics: dict[str, Any], name: str) -> float | None:
    """A measure of a step's fresh episodes, if it played any; else of those that it learned from."""
    return metrics.get(f"online/{name}", metrics.get(name))


def drift(metrics: dict[str, Any]) -> dict[str, float]:
    """The metrics of a step's fresh episodes that can show reward hacking."""
    names = ("reward", "reward_std", "length", "repetition", "kl", "entropy")
    own = {name: fresh(metrics, name) for name in names}
    own |= {name.removeprefix("online/"): value for name, value in metrics.items() if "reward/" in name}
    return {name: value for name, value in own.items() if value is not None}


def mean_of(updates: list[dict[str, float]]) -> dict[str, float]:
    """Mean of each statistic over the updates that have it."""
    columns: dict[str, list[float]] = {}
    for update in updates:
        for name, value in update.items():
            columns.setdefault(name, []).append(value)
    return {name: sum(column) / len(column) for name, column in columns.items()}


def samples_to_keep(trajectories: Sequence[Trajectory]) -> list[Trajectory]:
    """All ranks' episodes that could not be scored, then some others, up to a limit each."""
    failed = distributed.all_gather([one for one in trajectories if one.failure][:FAILED_KEPT])[:FAILED_KEPT]
    fine = distributed.all_gather([one for one in trajectories if not one.failure][:SAMPLES_KEPT])
    return failed + fine[: max(SAMPLES_KEPT - len(failed), 0)]


def sample_line(
    stage: str, step: int, kind: str, trajectory: Trajectory, environment: dict[str, Any] | None = None
) -> dict[str, Any]:
    """A line of samples.jsonl. environment: what played it (see `Task.environment`); the line then holds all that is
    needed to play the episode again."""
    line = {
        "stage": stage,
        "step": step,
        "kind": kind,
        "prompt": trajectory.messages or trajectory.prompt,
        "completion": trajectory.completion,
        "reward": trajectory.reward,
        "components": trajectory.components,
        "metrics": trajectory.metrics,
    }
    cut = {"completion_cut": True} if trajectory.cut_turns else {}
    columns = {"columns": trajectory.columns} if trajectory.columns else {}
    line = line | columns | cut | ({"failure": trajectory.failure} if trajectory.failure else {})
    if environment is None or trajectory.seed is None:
        return line
    row = to_row(trajectory)
    episode = {name: row[name] for name in EPISODE}
    if trajectory.game is not None:
        episode["game"] = trajectory.game
    return line | {"id": f"{stage}/{kind}/{step}/{trajectory.episode}", **episode, "environment": environment}


def peak_memory_mb() -> int:
    """Largest resident size of this process so far, or of the accelerator's memory if there is one."""
    if has_memory():
        return torch.accelerator.max_memory_allocated() // 2**20
    return peak_resident_mb()
