"""Turning episodes into scores: every metric of a suite with its interval."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import inf, isfinite
from typing import Any

from lmrl.errors import RecipeError, did_you_mean
from lmrl.evaluation.best_of import SeveralSamples, several_samples
from lmrl.evaluation.statistics import UNIT, UNLIMITED, Limits, are_binary, summarize
from lmrl.evaluation.suites import Suite
from lmrl.recipe import PromptTask
from lmrl.trajectories.trajectory import Trajectory, prompt_key

Scores = dict[str, dict[str, Any]]
LIMITS: dict[str, Limits] = {"length": (0.0, inf), "kl": UNLIMITED}
"""Limits of lmrl's own metrics."""
RESERVED = ("reward", "return", "length", "kl", "normalized")
"""Names of lmrl's own metrics; a reward function or environment metric of that name is reported as `component/NAME`."""
PROMPT = "prompt"
"""The unit of prompts, as opposed to start states."""


@dataclass
class Scoring:
    """How the episodes of a suite become scores; plain data, so that a log can be scored again without its policy."""

    metrics: list[str]
    """The suite's metrics; the first is the main one."""
    unit: str = PROMPT
    """The name of what episodes of one group have in common."""
    limits: dict[str, Limits] = field(default_factory=dict)
    """Lowest and highest possible value, by metric."""
    fixed: bool = False
    """True if these are all the groups there are, see `summarize`."""
    scale: tuple[float, float] | None = None
    """The main metric of the environment's players `random` and `optimal`."""

    @classmethod
    def read(cls, data: Mapping[str, Any]) -> Scoring:
        """From the output of `to_plain`, read from JSON."""
        limits = {
            name: (-inf if low is None else low, inf if high is None else high)
            for name, (low, high) in data["limits"].items()
        }
        return cls(**{**data, "limits": limits, "scale": tuple(data["scale"]) if data["scale"] else None})

    def to_plain(self) -> dict[str, Any]:
        """As JSON can hold it: None for a missing limit."""
        limits = {name: [one if isfinite(one) else None for one in pair] for name, pair in self.limits.items()}
        return asdict(self) | {"limits": limits}

    def report(self, trajectories: Sequence[Trajectory], extra: Mapping[str, Sequence[float]] = {}) -> Scores:
        """Every metric of these episodes, the suite's own first. extra: further values of each episode, by metric."""
        scores = summarize_trajectories(trajectories, self.unit, self.limits, self.fixed)
        for name in [*extra, *filter(several_samples, self.metrics)]:
            values, groups = self.values(name, trajectories, extra)
            clusters = clusters_of(groups, trajectories, self.unit)
            scores[name] = summarize(values, clusters, self.limits_of(name, trajectories), self.fixed, self.unit)
        main = self.metrics[0]
        if main not in scores:
            raise RecipeError(f"suite: there is no metric '{main}'{did_you_mean(main, scores)}")
        if "normalized" in self.metrics and self.scale is not None:
            low, high = self.scale
            score = scores[main]
            mean, *ends = (100 * (value - low) / (high - low) for value in (score["mean"], *score["ci95"]))
            scores["normalized"] = score | {"mean": mean, "ci95": ends}
        return {name: scores[name] for name in dict.fromkeys([*self.metrics, *scores]) if name in scores}

    def values(
        self, metric: str, trajectories: Sequence[Trajectory], extra: Mapping[str, Sequence[float]] = {}
    ) -> tuple[list[float], list[int]]:
        """A metric's values and the group of each: one per episode that has it, or one per group for pass@k and the
        like."""
        several = several_samples(metric)
        if several is not None:
            return self._of_groups(several, trajectories)
        if metric in extra:
            return list(extra[metric]), [one.group for one in trajectories]
        named = [(value_of(one, metric), one.group) for one in trajectories]
        found = [(value, group) for value, group in named if value is not None]
        return [value for value, _ in found], [group for _, group in found]

    def _of_groups(self, several: SeveralSamples, trajectories: Sequence[Trajectory]) -> tuple[list[float], list[int]]:
        groups: dict[int, list[Trajectory]] = {}
        for one in trajectories:
            groups.setdefault(one.group, []).append(one)
        found = {}
        for group, samples in groups.items():
            scored = [value_of(one, several.metric) for one in samples]
            value = several([one.reward for one in samples], scored, [one.completion for one in samples])
            if value is not None:
                found[group] = value
        if not found:
            raise RecipeError(
                f"metrics: '{several.name}' needs {several.count} judged samples of a {self.unit}: set samples={several.count}"
            )
        return list(found.values()), list(found)

    def limits_of(self, metric: str, trajectories: Sequence[Trajectory]) -> Limits | None:
        """The lowest and highest value that a metric can have (None: inferred from the values, see `summarize`)."""
        several = several_samples(metric)
        if several is None:
            return (self.limits | LIMITS).get(metric)
        if several.kind == "pass":
            return UNIT
        single = several.metric or ("reward" if trajectories[0].components else "return")
        values, _ = self.values(single, trajectories)
        return (self.limits | LIMITS).get(single) or (UNIT if are_binary(values) else None)


