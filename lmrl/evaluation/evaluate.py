"""Scoring a policy on a suite."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import mean

from lmrl import distributed
from lmrl.engines.base import Engine, Sampling
from lmrl.engines.build import build_engine
from lmrl.engines.remote import RemoteEngine, RemotePolicy, without_limit
from lmrl.environments import limits_of
from lmrl.errors import RunError, counted
from lmrl.evaluation.best_of import several_samples
from lmrl.evaluation.choices import Chooser
from lmrl.evaluation.scoring import PROMPT, Scores, Scoring, check_metrics, exact, named_values, values_of
from lmrl.evaluation.statistics import Limits
from lmrl.evaluation.suites import Suite, refuse_code
from lmrl.policy.policy import Policy
from lmrl.rollouts.parties import against_other
from lmrl.rollouts.sampler import Sampler
from lmrl.rollouts.task import build_task
from lmrl.seeding import stream
from lmrl.trajectories.batch import to_batch
from lmrl.trajectories.trajectory import Trajectory

RANDOM_EPISODES = 8
"""Episodes of the random player from each start, for the low end of normalised scores."""


class Evaluator:
    """A suite made ready for one policy, to be scored any number of times."""

    def __init__(self, policy: Policy | RemotePolicy, suite: Suite, engine: Engine | None = None):
        """engine: the policy's, if it has one already."""
        refuse_code(suite)
        self.policy, self.suite, self.name = policy, suite, ""
        section = against_other(without_limit(suite.task) if isinstance(policy, RemotePolicy) else suite.task)
        self.task = build_task(section, policy.tokenizer)
        self.sampling = Sampling.of(suite.rollouts)
        if engine is None:
            engine = RemoteEngine(policy) if isinstance(policy, RemotePolicy) else build_engine(suite.rollouts, policy)
        self.engine: Engine = engine
        self.task.positions = policy.max_length
        self.sampler = Sampler(self.task, self.engine, policy.decode, suite.rollouts.deterministic)
        self.chooser = None
        if suite.choices is not None:
            if isinstance(policy, RemotePolicy):
                raise RunError(
                    "this suite compares log-likelihoods of choices, which an address does not give: score the "
                    "model itself, from a folder or by its name on the hub"
                )
            self.chooser = Chooser(policy, self.task, suite.choices)
        self.at_once: int | None = None
        """Episodes to play together (None: all)."""

    def close(self) -> None:
        """Close the engine and release the policy, to make room in memory for another."""
        self.engine.close()
        del self.policy, self.engine, self.sampler, self.chooser

    def starts(self) -> list[int | None]:
        heldout = self.task.heldout
        if heldout is None:
            return [None] * (self.suite.episodes or 100)
        starts: list[int | None] = [*heldout]
        if self.suite.shuffled:
            starts = stream("suite", self.suite.seed, "starts").permutation(heldout).tolist()
        return starts[: self.suite.episodes or len(starts)]

    @property
    def planned(self) -> int:
        """The number of episodes that it plays."""
        return len(self.starts()) * self.suite.samples

    @property
    def unit(self) -> str:
        """The name of what episodes of one group share: a prompt or a start state."""
        return PROMPT if self.task.judged_by == "reward" else "start state"

    @property
    def plays_all(self) -> bool:
        """True if the suite plays all start states, or prompts that were trained on: scores then hold for these
        only."""
        task = self.task
        if task.heldout is None or task.heldout != task.training:
            return False
        return task.judged_by == "reward" or len(self.starts()) == len(task.heldout)

    @property
    def played(self) -> str:
        """A readable description of what the suite plays."""
        task, count, samples = self.task, len(self.starts()), self.suite.samples
        if task.judged_by == "reward":
            whole = not task.training  # a suite's own file, of which nothing is for training
            what = f"{'all ' if whole and not task.notes and count == len(task.heldout or ()) else ''}{counted(count, ('' if whole else 'held-out ') + 'prompt')}"
            if task.heldout == task.training:
                what = f"{counted(count, 'prompt')} of the task itself (task.prompts.holdout keeps none aside)"
        elif task.heldout is None:
            what = counted(count, "fresh start state")
        else:
            some = "drawn" if self.suite.shuffled else "the first"
            what = f"{'all' if count == len(task.heldout) else some} {counted(count, 'start state')}"
        how = "each answer by its log-likelihood"
        if self.suite.choices is None:
            how = f"{counted(samples, 'fresh episode')} from each"
        return "; ".join([f"{what}, {how}", *task.notes])

    @cached_property
    def limits(self) -> dict[str, Limits]:
        """Lowest and highest possible value of metrics, if the environment declares them."""
        return limits_of(self.task.make())

    def __call__(self, beta: float | None = None, choosing: bool = False) -> tuple[Scores, list[Trajectory]]:
        """Play the suite. Episodes draw the same random numbers every time, so two scores are paired.

        beta: weight of Q instead of the suite's or the policy's own. choosing: play other episodes, for scores by which
        a policy is selected; its final score then comes from episodes that did not select it. Several processes share
        the episodes and get the same result.
        """
        check_metrics(self.suite.metrics, self.suite.samples)
        starts, played = self.starts(), []
        width = len(starts) if self.at_once is None else max(self.at_once // self.suite.samples, 1)
        for first in range(0, len(starts), width):
            played += self.play(starts[first : first + width], first, beta, choosing)
        trajectories = self.task.keep_judged(played)
        extra = {name: distributed.all_gather(values) for name, values in self.extra(trajectories).items()}
        trajectories = distributed.all_gather(trajectories)
        return self.report(trajectories, extra), trajectories

    def play(
        self, starts: Sequence[int | None], first: int, beta: float | None = None, choosing: bool = False
    ) -> list[Trajectory]:
        """This process's share of the episodes from some of the suite's start states, including failed ones.

        first: number of the first of them in the suite. beta, choosing: see `__call__`.
        """
        if self.chooser is not None:
            low, high = distributed.shard_bounds(len(starts))
            return self.chooser.play(starts[low:high], first + low, self.sampling_at(beta))
        name = ("suite", self.suite.seed, *(("choosing",) if choosing else ()))
        played = self.sampler.play(starts, self.suite.samples, self.sampling_at(beta), name, shared=True, first=first)
        if self.suite.is_unscored:
            for trajectory in played:
                trajectory.reward = None
        return played

    def sampling_at(self, beta: float | None) -> Sampling:
        """The suite's sampling, with this weight of Q (None: its own)."""
        return self.sampling if beta is None else replace(self.sampling, beta=beta)

    def extra(self, trajectories: Sequence[Trajectory]) -> dict[str, list[float]]:
        """Further measures of judged episodes: `kl`, if the policy has a reference."""
        if isinstance(self.policy, RemotePolicy) or self.chooser is not None or not self.policy.has_reference:
            return {}
        with self.policy.at_temperature(self.sampling.temperature or 1.0):
            return {"kl": divergences(self.policy, trajectories)}

    def optimum(self) -> Scores | None:
        """The exact optimum, if the environment has a player for it."""
        played = self._play("optimal", self.starts())
        if not played:
            return None
        single = [metric for metric in self.suite.metrics if several_samples(metric) is None]
        scores = replace(self.scoring(), metrics=single).report(played)
        # From every start, each played optimally: nothing is left to chance.
        certain = self.plays_all and self.task.match is None
        return {name: exact(score) for name, score in scores.items()} if certain else scores

    def _play(self, player: str, starts: list[int | None]) -> list[Trajectory] | None:
        """Episodes of a scripted player of the environment; None if it has no such player."""
        if player not in getattr(self.task.make(), "players", ()):
            return None
        return Sampler(self.task).play_scripted(player, starts, ("suite", self.suite.seed))

    @cached_property
    def scale(self) -> tuple[float, float] | None:
        """The main metric of the environment's players `random` and `optimal`, if it has both."""
        metric = self.suite.metrics[0]
        random = self._play("random", [start for start in self.starts() for _ in range(RANDOM_EPISODES)])
        best = self._play("optimal", self.starts())
        if not random or not best:
            return None
        low, high = (mean(values_of(played)[metric]) for played in (random, best))
        return (low, high) if high > low else None

    def normalize(self, value: float) -> float:
        """A value of the main metric in points: 0 for the random player, 100 for the optimum; unchanged without these
        players."""
        if self.scale is None:
            return value
        low, high = self.scale
        return 100 * (value - low) / (high - low)

    def by_start(self, trajectories: Sequence[Trajectory]) -> list[float]:
        """The mean of the main metric in points, for each start state."""
        groups: dict[int, list[float]] = {}
        for trajectory in trajectories:
            value = dict(named_values(trajectory))[self.suite.metrics[0]]
            groups.setdefault(trajectory.group, []).append(self.normalize(value))
        return [mean(values) for values in groups.values()]

    def scoring(self) -> Scoring:
        """How its episodes become scores."""
        scale = self.scale if "normalized" in self.suite.metrics else None
        return Scoring(self.suite.metrics, self.unit, self.limits, self.plays_all, scale)

    def report(self, trajectories: Sequence[Trajectory], extra: dict[str, list[float]] = {}) -> Scores:
        """Every metric of these episodes, the suite's own first."""
        return self.scoring().report(trajectories, extra)


@dataclass(frozen=True)
class Play:
    """What one policy played. what: a readable description. planned, judged: numbers of episodes."""

    what: str
    planned: int
    judged: int


def played_by(policies: Mapping[str, Play]) -> str:
    """The line that says what was played, once if it is the same for all policies, and how many episodes could not be
    judged. policies: by label."""
    several = len(policies) > 1
    by_what: dict[str, list[str]] = {}
    for label, one in policies.items():
        by_what.setdefault(one.what, []).append(label)
    what = [f"{', '.join(labels)}: {what}" if len(by_what) > 1 else what for what, labels in by_what.items()]
    lost = [
        f"{one.planned - one.judged} of {one.planned} episodes{f' of {label}' if several else ''}"
        for label, one in policies.items()
        if one.judged < one.planned
    ]
    return "; ".join([*what, *([f"failed and left out: {', '.join(lost)}"] if lost else [])])


def divergences(policy: Policy, trajectories: Sequence[Trajectory]) -> list[float]:
    """log(policy / reference) of each episode's sampled tokens: the mean estimates the KL in nats per episode."""
    batch = to_batch(list(trajectories))
    own, reference = policy.score(batch)["logprobs"], policy.score(batch, reference=True)["logprobs"]
    gaps = [float((a - b).sum()) for a, b in zip(own, reference, strict=True)]
    result, start = [], 0
    for trajectory in trajectories:
        count = sum(1 for segment in trajectory.segments if segment.actions)
        result.append(sum(gaps[start : start + count]))
        start += count
    return result
