"""Comparing policies with a judge that sees two answers to a prompt, each pair in both orders.

A judge is an object or function that says which of two answers is better, or any reward, which scores each alone.
Judges tend to prefer what they see first, or last (Zheng et al., arXiv 2306.05685): with both orders, that bias
cancels, and is reported.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lmrl.errors import RecipeError, RewardError
from lmrl.evaluation.paired import Played
from lmrl.evaluation.scoring import PROMPT, clusters_of
from lmrl.evaluation.statistics import UNIT, p_value, summarize
from lmrl.plugins import registry
from lmrl.recipe import Reward
from lmrl.rewards.load import load_reward, local_call, make_instance
from lmrl.rewards.pairs import Verdict, ask_pairs, by_score
from lmrl.rewards.rewards import arguments_of, score
from lmrl.rewards.workers import Failure
from lmrl.secrets import expand
from lmrl.seeding import stream
from lmrl.trajectories.trajectory import Trajectory

KEY = "--judge"
REMOTE = "lmrl.reward_models.judge.Judge"
"""The judge that is used if an address is named."""
MAX_FAILED = 0.1
"""Maximum share of pairs that a judge may leave unanswered."""
FIRST_BLOCK = 8
"""Pairs that a judge gets at first; each further block has twice as many."""

Preference = Callable[[Sequence[Trajectory], Sequence[Trajectory]], list[Verdict]]


@dataclass(kw_only=True)
class Judged:
    """How often a judge prefers a policy to another. first, second: their keys."""

    first: str
    second: str
    judge: str
    win_rate: float
    """Share of pairs in which the first is better; one that the judge decides differently in the two orders counts
    half. Of a judge that is less than certain, its mean confidence."""
    ci95: list[float]
    p: float
    """Two-sided, for the null hypothesis of a win rate of 1/2."""
    wins: int
    ties: int
    losses: int
    """Numbers of pairs: first better in both orders; neither; second better in both. Equal answers tie without being
    judged."""
    position: float | None
    """Share of judged answers that won because, or although, they were shown first; 1/2 is a judge without bias, None
    for one that scores answers one by one."""
    position_ci95: list[float] | None
    pairs: int
    failed: int


@dataclass
class Judge:
    """prefer: judges pairs in one order. sees_pairs: False for a reward, which scores each answer alone."""

    name: str
    prefer: Preference
    sees_pairs: bool


def load_judge(name: str, options: Mapping[str, Any] = {}) -> Judge:
    """A judge by name.

    A class whose instances have `prefers(prompts, first, second, **columns)`, a function of `first` and `second`, an
    address `http://HOST/v1#MODEL` that speaks OpenAI's chat completions, or any reward. Raises PluginError or
    RecipeError.
    """
    given = dict(options)
    if name.startswith(("http://", "https://")):
        address, found, model = name.partition("#")
        if not found or not model:
            raise RecipeError(f"{KEY}: '{name}' names no model: append it to the address, {address}#MODEL")
        given |= {"url": address, "model": model}
        label, name = model, REMOTE
    else:
        label = name
    loaded = registry.load("reward", name, KEY)
    if inspect.isclass(loaded) and hasattr(loaded, "prefers"):
        instance = make_instance(loaded, expand(given, f"{KEY}-option"), name, KEY)
        return Judge(label, _preference(instance.prefers), True)
    parameters = inspect.signature(loaded.__call__ if inspect.isclass(loaded) else loaded).parameters
    spec = Reward(function=name, options=given)
    if {"first", "second"} <= set(parameters):
        return Judge(label, _preference(local_call(spec, KEY)), True)
    function = load_reward(spec, KEY)

    def by_scores(one: Sequence[Trajectory], other: Sequence[Trajectory]) -> list[Verdict]:
        return by_score(score(function, arguments_of(one)), score(function, arguments_of(other)))

    return Judge(label, by_scores, False)


def _preference(call: Callable[..., Any]) -> Preference:
    """A judge of pairs, as a function of episodes."""

    def prefer(one: Sequence[Trajectory], other: Sequence[Trajectory]) -> list[Verdict]:
        columns = arguments_of(one)
        columns["first"], columns["second"] = columns.pop("completions"), arguments_of(other)["completions"]
        for name in ("completion_ids", "completion_cut"):
            columns.pop(name)
        return ask_pairs(call, columns, KEY)

    return prefer


def judge_pair(judge: Judge, first: Played, second: Played, fixed: bool = False) -> Judged:
    """Judge the answers of two policies to the same samples, in both orders.

    fixed: True if these are all the prompts there are, see `summarize`. Raises RewardError once the judge has left too
    many pairs unanswered, or all of the first block.
    """
    sides = [{(one.group, one.episode): one for one in played.trajectories} for played in (first, second)]
    keys = [key for key in sides[0] if key in sides[1]]
    asked = [key for key in keys if sides[0][key].completion != sides[1][key].completion]
    values = dict.fromkeys(keys, 0.5)
    places, wins, losses = {}, 0, 0
    failures: list[Failure] = []
    for block in _blocks(asked, FIRST_BLOCK if judge.sees_pairs else len(asked)):
        orders = _both_orders(judge, *([side[key] for key in block] for side in sides))
        for key, verdicts in zip(block, orders, strict=True):
            if isinstance(verdicts, Failure):
                failures.append(verdicts)
                del values[key]
                continue
            shown_first, shown_second = verdicts
            values[key] = (shown_first + 1 - shown_second) / 2
            places[key] = (shown_first + shown_second) / 2
            wins += shown_first > 0.5 > shown_second
            losses += shown_first < 0.5 < shown_second
        tried = len(places) + len(failures)
        if len(failures) > MAX_FAILED * len(asked) or failures and not places:
            rest = f"; the other {len(asked) - tried} were not asked" if tried < len(asked) else ""
            raise RewardError(
                f"{KEY}: {judge.name} gave no answer on {len(failures)} of {tried} pairs{rest}; the first: {failures[0]}"
            )
    clusters, of_places = (
        clusters_of([group for group, _ in each], first.trajectories, PROMPT) for each in (values, places)
    )
    shares = list(values.values())
    found = summarize(shares, clusters, UNIT, fixed)
    position = summarize(list(places.values()), of_places, UNIT) if places else None
    bias = position if judge.sees_pairs else None
    return Judged(
        first=first.key,
        second=second.key,
        judge=judge.name,
        win_rate=found["mean"],
        ci95=found["ci95"],
        p=p_value(shares, clusters, UNIT, fixed, null=0.5),
        wins=wins,
        ties=len(shares) - wins - losses,
        losses=losses,
        position=bias["mean"] if bias else None,
        position_ci95=bias["ci95"] if bias else None,
        pairs=len(shares),
        failed=len(failures),
    )


def _blocks(keys: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    """Parts of a sequence, each twice as long as the one before. They are drawn from all of it: samples of one prompt
    that cannot be judged would fill the first."""
    order, first = stream("judge", len(keys)).permutation(len(keys)), 0
    while first < len(keys):
        yield [keys[index] for index in order[first : first + size]]
        first, size = first + size, 2 * size


def _both_orders(
    judge: Judge, one: Sequence[Trajectory], other: Sequence[Trajectory]
) -> list[tuple[float, float] | Failure]:
    """Verdicts on pairs in both orders. A pair without a verdict in the first is not asked again."""
    found: list[Any] = judge.prefer(one, other)
    again = [number for number, verdict in enumerate(found) if not isinstance(verdict, Failure)]
    if again:
        swapped = judge.prefer([other[number] for number in again], [one[number] for number in again])
        for number, verdict in zip(again, swapped, strict=True):
            found[number] = verdict if isinstance(verdict, Failure) else (found[number], verdict)
    return found
