"""Comparing policies by the same episodes: prompts and start states, and the random numbers of sampling, are those of
all.

What differs between two policies is paired before anything is computed: the difference of each sample with that of the
same number, clustered by prompt. What makes a prompt hard for both then cancels. With a correlation r between the two
scores of a prompt, a comparison needs 1 - r of the prompts that it needs unpaired (benchmarks/compare.py).
"""

from __future__ import annotations

import json
import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from lmrl.errors import RecipeError, RunError, ScoreError, did_you_mean
from lmrl.evaluation.best_of import several_samples
from lmrl.evaluation.claims import Claim
from lmrl.evaluation.controlled import controlled
from lmrl.evaluation.ratings import Rating, ratings
from lmrl.evaluation.scoring import PROMPT, Scores, Scoring, clusters_of, value_of
from lmrl.evaluation.statistics import (
    Clustered,
    Limits,
    are_binary,
    between_clusters,
    is_tie,
    is_within,
    p_value,
    summarize,
    within_clusters,
)
from lmrl.evaluation.t_distribution import NORMAL
from lmrl.trajectories.trajectory import Trajectory

if TYPE_CHECKING:
    from lmrl.evaluation.judging import Judged

SETTLED, POWER = NORMAL, 0.8416212335729143
"""Normal quantiles: of a two-sided p-value of 0.05, and of finding a difference with probability 0.8."""
AT_EQUAL = " at equal "
"""Between a metric and the one that is held equal."""


@dataclass
class Played:
    """A policy's judged episodes of a suite."""

    label: str
    trajectories: list[Trajectory]
    key: str = ""
    """A letter, for people."""


@dataclass(kw_only=True)
class Difference:
    """The difference between two policies' scores on one metric. first, second: their keys; the difference is first -
    second."""

    first: str
    second: str
    metric: str
    mean: float
    ci95: list[float]
    p: float
    """Two-sided."""
    adjusted: float
    """The same by Holm's step-down method over all differences of the comparison."""
    wins: int
    ties: int
    losses: int
    """Prompts (or start states) on which the first scores higher, equal and lower."""
    pairs: int
    prompts: int
    correlation: float | None
    """Of the two scores of a prompt."""
    needed: int | None
    """Prompts with which a difference as large as this one would be found 4 times in 5; None: there is none to find."""
    holds_for: str
    unit: str = PROMPT
    is_fixed: bool = False
    """True if the prompts are all there are: more samples of each settle it, and not more prompts."""

    @property
    def more(self) -> int | None:
        """Further prompts that would settle it; 0 if it is settled, None if there is no difference."""
        if self.p < 0.05:
            return 0
        return None if self.needed is None else max(self.needed - self.prompts, 1)


@dataclass
class Change:
    """A sample that two policies did differently: its prompt, and score and completion of each, by key."""

    prompt: str
    scores: dict[str, float]
    completions: dict[str, str]


@dataclass
class Comparison:
    suite: str
    names: dict[str, str]
    """Policies by key."""
    rows: dict[str, Scores]
    """Every policy's own scores, by key."""
    differences: list[Difference]
    changes: list[Change]
    """The samples whose main metric differs most between the first policy and another."""
    played: str = ""
    ratings: list[Rating] = field(default_factory=list)
    """Of three policies or more, Bradley-Terry ratings on the main metric."""
    judged: list[Judged] = field(default_factory=list)
    """By a judge, every policy against the first."""

    def require(self, claims: Sequence[Claim]) -> None:
        """Raise ScoreError if an interval does not exclude what a claim excludes."""
        failed = []
        for claim in claims:
            found = self.difference(claim)
            low, high = found.ci95 if found.pairs > 1 else (-math.inf, math.inf)  # one pair says nothing of its spread
            if not (low > claim.margin if claim.sign == ">" else high < claim.margin):
                end, value = ("from", low) if claim.sign == ">" else ("to", high)
                failed.append(
                    f"{claim.text}: on {found.metric}, {found.first} - {found.second} is {found.mean:+.4g}, and its 95 % "
                    f"interval goes {end} {value:+.4g}"
                )
        if failed:
            raise ScoreError("not shown: " + "; ".join(failed))

    def difference(self, claim: Claim) -> Difference:
        wanted = claim.metric or self.differences[0].metric
        for one in self.differences:
            if (one.first, one.second, one.metric) == (claim.first, claim.second, wanted):
                return one
        raise AssertionError(claim)

    def to_json(self) -> str:
        differences = [vars(one) | {"more": one.more} for one in self.differences]
        changes = list(map(vars, self.changes))
        data: dict[str, Any] = {"suite": self.suite, "policies": self.names, "scores": self.rows}
        data |= {"ratings": list(map(vars, self.ratings)), "judged": list(map(vars, self.judged))}
        return json.dumps(data | {"differences": differences, "changes": changes}, indent=2, ensure_ascii=False) + "\n"


