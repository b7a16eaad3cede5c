"""Running reward functions: `f(prompts, completions, **columns) -> list[float | None]`, plain or async.

A function is called once per batch. It gets every column of the prompts' file by name, or those that its signature
names; for rollouts also `completion_ids` and `completion_cut` (True if the token limit cut it). None means "not
judged".
Instead of a number it may return an object with more to record: `{"score": 1.2, "std": 0.3}`. A failure is data: the
sample is left out and counted, and never becomes a zero.
"""

from __future__ import annotations

import copy
import math
import numbers
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lmrl.errors import EpisodeError, RewardError, TemporaryError, counted
from lmrl.rewards.scale import Scale
from lmrl.rewards.workers import Failure
from lmrl.secrets import redact
from lmrl.trajectories.trajectory import LARGEST_REWARD, Messages, Trajectory, is_reward

if TYPE_CHECKING:
    from lmrl.rewards.early import EarlyScores

GIVEN = ("prompts", "completions", "completion_ids", "completion_cut")
"""Arguments of every reward function, in addition to the columns of its rows."""
FIRST_PAUSE = 0.5
"""Seconds before the first retry of a call."""
MAX_TIMEOUTS, MAX_LOST = 2, 8
"""Maximum timeouts and lost workers while narrowing down a failure in one part of a batch."""


@dataclass
class RewardFunction:
    """A reward of a recipe, ready to be called. `origin` is `file.py:function`, for messages."""

    label: str
    origin: str
    weight: float
    call: Callable[..., Any]
    parallel: int = 1
    """Maximum parts of a batch that are scored concurrently, from threads."""
    timeout: float | None = None
    """Seconds that a call may take; `call` enforces it."""
    retries: int = 0
    """Retries after a transient failure."""
    scale: Scale = field(default_factory=Scale)
    """Normalisation and clipping of scores."""
    is_remote: bool = False
    """True if it runs in other processes, so that a thread may call it while episodes are played."""
    needs: Sequence[str] = ()
    """Names of the arguments that it cannot be called without."""


@dataclass
class Scores:
    """One function's verdict on a batch: a number or None for each row, the cause if there is none, and extras."""

    values: list[float | None] = field(default_factory=list)
    causes: list[str | None] = field(default_factory=list)
    extras: list[dict[str, float]] = field(default_factory=list)
    """Further numbers that the function wants recorded, by name."""

    def add(self, value: float | None, cause: str | None = None, extra: dict[str, float] | None = None) -> None:
        self.values.append(value)
        self.causes.append(cause)
        self.extras.append(extra or {})

    def extend(self, other: Scores) -> None:
        self.values += other.values
        self.causes += other.causes
        self.extras += other.extras


