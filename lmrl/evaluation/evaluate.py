"""Scoring a policy on a suite."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from math import inf
from statistics import mean
from typing import Any, cast

from lmrl import distributed
from lmrl.engines.base import Engine, Sampling
from lmrl.engines.build import build_engine
from lmrl.environments import limits_of
from lmrl.errors import RecipeError, did_you_mean
from lmrl.evaluation.statistics import UNLIMITED, Limits, summarize
from lmrl.evaluation.suites import Suite
from lmrl.policy.policy import Policy
from lmrl.rollouts.sampler import Sampler
from lmrl.rollouts.task import build_task
from lmrl.seeding import stream
from lmrl.trajectories.batch import to_batch
from lmrl.trajectories.trajectory import Trajectory

Scores = dict[str, dict[str, Any]]
RANDOM_EPISODES = 8
"""Of the random player from each start, for the low end of normalised scores."""
LIMITS: dict[str, Limits] = {"length": (0.0, inf), "kl": UNLIMITED}
"""Of lmrl's own metrics."""
RESERVED = ("reward", "return", "length", "kl", "normalized")
"""Metrics of lmrl's own; a reward function or environment metric of that name is reported as `component/NAME`."""


class Evaluator:
    """A suite made ready for one policy, to be scored any number of times."""

    def __init__(self, policy: Policy, suite: Suite, engine: Engine | None = None):
        """engine: of the policy, where it has one already."""
        self.policy, self.suite, self.name = policy, suite, ""
        self.task = build_task(suite.task, policy.tokenizer)
        self.sampling = Sampling.of(suite.rollouts)
        self.engine = engine or build_engine(suite.rollouts, policy)
        self.sampler = Sampler(self.task, self.engine, policy.decode)
        self.at_once: int | None = None
        """Episodes to play side by side (None: all)."""

    def starts(self) -> list[int | None]:
        heldout = self.task.heldout
        if heldout is None:
            return [None] * (self.suite.episodes or 100)
        starts: list[int | None] = [*heldout]
        if self.suite.shuffled:
            starts = stream("suite", self.suite.seed, "starts").permutation(heldout).tolist()
        return starts[: self.suite.episodes or len(starts)]

    @property
    def unit(self) -> str:
        """What episodes of one group have in common."""
        return "prompt" if self.task.judged_by == "reward" else "start state"

    @property
    def plays_all(self) -> bool:
        """True if the suite plays all start states that there are, or prompts that were trained on: scores then say how
        these go, and nothing about others."""
        task = self.task
        if task.heldout is None or task.heldout != task.training:
            return False
        return task.judged_by == "reward" or len(self.starts()) == len(task.heldout)

    @property
    def played(self) -> str:
        """What the suite plays, for people."""
        task, count, samples = self.task, len(self.starts()), self.suite.samples
        if task.judged_by == "reward":
            whole = not task.training  # of a suite's own file, none of which is for training
            what = f"{'all ' if whole and count == len(task.heldout or ()) else ''}{count} {'' if whole else 'held-out '}prompts"
            if task.heldout == task.training:
                what = f"{count} prompts of the task itself (task.prompts.holdout keeps none aside)"
        elif task.heldout is None:
            what = f"{count} fresh start states"
        else:
            some = "drawn" if self.suite.shuffled else "the first"
            what = f"{'all' if count == len(task.heldout) else some} {count} start states"
        return f"{what}, {samples} fresh episode{'' if samples == 1 else 's'} from each"

    @cached_property
    def limits(self) -> dict[str, Limits]:
        """Lowest and highest possible value of metrics, as far as the environment says."""
        return limits_of(self.task.make())

    def __call__(self, beta: float | None = None, choosing: bool = False) -> tuple[Scores, list[Trajectory]]:
        """Play the suite. Episodes draw the same random numbers every time, so two scores are paired.

        beta: weight of Q instead of the suite's or the policy's own. choosing: play other episodes, for scores that a policy is
        chosen by; its own score is then from episodes that did not choose it. Several processes share the episodes, and have the
        same result.
        """
        name = ("suite", self.suite.seed, *(("choosing",) if choosing else ()))
        before = self.policy.temperature
        sampling = self.sampling if beta is None else replace(self.sampling, beta=beta)
        starts, played = self.starts(), []
        width = len(starts) if self.at_once is None else max(self.at_once // self.suite.samples, 1)
        for first in range(0, len(starts), width):
            part = starts[first : first + width]
            played += self.sampler.play(part, self.suite.samples, sampling, name, shared=True, first=first)
        trajectories = self.task.keep_judged(played)
        extra = {}
        if self.policy.has_reference:
            self.policy.temperature = self.sampling.temperature or 1.0
            extra["kl"] = distributed.all_gather(divergences(self.policy, trajectories))
        self.policy.temperature = before
        trajectories = distributed.all_gather(trajectories)
        return self.report(trajectories, extra), trajectories

    def optimum(self) -> Scores | None:
        """The exact optimum, where the environment has a player for it."""
        played = self._play("optimal", self.starts())
        if not played:
            return None
        scores = self.report(played)
        # From all the starts there are, each played as well as it can be: nothing is left to chance.
        return {name: exact(score) for name, score in scores.items()} if self.plays_all else scores

    def _play(self, player: str, starts: list[int | None]) -> list[Trajectory] | None:
        """Episodes of a scripted player of the environment, None where it has no such player."""
        if player not in getattr(self.task.make(), "players", ()):
            return None
        return Sampler(self.task).play_scripted(player, starts, ("suite", self.suite.seed))

    @cached_property
    def scale(self) -> tuple[float, float] | None:
        """The main metric of the environment's players `random` and `optimal`, where it has both."""
        metric = self.suite.metrics[0]
        random = self._play("random", [start for start in self.starts() for _ in range(RANDOM_EPISODES)])
        best = self._play("optimal", self.starts())
        if not random or not best:
            return None
        low, high = (mean(values_of(played)[metric]) for played in (random, best))
        return (low, high) if high > low else None

    def normalize(self, value: float) -> float:
        """A value of the main metric in points: 0 for the random player, 100 for the optimum; as it is without them."""
        if self.scale is None:
            return value
        low, high = self.scale
        return 100 * (value - low) / (high - low)

    def by_start(self, trajectories: Sequence[Trajectory]) -> list[float]:
        """Of each start state, the mean of the main metric in points."""
        groups: dict[int, list[float]] = {}
        for trajectory in trajectories:
            value = dict(named_values(trajectory))[self.suite.metrics[0]]
            groups.setdefault(trajectory.group, []).append(self.normalize(value))
        return [mean(values) for values in groups.values()]

    def report(self, trajectories: Sequence[Trajectory], extra: dict[str, list[float]] = {}) -> Scores:
        """Every metric of these episodes, the suite's own first."""
        scores = summarize_trajectories(trajectories, self.unit, self.limits, self.plays_all)
        groups = [trajectory.group for trajectory in trajectories]
        scores |= {
            name: summarize(values, groups, LIMITS.get(name), self.plays_all, self.unit)
            for name, values in extra.items()
        }
        main = self.suite.metrics[0]
        if main not in scores:
            raise RecipeError(f"suite: there is no metric '{main}'{did_you_mean(main, scores)}")
        if "normalized" in self.suite.metrics and self.scale is not None:
            score = scores[main]
            points = {"mean": self.normalize(score["mean"]), "ci95": [self.normalize(one) for one in score["ci95"]]}
            scores["normalized"] = score | points
        return {name: scores[name] for name in dict.fromkeys([*self.suite.metrics, *scores]) if name in scores}


def exact(score: dict[str, Any]) -> dict[str, Any]:
    """A score whose mean is known and not estimated."""
    return {name: value for name, value in score.items() if name != "holds_for"} | {"ci95": [score["mean"]] * 2}


def summarize_trajectories(
    trajectories: Sequence[Trajectory], unit: str, limits: dict[str, Limits] = {}, fixed: bool = False
) -> Scores:
    """Return (or reward), every component and metric, and length in tokens, each with its interval over groups.

    unit: the name of a group. limits: of metrics, by name. fixed: the groups are all there are, see `summarize`.
    """
    groups: dict[str, list[int]] = {}
    for trajectory in trajectories:
        for name, _ in named_values(trajectory):
            groups.setdefault(name, []).append(trajectory.group)
    limits = limits | LIMITS
    return {
        name: summarize(values, groups[name], limits.get(name), fixed, unit)
        for name, values in values_of(trajectories).items()
    }


def values_of(trajectories: Sequence[Trajectory]) -> dict[str, list[float]]:
    """What the episodes scored, by metric."""
    columns: dict[str, list[float]] = {}
    for trajectory in trajectories:
        for name, value in named_values(trajectory):
            columns.setdefault(name, []).append(value)
    return columns


def named_values(trajectory: Trajectory) -> Iterator[tuple[str, float]]:
    """What one episode scored: `return` (of prompts, `reward`), components, metrics, length in tokens."""
    yield "reward" if trajectory.components else "return", cast(float, trajectory.reward)
    for name, value in {**trajectory.components, **trajectory.metrics}.items():
        if value is not None:
            yield f"component/{name}" if name in RESERVED else name, value
    yield "length", trajectory.num_actions


def divergences(policy: Policy, trajectories: Sequence[Trajectory]) -> list[float]:
    """Of each episode, log(policy / reference) of what was sampled: its mean estimates the KL in nats an episode."""
    batch = to_batch(list(trajectories))
    own, reference = policy.score(batch)["logprobs"], policy.score(batch, reference=True)["logprobs"]
    gaps = [float((a - b).sum()) for a, b in zip(own, reference, strict=True)]
    result, start = [], 0
    for trajectory in trajectories:
        count = sum(1 for segment in trajectory.segments if segment.actions)
        result.append(sum(gaps[start : start + count]))
        start += count
    return result