# ------------------------------------------------------------------------------------------------------------- comparing
def compare_played(
    suite: str,
    policies: Sequence[Played],
    scoring: Scoring,
    metrics: Sequence[str] = (),
    claims: Sequence[Claim] = (),
    shown: int = 5,
    played: str = "",
    control: str | None = None,
) -> Comparison:
    """Compare every policy with the first, and those that claims are about.

    metrics: what to compare (none: the suite's own that every policy has). shown: changed samples to keep. control: a metric
    at equal values of which the others are compared as well, such as `length`.
    Raises RunError for policies that did not play the same, RecipeError for an unknown metric.
    """
    for number, one in enumerate(policies):
        one.key = key_of(number)
    check_same_prompts(policies)
    rows = {one.key: scoring.report(one.trajectories) for one in policies}
    shared = [name for name in rows["A"] if all(name in row for row in rows.values()) and name != "normalized"]
    wanted = list(metrics) or [name for name in scoring.metrics if name in shared]
    for name in asked_metrics(wanted, claims, control):
        if name not in shared:
            raise RecipeError(
                f"metrics: there is no metric '{name}' that all policies have{did_you_mean(name, shared)}"
            )
    if control is not None:
        wanted += [f"{name}{AT_EQUAL}{control}" for name in wanted if name != control]
    wanted = list(dict.fromkeys([*wanted, *(claim.metric for claim in claims if claim.metric)]))
    by_key = {one.key: one for one in policies}
    pairs = [(one.key, "A") for one in policies[1:]]
    pairs += [(claim.first, claim.second) for claim in claims]
    found = [
        difference(by_key[first], by_key[second], metric, scoring)
        for first, second in dict.fromkeys(pairs)
        for metric in wanted
    ]
    for each, adjusted in zip(found, holm([each.p for each in found]), strict=True):
        each.adjusted = adjusted
    names = {one.key: one.label for one in policies}
    changes = changed_samples(policies, wanted[0], scoring, shown)
    rated = rate(policies, wanted[0], scoring) if len(policies) > 2 else []
    return Comparison(suite, names, rows, found, changes, played, rated)


def asked_metrics(metrics: Sequence[str], claims: Sequence[Claim], control: str | None) -> list[str]:
    """All metrics that a comparison names."""
    named = [part for claim in claims if claim.metric for part in split_control(claim.metric) if part]
    return [*metrics, *named, *([control] if control else [])]


def rate(policies: Sequence[Played], metric: str, scoring: Scoring) -> list[Rating]:
    """Bradley-Terry ratings by a metric, on the prompts that all policies have; none without such prompts."""
    means = [means_by_cluster(one, metric, scoring) for one in policies]
    common = [cluster for cluster in means[0] if all(cluster in other for other in means[1:])]
    if not common:
        return []
    return ratings([one.key for one in policies], np.array([[mean[cluster] for cluster in common] for mean in means]))


def key_of(number: int) -> str:
    """The letter of a policy. Raises RecipeError beyond Z."""
    if number >= 26:
        raise RecipeError("policies: at most 26 are compared at a time")
    return chr(ord("A") + number)


