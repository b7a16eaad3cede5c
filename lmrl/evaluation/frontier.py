"""Reward against divergence over a run's checkpoints, with best-of-n of the initial policy as the yardstick.

A policy that moves further from the initial one can usually score more; what counts is the score at a given distance.
Best-of-n, the best of n samples of the initial policy by the same reward, needs no training: its divergence is at most
log n - (n - 1) / n nats (Beirami et al., arXiv 2401.01879), and training paid off where the run lies above that curve.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

from lmrl.accelerators import default_device
from lmrl.earlier_calls import forget_earlier_calls
from lmrl.engines.base import guidance_of
from lmrl.errors import RecipeError, RunError
from lmrl.evaluation.api import NamedSuite, dtype_of, evaluator_for
from lmrl.evaluation.best_of import best_at
from lmrl.evaluation.contenders import contenders
from lmrl.evaluation.controlled import FEWEST, controlled
from lmrl.evaluation.evaluate import Evaluator, Play, played_by
from lmrl.evaluation.paired import Played, means_by_cluster
from lmrl.evaluation.scoring import Scores, Scoring, clusters_of, value_of
from lmrl.evaluation.statistics import summarize
from lmrl.policy.load import open_policy
from lmrl.policy.policy import Policy
from lmrl.recipe import MAIN_STAGE
from lmrl.recipe.files import stages_of
from lmrl.run_folders import RECIPE_FILE, checkpoint_of, read_recipe
from lmrl.trajectories.trajectory import Trajectory

BEST_OF = 16
"""Samples per prompt from the initial policy, for the yardstick."""
START = "start"


@dataclass
class Point:
    """A checkpoint. kl: to the initial policy, in nats per episode."""

    label: str
    kl: float
    kl_ci95: list[float]
    score: float
    ci95: list[float]
    at_equal_length: float | None
    """The score at the initial policy's length (see lmrl/evaluation/controlled.py); None if there are too few
    prompts."""
    best_of_n: float | None
    """The score of the initial policy's best-of-n at this divergence; None beyond the largest n that was sampled."""
    gain: float | None
    """score - best_of_n."""


@dataclass
class BestOf:
    """The yardstick at one n. kl: log n - (n - 1) / n."""

    n: int
    kl: float
    score: float
    ci95: list[float]


@dataclass
class Frontier:
    suite: str
    metric: str
    run: str
    points: list[Point]
    yardstick: list[BestOf]
    played: str = ""

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"


def frontier(
    run: str | Path,
    suite: str | Path | None = None,
    overrides: Sequence[str] = (),
    checkpoints: Sequence[str] = ("all",),
    best_of: int = BEST_OF,
    trust_remote_code: bool = False,
) -> Frontier:
    """Score a run's checkpoints, their divergence from the initial policy of its last stage, and that policy's
    best-of-n.

    suite, overrides: as for `lmrl.evaluate`; its main metric is used. best_of: the largest n. Raises RunError if `run`
    is not a run, RecipeError for a suite that is not sampled.
    """
    if best_of < 1:
        raise RecipeError(f"--best-of: expected 1 or more samples, got {best_of}")
    forget_earlier_calls()
    folder = Path(run).expanduser()
    if not (folder / RECIPE_FILE).is_file():
        raise RunError(f"frontier: {run} is not a run: name the folder of one, which holds a {RECIPE_FILE}")
    origin = start_of(folder)
    found = contenders([str(folder)], checkpoints=checkpoints)
    first = evaluator_for(found[0], suite, overrides, trust_remote_code)
    named = NamedSuite(first.suite, first.name)
    metric = _metric_of(first)
    device = default_device()
    start = open_policy(origin, dtype_of(Path(found[0].path)), trust_remote_code).to(device)
    assert isinstance(first.policy, Policy)  # a run's checkpoints are not addresses
    if any(guidance_of(policy, first.sampling) for policy in (start, first.policy)):
        raise RecipeError(
            f"frontier: {run} plays with Q values, and the divergence that these add is not measured: play without, "
            "rollouts.beta=0 rollouts.support=0"
        )
    scores, episodes = Evaluator(
        start, first.suite
    )()  # with the same random numbers as the checkpoints, so that all are paired
    base, scoring = Played(START, episodes), first.scoring()
    sampled = episodes
    if best_of != first.suite.samples:
        sampled = Evaluator(start, first.suite.model_copy(update={"samples": best_of}))()[1]
    yardstick = [best_of_n(sampled, metric, n, scoring) for n in powers(best_of)]
    points = [Point(START, 0.0, [0.0, 0.0], *_of(scores, metric), scores[metric]["mean"], scores[metric]["mean"], 0.0)]
    plays = {START: Play(first.played, first.planned, len(episodes))}
    for number, contender in enumerate(found):
        evaluator = evaluator_for(contender, trust_remote_code=trust_remote_code, given=named) if number else first
        assert isinstance(evaluator.policy, Policy)
        evaluator.policy.measure_from(start)
        evaluator.policy.to(device)
        try:
            scores, episodes = evaluator()
        finally:
            evaluator.close()
        plays[contender.label] = Play(first.played, first.planned, len(episodes))
        own = Played(contender.label, episodes)
        points.append(_point(own, scores, scoring, metric, base, yardstick))
    return Frontier(named.name, metric, str(run), points, yardstick, played_by(plays))