def check_metrics(metrics: Sequence[str], samples: int) -> None:
    """Raise RecipeError for a metric of several samples that a suite cannot have."""
    for place, metric in enumerate(metrics):
        several = several_samples(metric)
        if several is None:
            continue
        if place == 0:
            raise RecipeError(
                f"metrics: '{metric}' combines several samples, but the first metric must be of single ones: put reward or return first"
            )
        if several.count > samples:
            raise RecipeError(
                f"metrics: '{metric}' takes {several.count} samples of a prompt: set samples={several.count}"
            )


def check_known(names: Iterable[str], suite: Suite, option: str) -> None:
    """Raise RecipeError for metrics that no episode of this suite can have; those of an environment's own are not known
    before it is played. option: for messages."""
    if not isinstance(suite.task, PromptTask):
        return
    labels = ["acc", "acc_norm"] if suite.choices else [reward.label for reward in suite.task.rewards]
    components = [f"component/{label}" if label in RESERVED else label for label in labels]
    listed = [name for name in suite.metrics if name != "kl"]  # measured in training alone
    known = list(dict.fromkeys([*listed, "reward", *components, "length"]))
    for name in names:
        if name not in known and not any(name.startswith(f"{label}/") for label in labels):
            raise RecipeError(f"{option}: there is no metric '{name}': this suite has {', '.join(known)}")


def exact(score: dict[str, Any]) -> dict[str, Any]:
    """A score whose mean is known exactly."""
    return {name: value for name, value in score.items() if name != "holds_for"} | {"ci95": [score["mean"]] * 2}


def summarize_trajectories(
    trajectories: Sequence[Trajectory], unit: str, limits: dict[str, Limits] = {}, fixed: bool = False
) -> Scores:
    """Return (or reward), every component and metric, and length in tokens, each with its interval over groups.

    unit: the name of a group. limits: of metrics, by name. fixed: True if these are all the groups, see `summarize`.
    """
    clusters: dict[str, list[Hashable]] = {}
    for trajectory in trajectories:
        for name, _ in named_values(trajectory):
            clusters.setdefault(name, []).append(cluster_of(trajectory, unit))
    limits = limits | LIMITS
    return {
        name: summarize(values, clusters[name], limits.get(name), fixed, unit)
        for name, values in values_of(trajectories).items()
    }


def cluster_of(trajectory: Trajectory, unit: str) -> Hashable:
    """The cluster of an episode's value: its group; rows of a file with the same prompt are one prompt. Episodes
    of several turns may begin alike in different states."""
    return prompt_key(trajectory.prompt) if unit == PROMPT and len(trajectory.turns) <= 1 else trajectory.group


def clusters_of(groups: Sequence[int], trajectories: Sequence[Trajectory], unit: str) -> list[Hashable]:
    """The cluster of each of these groups, see `cluster_of`."""
    found = {one.group: cluster_of(one, unit) for one in trajectories}
    return [found[group] for group in groups]


def values_of(trajectories: Sequence[Trajectory]) -> dict[str, list[float]]:
    """The episodes' values, by metric."""
    columns: dict[str, list[float]] = {}
    for trajectory in trajectories:
        for name, value in named_values(trajectory):
            columns.setdefault(name, []).append(value)
    return columns


def named_values(trajectory: Trajectory) -> Iterator[tuple[str, float]]:
    """One episode's values: `return` (for prompts, `reward`) if it has one, components, metrics, length in tokens."""
    if trajectory.reward is not None:
        yield "reward" if trajectory.components else "return", trajectory.reward
    for name, value in {**trajectory.components, **trajectory.metrics}.items():
        if value is not None:
            yield f"component/{name}" if name in RESERVED else name, value
    yield "length", trajectory.num_actions


def value_of(trajectory: Trajectory, metric: str | None) -> float | None:
    """An episode's value of a metric (None: its reward or return); None if it has none."""
    return trajectory.reward if metric is None else dict(named_values(trajectory)).get(metric)