def check_same_prompts(policies: Sequence[Played]) -> None:
    """Raise RunError for policies whose episodes of one number began with different prompts, or that share none."""
    prompts: dict[int, tuple[str, str]] = {}
    for one in policies:
        for trajectory in one.trajectories:
            label, prompt = prompts.setdefault(trajectory.group, (one.label, trajectory.prompt))
            if prompt != trajectory.prompt:
                raise RunError(
                    f"{label} and {one.label} have not played the same prompts: number {trajectory.group} is {prompt!r:.60} "
                    f"for one and {trajectory.prompt!r:.60} for the other (prompts longer than task.prompts.max_tokens are left "
                    "out, by each policy's own tokenizer): play one suite with both"
                )
    sets = [{trajectory.group for trajectory in one.trajectories} for one in policies]
    if not set.intersection(*sets):
        raise RunError("the policies have no prompt in common: play one suite with all")


def difference(first: Played, second: Played, metric: str, scoring: Scoring) -> Difference:
    """first - second on a metric, over the samples that both have; `adjusted` is still the p-value itself."""
    metric, control = split_control(metric)
    held = [] if control is None else [keyed_values(each, control, scoring, metric) for each in (first, second)]
    one, other = (keyed_values(each, metric, scoring, control) for each in (first, second))
    keys = [key for key in one if all(key in side for side in (other, *held))]
    if not keys:
        raise RunError(f"{first.label} and {second.label} have no episode with a value of {metric} in common")
    groups = [group for group, _ in keys]
    gaps = [gap(one[key], other[key]) for key in keys]
    limits = gap_limits(
        scoring.limits_of(metric, [*first.trajectories, *second.trajectories]), [*one.values(), *other.values()]
    )
    clusters = clusters_of(groups, first.trajectories, scoring.unit)
    summary = summarize(gaps, clusters, limits, scoring.fixed, scoring.unit, paired=True)
    by_cluster = [cluster_means(clusters, [side[key] for key in keys]) for side in (one, other)]
    signs = [np.sign(gap(a, b)) for a, b in zip(*by_cluster, strict=True)]
    p = p_value(gaps, clusters, limits, scoring.fixed)
    if control is not None:
        others = [gap(held[0][key], held[1][key]) for key in keys]
        equal = controlled(cluster_means(clusters, gaps), cluster_means(clusters, others), control)
        summary, p = summary | {"mean": equal.mean, "ci95": equal.ci95, "holds_for": f"new {scoring.unit}s"}, equal.p
    return Difference(
        first=first.key,
        second=second.key,
        metric=metric if control is None else f"{metric}{AT_EQUAL}{control}",
        mean=summary["mean"],
        ci95=summary["ci95"],
        p=p,
        adjusted=p,
        wins=signs.count(1),
        ties=signs.count(0),
        losses=signs.count(-1),
        pairs=len(keys),
        prompts=summary["clusters"],
        correlation=correlation(*by_cluster),
        needed=prompts_needed(gaps, clusters, scoring.fixed) if control is None else None,
        holds_for=summary["holds_for"],
        unit=scoring.unit,
        is_fixed=scoring.fixed,
    )


def split_control(metric: str) -> tuple[str, str | None]:
    """`reward at equal length` as `reward` and `length`; any other metric with None."""
    name, found, control = metric.partition(AT_EQUAL)
    return name, control if found else None


def keyed_values(
    played: Played, metric: str, scoring: Scoring, beside: str | None = None
) -> dict[tuple[int, int], float]:
    """A metric's values by group and episode (of pass@k and its like, by group and 0).

    beside: the metric that they are held against; if that is one of several samples, they are means by group and 0.
    """
    if several_samples(metric) is not None:
        values, groups = scoring.values(metric, played.trajectories)
        return {(group, 0): value for group, value in zip(groups, values, strict=True)}
    named = {(one.group, one.episode): value_of(one, metric) for one in played.trajectories}
    found = {key: value for key, value in named.items() if value is not None}
    if beside is None or several_samples(beside) is None:
        return found
    groups = [group for group, _ in found]
    means = cluster_means(groups, list(found.values()))
    return {(group, 0): mean for group, mean in zip(dict.fromkeys(groups), means, strict=True)}