def start_of(folder: Path) -> str:
    """The policy that a run's last stage began with: a checkpoint, a model's folder, or a name on the hub. Raises
    RunError if it is gone."""
    recipe = read_recipe(folder)
    own = folder / "stages" / MAIN_STAGE / "start"
    if own.is_dir():
        return str(own)
    stages = stages_of(recipe)
    earlier = [name for name, stage in stages.items() if name != MAIN_STAGE and stage.objective.leaves_policy]
    wanted = earlier[-1:] if recipe.start == "previous" else [name for name in earlier if name == recipe.start]
    if wanted:
        final = folder / "stages" / wanted[0] / "final"
        if not final.is_dir():
            raise RunError(f"{folder}: the stage before, '{wanted[0]}', has left no {final}, so the start is unknown")
        return str(final)
    if recipe.model.path is None:
        raise RunError(f"{folder}: its model was built from scratch, and the initial weights were not saved")
    return checkpoint_of(recipe.model.path, key="model.path")


def _metric_of(evaluator: Evaluator) -> str:
    """The main metric of a suite that is sampled."""
    suite = evaluator.suite
    if suite.choices is not None or not suite.rollouts.temperature:
        raise RecipeError(
            "frontier: divergence and best-of-n need sampled episodes: take a suite with rollouts.temperature above 0"
        )
    return suite.metrics[0]


def powers(most: int) -> list[int]:
    """1, 2, 4, ... and the highest n itself."""
    return [*(2**power for power in range(most.bit_length()) if 2**power < most), most]


def divergence_of(n: int) -> float:
    """Upper bound, in nats, of the divergence of best-of-n from its policy."""
    return math.log(n) - (n - 1) / n


def best_of_n(episodes: Sequence[Trajectory], metric: str, n: int, scoring: Scoring) -> BestOf:
    """The mean score of the best of n samples of a prompt, over all subsets of n (see lmrl/evaluation/best_of.py).

    A sample that could not be judged is never the best: a prompt with fewer than n others takes the best of these, so
    that every n is about the same prompts.
    """
    single = None if metric in ("reward", "return") else metric
    rewards: dict[int, list[float]] = {}
    scores: dict[int, list[float]] = {}
    for one in episodes:
        score = value_of(one, single)
        if score is not None and one.reward is not None:
            rewards.setdefault(one.group, []).append(one.reward)
            scores.setdefault(one.group, []).append(score)
    values = [best_at(min(n, len(scores[group])), rewards[group], scores[group]) for group in scores]
    limits = scoring.limits_of(f"best@{n}" + (f"/{single}" if single else ""), episodes)
    found = summarize(values, clusters_of(list(scores), episodes, scoring.unit), limits, unit=scoring.unit)
    return BestOf(n, divergence_of(n), found["mean"], found["ci95"])


def at_divergence(yardstick: Sequence[BestOf], kl: float) -> float | None:
    """The score of best-of-n at a divergence, interpolated linearly between the sampled n; None beyond them."""
    for one, other in pairwise(yardstick):
        if one.kl <= kl <= other.kl:
            return one.score + (other.score - one.score) * (kl - one.kl) / (other.kl - one.kl)
    return yardstick[0].score if kl <= yardstick[0].kl else None


def _of(scores: Scores, metric: str) -> tuple[float, list[float]]:
    return scores[metric]["mean"], scores[metric]["ci95"]


def _point(
    own: Played, scores: Scores, scoring: Scoring, metric: str, base: Played, yardstick: Sequence[BestOf]
) -> Point:
    (kl, kl_ci95), (score, ci95) = _of(scores, "kl"), _of(scores, metric)
    yard = at_divergence(yardstick, kl)
    equal = at_equal_length(own, base, metric, scoring)
    return Point(own.label, kl, kl_ci95, score, ci95, equal, yard, None if yard is None else score - yard)


def at_equal_length(own: Played, base: Played, metric: str, scoring: Scoring) -> float | None:
    """The score that a policy would have if its episodes were as long as the initial policy's."""
    means = [[means_by_cluster(one, name, scoring) for name in (metric, "length")] for one in (own, base)]
    common = [cluster for cluster in means[0][0] if cluster in means[1][0]]
    if len(common) < FEWEST:
        return None
    gaps, lengths = ([means[0][at][cluster] - means[1][at][cluster] for cluster in common] for at in (0, 1))
    return math.fsum(means[1][0][one] for one in common) / len(common) + controlled(gaps, lengths, "length").mean