def score(function: RewardFunction, columns: dict[str, list[Any]]) -> Scores:
    """Call a function on a batch of columns, in parts if it takes several concurrently.

    If a batch fails, rows are called one by one, so that only those that cause the failure are lost; after a few
    further timeouts the rest of the batch is given up. A result of the wrong length or type raises RewardError: that is
    a mistake in the function, not a hard sample.
    """
    rows = len(columns["prompts"])
    parts = min(function.parallel, rows)
    if parts == 0:  # all episodes are in other processes
        return Scores()
    if parts == 1:
        return _score(function, columns)
    bounds = [rows * part // parts for part in range(parts + 1)]
    slices = [
        {name: column[low:high] for name, column in columns.items()}
        for low, high in zip(bounds, bounds[1:], strict=False)
    ]
    with ThreadPoolExecutor(parts) as threads:
        found = list(threads.map(lambda part: _score(function, part), slices))
    result = Scores()
    for part in found:
        result.extend(part)
    return result


def _score(function: RewardFunction, columns: dict[str, list[Any]]) -> Scores:
    rows = len(columns["prompts"])
    try:
        values = _attempt(function, columns)
    except RewardError:
        raise
    except (Exception, SystemExit) as error:
        return Scores([None], [_cause(function, error)], [{}]) if rows == 1 else _row_by_row(function, columns, error)
    result = Scores()
    for value in values:
        if isinstance(value, Failure):
            result.add(None, _cause(function, value))
            continue
        extra = {}
        if isinstance(value, dict):
            extra = {name: one for name, one in value.items() if name != "score" and one is not None}
            extra = {name: one for name, one in extra.items() if math.isfinite(one)}
            value = value["score"]
        fine = value is not None and is_reward(value)
        result.add(value if fine else None, None if fine else f"{function.origin} returned {_shown(value)}", extra)
    return result


def _shown(value: float | None) -> str:
    return f"{value}, larger than {LARGEST_REWARD:g}" if value is not None and math.isfinite(value) else str(value)


def _row_by_row(function: RewardFunction, columns: dict[str, list[Any]], error: BaseException) -> Scores:
    """Find the rows that make a batch fail, within MAX_TIMEOUTS further timeouts and MAX_LOST further workers."""
    result = Scores()
    late = lost = 0
    for row in range(len(columns["prompts"])):
        if late >= MAX_TIMEOUTS or lost >= MAX_LOST:
            result.add(None, f"{_cause(function, error)} (on its batch; too many failures to try every row)")
            continue
        single = _score(function, {name: [column[row]] for name, column in columns.items()})
        late += "timed out after" in (single.causes[0] or "")
        lost += "lost its worker" in (single.causes[0] or "")
        result.extend(single)
    return result


def _attempt(function: RewardFunction, columns: dict[str, list[Any]]) -> list[Value]:
    """Call once, and retry after transient failures, with pauses that double."""
    rows = len(columns["prompts"])
    for retry in range(function.retries + 1):
        try:  # a copy, because a function may change its arguments
            return checked_values(function.origin, function.call(**copy.deepcopy(columns)), rows)
        except Exception as error:
            if retry == function.retries or not is_temporary(error):
                raise
            time.sleep(min(FIRST_PAUSE * 2**retry, 30))
    raise AssertionError


def is_temporary(error: BaseException) -> bool:
    """True if another attempt may succeed."""
    return isinstance(error, TemporaryError | ConnectionError | TimeoutError) or getattr(error, "temporary", False)


def _cause(function: RewardFunction, error: BaseException) -> str:
    how = str(error) if isinstance(error, Failure) else f"raised {type(error).__name__}: {error}"
    return redact(f"{function.origin} {how}")


Value = float | None | Failure | dict[str, float | None]


def checked_values(origin: str, result: Any, rows: int) -> list[Value]:
    """A function's result as numbers (finite or not), None, failures, or objects of numbers.

    Raises RewardError for a wrong length or type.
    """
    return [_value(origin, number, value) for number, value in enumerate(_checked_list(origin, result, rows), start=1)]


def _value(origin: str, number: int, value: Any) -> Value:
    if isinstance(value, Failure):
        return value
    if isinstance(value, dict) and "score" in value:
        return {name: _number(origin, number, one) for name, one in value.items()}
    return _number(origin, number, value)


def _checked_list(origin: str, result: Any, rows: int) -> list[Any]:
    is_list = hasattr(result, "__len__") and hasattr(result, "__iter__") and getattr(result, "ndim", 1) == 1
    if isinstance(result, str | bytes | dict | set) or not is_list:
        raise RewardError(
            f"reward {origin} returned {result!r:.60} ({type(result).__name__}); "
            f"expected a list with one number or None for each row ({rows})"
        )
    values = list(result)
    if len(values) != rows:
        raise RewardError(
            f"reward {origin} returned {counted(len(values), 'value')} for {counted(rows, 'row')}: {values!r:.80}"
        )
    return values


def _number(origin: str, number: int, value: Any) -> float | None:
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        value = value.item()  # a numpy or torch scalar
    if value is None:
        return None
    if not isinstance(value, numbers.Real):
        raise RewardError(
            f"reward {origin}, value {number}: returned {value!r:.60} ({type(value).__name__}); expected a number or None"
        )
    return float(value)


def judge(
    rewards: Sequence[RewardFunction],
    trajectories: Sequence[Trajectory],
    learning: bool = False,
    early: EarlyScores | None = None,
) -> None:
    """Fill `components`, `reward` and `failure` of one-step trajectories and place the reward on their last token.

    The reward is the weighted sum of scores, after their normalisation and clipping; components are the original
    scores. `steady` is the same by the statistics of the first step, if running ones change. A sample that a weighted
    function did not judge has no reward; a function of weight 0 is only watched.
    learning: True for training samples, which update running statistics. early: scores that are known already.
    """
    arguments = arguments_of(trajectories)
    moves = learning and any(function.scale.is_running and function.weight for function in rewards)
    for trajectory in trajectories:
        trajectory.reward = 0.0
        trajectory.steady = 0.0 if moves else None
    for function in rewards:
        known = early.scores(function, trajectories) if early is not None else None
        scores = known or score(function, arguments)
        scaled = function.scale(scores.values, learning)
        steady = function.scale.steady(scores.values) if learning and function.scale.is_running else scaled
        for row, trajectory in enumerate(trajectories):
            trajectory.components[function.label] = scores.values[row]
            trajectory.components |= {f"{function.label}/{name}": one for name, one in scores.extras[row].items()}
            if function.weight == 0:
                continue
            earned = scaled[row]
            if earned is None:
                trajectory.reward, trajectory.failure = None, trajectory.failure or scores.causes[row]
            elif trajectory.reward is not None:
                trajectory.reward += function.weight * earned
                if trajectory.steady is not None:
                    trajectory.steady += function.weight * (steady[row] or 0.0)
    for trajectory in trajectories:
        if trajectory.reward is None:
            continue
        if is_reward(trajectory.reward):
            trajectory.place_reward(trajectory.reward)
        else:
            trajectory.failure = f"the weighted sum of the rewards is {_shown(trajectory.reward)}"
            trajectory.reward = None


def arguments_of(trajectories: Sequence[Trajectory]) -> dict[str, list[Any]]:
    """The arguments of reward functions: the prompts' columns, prompts and completions, one value per episode."""
    arguments = by_column([trajectory.columns for trajectory in trajectories])
    prompts = [trajectory.messages or trajectory.prompt for trajectory in trajectories]
    arguments["prompts"] = prompts
    arguments["completions"] = [
        answer_to(prompt, trajectory.completion) for prompt, trajectory in zip(prompts, trajectories, strict=True)
    ]
    arguments["completion_ids"] = [
        [token for segment in trajectory.segments for token in map(segment.tokens.__getitem__, segment.actions)]
        for trajectory in trajectories
    ]
    arguments["completion_cut"] = [bool(trajectory.cut_turns) for trajectory in trajectories]
    return arguments


def by_column(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Rows as lists by column, with None where a row lacks one."""
    return {name: [row.get(name) for row in rows] for name in dict.fromkeys(name for row in rows for name in row)}


def answer_to(prompt: str | Messages, text: str) -> str | Messages:
    """A completion as rewards get it: a message if the prompt is a dialogue."""
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


CHECKS = {"reward": "lmrl reward check", "environment": "lmrl env check"}
"""The commands that try what judges episodes."""


def drop_failed(
    trajectories: Sequence[Trajectory], max_failed: float, what: str, name: str | None = None
) -> list[Trajectory]:
    """The judged trajectories. what: `reward` or `environment`; name: the environment's. Raises RewardError or
    EpisodeError if more than `max_failed` of all processes' episodes, or all of them, could not be judged."""
    failed = [f"{one.prompt!r:.40} -> {one.completion!r:.40}: {one.failure}" for one in trajectories if one.failure]
    from lmrl import distributed  # imports torch, which reward workers do without

    count, lost = map(round, distributed.all_sum([len(trajectories), len(failed)]))
    if count and (lost > max_failed * count or lost == count):
        first = distributed.all_gather(failed[:1])[0]
        error = RewardError if what == "reward" else EpisodeError
        if lost > max_failed * count:
            many = f"{lost} of {count} samples, more than task.max_failed={max_failed} allows"
        else:
            many = f"every sample ({count})"
        check = f"; {CHECKS[what]} may say how to mend it" if what in CHECKS else ""
        raise error(f"{what}{f' {name!r}' if name else ''} failed on {many}; first, {first}{check}")
    return [trajectory for trajectory in trajectories if not trajectory.failure]
