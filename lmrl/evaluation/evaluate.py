"""Scoring a policy on a suite."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lmrl.errors import RecipeError, did_you_mean
from lmrl.evaluation.statistics import summarize
from lmrl.evaluation.suites import Suite
from lmrl.policy.policy import Policy
from lmrl.rollouts.engine import Sampling
from lmrl.rollouts.hf import HFEngine
from lmrl.rollouts.sampler import Sampler
from lmrl.rollouts.task import Task, build_task
from lmrl.trajectories.batch import to_batch
from lmrl.trajectories.trajectory import Trajectory

Scores = dict[str, dict[str, Any]]
RESERVED = ("reward", "return", "length", "kl")
"""Metrics of lmrl's own; a reward function or environment metric of that name is reported as `component/NAME`."""


class Evaluator:
    """A suite made ready for one policy, to be scored any number of times."""

    def __init__(self, policy: Policy, suite: Suite):
        self.policy, self.suite = policy, suite
        self.task = build_task(suite.task, policy.tokenizer)
        self.sampling = Sampling.of(suite.rollouts)
        engine = HFEngine(policy, suite.rollouts.slots)
        self.sampler = Sampler(self.task, engine, policy.decode)

    def starts(self) -> list[int | None]:
        starts = self.task.heldout
        if starts is None:
            return [None] * (self.suite.episodes or 100)
        return starts[: self.suite.episodes or len(starts)]

    def __call__(self) -> tuple[Scores, list[Trajectory]]:
        """Play the suite. Episodes draw the same random numbers every time, so two scores are paired."""
        name = ("suite", self.suite.seed)
        before = self.policy.temperature
        trajectories = self.task.keep_judged(self.sampler.play(self.starts(), self.suite.samples, self.sampling, name))
        extra = {}
        if self.policy.has_reference:
            self.policy.temperature = self.sampling.temperature or 1.0
            extra["kl"] = divergences(self.policy, trajectories)
        self.policy.temperature = before
        return self.report(trajectories, extra), trajectories

    def optimum(self) -> Scores | None:
        """The exact optimum, where the environment has a player for it."""
        if "optimal" not in getattr(self.task.make(), "players", ()):
            return None
        return self.report(Sampler(self.task).play_scripted("optimal", self.starts(), ("suite", self.suite.seed)))

    def report(self, trajectories: Sequence[Trajectory], extra: dict[str, list[float]] = {}) -> Scores:
        """Every metric of these episodes, the suite's own first."""
        scores = summarize_trajectories(self.task, trajectories)
        scores |= {name: summarize(values) for name, values in extra.items()}
        main = self.suite.metrics[0]
        if main not in scores:
            raise RecipeError(f"suite: there is no metric '{main}'{did_you_mean(main, scores)}")
        return {name: scores[name] for name in dict.fromkeys([*self.suite.metrics, *scores]) if name in scores}


def summarize_trajectories(task: Task, trajectories: Sequence[Trajectory]) -> Scores:
    """Return (or reward), every component and metric, and length in tokens, each with its interval."""
    main = "reward" if task.judged_by == "reward" else "return"
    values: dict[str, list[float]] = {main: [trajectory.reward for trajectory in trajectories]}
    for trajectory in trajectories:
        for name, value in {**trajectory.components, **trajectory.metrics}.items():
            if value is not None:
                values.setdefault(f"component/{name}" if name in RESERVED else name, []).append(value)
    values["length"] = [trajectory.num_actions for trajectory in trajectories]
    return {name: summarize(column) for name, column in values.items()}


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