def means_by_cluster(played: Played, metric: str, scoring: Scoring) -> dict[Hashable, float]:
    """The mean of a metric over the samples of each prompt."""
    values = keyed_values(played, metric, scoring)
    clusters = clusters_of([group for group, _ in values], played.trajectories, scoring.unit)
    return dict(zip(dict.fromkeys(clusters), cluster_means(clusters, list(values.values())), strict=True))


def gap_limits(limits: Limits | None, values: Sequence[float]) -> Limits:
    """The limits of a difference of two values. 0 and 1 are those of values that are all one of them."""
    if limits is None:
        limits = (0.0, 1.0) if are_binary(values) else (-math.inf, math.inf)
    span = limits[1] - limits[0]
    return -span, span


def cluster_means(clusters: Sequence[Hashable], values: Sequence[float]) -> list[float]:
    """The mean of each cluster, in order of appearance."""
    found: dict[Hashable, list[float]] = {}
    for cluster, value in zip(clusters, values, strict=True):
        found.setdefault(cluster, []).append(value)
    return [math.fsum(each) / len(each) for each in found.values()]


def gap(one: float, other: float) -> float:
    """one - other; 0 for a tie."""
    return 0.0 if is_tie(one, other) else one - other


def correlation(one: Sequence[float], other: Sequence[float]) -> float | None:
    """Pearson's; None if a side does not vary."""
    if any(is_tie(min(side), max(side)) for side in (one, other)):
        return None
    a, b = (math.fsum(side) / len(side) for side in (one, other))
    spread = math.fsum((x - a) ** 2 for x in one) * math.fsum((y - b) ** 2 for y in other)
    return math.fsum((x - a) * (y - b) for x, y in zip(one, other, strict=True)) / math.sqrt(spread)


def prompts_needed(gaps: Sequence[float], clusters: Sequence[Hashable], fixed: bool = False) -> int | None:
    """Prompts with which a mean as large as that of `gaps` has a p-value below 0.05 in 4 of 5 comparisons; None where
    it is 0. Of fixed prompts: as many times the samples of each as this is the number of prompts."""
    data = Clustered.of(gaps, clusters)
    variance, _ = within_clusters(data) if is_within(data, fixed) else between_clusters(data)
    if data.mean == 0:
        return None
    return math.ceil(data.clusters * variance * ((SETTLED + POWER) / data.mean) ** 2)


def holm(ps: Sequence[float]) -> list[float]:
    """P-values adjusted for their number by Holm's step-down method (Scandinavian Journal of Statistics 6, 1979)."""
    order, adjusted, highest = sorted(range(len(ps)), key=ps.__getitem__), [0.0] * len(ps), 0.0
    for place, index in enumerate(order):
        highest = max(highest, min(1.0, (len(ps) - place) * ps[index]))
        adjusted[index] = highest
    return adjusted


def changed_samples(policies: Sequence[Played], metric: str, scoring: Scoring, shown: int) -> list[Change]:
    """The samples whose metric differs most between the first policy and any other, one of each prompt; of a metric of
    several samples, by the reward."""
    if several_samples(metric) is not None:
        metric = "reward" if policies[0].trajectories[0].components else "return"
    values = [keyed_values(one, metric, scoring) for one in policies]
    episodes = [{(each.group, each.episode): each for each in one.trajectories} for one in policies]
    common = [key for key in values[0] if all(key in other for other in values[1:])]
    gaps = {key: max((abs(gap(other[key], values[0][key])) for other in values[1:]), default=0.0) for key in common}
    best: dict[int, tuple[int, int]] = {}
    for key in common:
        if gaps[key] > 0 and (key[0] not in best or gaps[key] > gaps[best[key[0]]]):
            best[key[0]] = key
    chosen = sorted(best.values(), key=lambda key: -gaps[key])[:shown]
    keys = [one.key for one in policies]
    return [
        Change(
            episodes[0][key].prompt,
            {name: each[key] for name, each in zip(keys, values, strict=True)},
            {name: each[key].completion for name, each in zip(keys, episodes, strict=True)},
        )
        for key in chosen
    ]
