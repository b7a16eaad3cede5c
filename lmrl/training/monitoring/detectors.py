"""Warnings of the guard: what is certainly wrong with a stage, apart from a collapse, and which option to change.

Each detector takes the stage's first steps, its last ones, the settings, and whether reward was certainly gained; it
returns a warning, which names an option and a value to try, or None.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean as mean
from statistics import median

from lmrl.training.monitoring.collapse import START, SURE, WINDOW
from lmrl.training.monitoring.reward_hacking import difference

WIDE = 30
"""Maximum steps that detectors see."""
Row = dict[str, float]
"""A step's measurements by name: see `lmrl.training.listeners.guard.row_of`."""

STILL_STEPS = 20
STILL = 0.1
"""Nats per token by which a stage must be able to move the policy if all its steps pulled in the same direction."""
GOOD_MOVE = 1e-3
"""Nats per token by which a step moves the policy if the learning rate is about right."""
ALIKE, MOSTLY_CUT, CLEARLY, NEARLY_ALL, MANY_FAILED = 0.8, 0.5, 0.3, 0.95, 0.2
"""Shares that trigger a warning: of groups without spread; of episodes with a cut turn (most; so many more than at
the start; nearly all); of unjudged episodes."""
TWICE, THRICE = 2.0, 3.0
"""Factors on entropy and length since the start that count as running away."""
RISE = 0.5
"""Nats that entropy must also have risen."""
GONE = 0.02
"""Share of the start's entropy that counts as none."""
WORSE, NOTHING, PREDICTABLE = -20.0, 0.05, 0.2
"""Explained variance of a critic that is far off, and of one that explains nothing; share of the reward's variance
between prompts, which a critic could predict."""
STILL_VARIES = 0.25
"""Share of the start's spread above which rewards still vary."""
HELD, STEEP = 0.2, 100.0
"""Factor on the learning rate below which the recipe's is too high; growth of gradient norms that counts as
exploding."""


@dataclass(frozen=True)
class Settings:
    """Settings of the recipe that warnings need to name a value to try."""

    steps: int
    lr: float
    head_lr: float | None = None
    samples: int = 1
    max_new_tokens: int = 64
    entropy_coef: float | None = None
    """None: the objective has none."""
    missing_eos_penalty: float | None = None
    has_eos_penalty: bool = False
    max_turns: int | None = None
    """None: an episode is one completion, or its task has no such limit."""
    can_resample: bool = False
    self_play: bool = False
    """True if the policy plays all sides of a game: what one gains another may lose, so rewards show no gain."""


def no_movement(first: Sequence[Row], last: Sequence[Row], of: Settings, gained: bool) -> str | None:
    """The policy stays where it is although there is something to learn from."""
    rows = [row for row in last if "moved" in row][-STILL_STEPS:]
    if gained or of.self_play or len(rows) < STILL_STEPS or not all(row.get("alike", 0.0) < ALIKE for row in rows):
        return None
    moved = mean(max(row["moved"], 0.0) for row in rows)
    if moved * of.steps**2 >= STILL:
        return None
    factor = min(math.sqrt(GOOD_MOVE / max(moved, 1e-12)), 100.0)
    return (
        f"no movement in {STILL_STEPS} steps ({moved:.1g} nats per token each): raise optimizer.lr from {of.lr:.2g} to "
        f"{of.lr * factor:.2g}"
    )


def no_signal(first: Sequence[Row], last: Sequence[Row], of: Settings, gained: bool) -> str | None:
    """Rewards do not differ within the groups that are compared."""
    rows = [row for row in last if "alike" in row][-WINDOW:]
    if len(rows) < WINDOW or mean(row["alike"] for row in rows) <= ALIKE:
        return None
    share = mean(row["alike"] for row in rows)
    if gained:
        return (
            f"no signal left: rewards have risen and are now all equal in {share:.0%} of groups: if the score is good, stop "
            f"here or give the task harder prompts, else {more_varied(of)}"
        )
    if of.self_play:
        return (
            f"no signal left: games from one start end alike in {share:.0%} of groups: if the scores are good, stop here, else "
            f"{more_varied(of)}"
        )
    if of.samples > 1 and share < 1:
        resample = ", or source.resample=3, which replaces such prompts" if of.can_resample else ""
        return (
            f"no signal: rewards are all equal in {share:.0%} of groups: set rollouts.samples={2 * of.samples} (it is "
            f"{of.samples}){resample}, or grade the reward more finely"
        )
    return (
        "no signal: all episodes of a step earn the same: unless the task is solved, check the reward with `lmrl reward check`, or "
        "grade it more finely"
    )


def more_varied(of: Settings) -> str:
    """Advice that makes episodes of one prompt differ more."""
    return "raise objective.entropy_coef" if of.entropy_coef is not None else "set rollouts.samples higher"


def endless_turns(first: Sequence[Row], last: Sequence[Row], of: Settings, gained: bool) -> str | None:
    """Most turns now run into the token limit, and did not at the start."""
    began, now = values("cut", first), values("cut", last[-WINDOW:])
    # The first step alone, before any update: within five a policy may learn never to end.
    if len(now) < WINDOW or not began or began[0] >= MOSTLY_CUT or mean(now) <= max(MOSTLY_CUT, began[0] + CLEARLY):
        return None
    text = f"endless turns: {mean(now):.0%} of episodes are cut at rollouts.max_new_tokens={of.max_new_tokens}, {began[0]:.0%} "
    text += "at the start: "
    if of.has_eos_penalty and of.missing_eos_penalty is None:
        return text + "set objective.missing_eos_penalty=1"
    return (
        text + f"check that the reward does not favour length, or set rollouts.max_new_tokens={2 * of.max_new_tokens}"
    )


def all_cut(first: Sequence[Row], last: Sequence[Row], of: Settings, gained: bool) -> str | None:
    """Nearly all turns run into the token limit, and have from the start."""
    began, now = values("cut", first), values("cut", last[-WINDOW:])
    if len(now) < WINDOW or not began or min(mean(began), mean(now)) < NEARLY_ALL:
        return None
    return (
        f"{mean(now):.0%} of episodes are cut at rollouts.max_new_tokens={of.max_new_tokens}: set it to {2 * of.max_new_tokens}, "
        "unless completions are meant to be that long"
    )


def many_failed(first: Sequence[Row], last: Sequence[Row], of: Settings, gained: bool) -> str | None:
    """Many episodes cannot be judged, and so teach nothing."""
    now = values("failed", last[-WINDOW:])
    if len(now) < WINDOW or mean(now) <= MANY_FAILED:
        return None
    return (
        f"{mean(now):.0%} of episodes could not be judged, and are not trained on: see `failure` in samples.jsonl; set "
        f"task.max_failed={MANY_FAILED / 2:g} to stop instead"
    )


def runaway_entropy(first: Sequence[Row], last: Sequence[Row], of: Settings, gained: bool) -> str | None:
    """The policy becomes random, or loses all its randomness, without earning more."""
    began, now = values("entropy", first), values("entropy", last[-WINDOW:])
    if gained or len(began) < 2 or len(now) < WINDOW:
        return None
    sure, before, after = difference(began, now), mean(began), mean(now)
    if sure > SURE and after > TWICE * before and after > before + RISE:
        text = f"entropy has risen from {before:.2g} to {after:.2g} nats per token, while the reward has not: "
        if of.entropy_coef:
            return text + f"set objective.entropy_coef={of.entropy_coef / 10:.2g} (it is {of.entropy_coef:g})"
        return text + f"lower optimizer.lr from {of.lr:.2g} to {of.lr / 3:.2g}"
    if sure < -SURE and after < GONE * before:
        text = f"entropy has fallen from {before:.2g} to {after:.2g} nats per token, while the reward has not risen: "
        if of.entropy_coef is not None:
            return text + f"set objective.entropy_coef={max(2 * of.entropy_coef, 0.01):.2g}"
        return text + f"lower optimizer.lr from {of.lr:.2g} to {of.lr / 3:.2g}"
    return None


def runaway_length(first: Sequence[Row], last: Sequence[Row], of: Settings, gained: bool) -> str | None:
    """Episodes grow without earning more."""
    began, now = values("length", first), values("length", last[-WINDOW:])
    if gained or len(began) < START or len(now) < WINDOW:
        return None
    if difference(began, now) <= SURE or mean(now) <= THRICE * mean(began):
        return None
    text = f"episodes have grown from {mean(began):.0f} to {mean(now):.0f} tokens, while the reward has not risen: "
    most = math.ceil(TWICE * mean(began))
    if of.max_turns is not None:
        text += f"lower task.max_turns from {of.max_turns} or rollouts.max_new_tokens from {of.max_new_tokens}, or "
    elif most < of.max_new_tokens:  # else an agent's many turns make the length
        text += f"set rollouts.max_new_tokens={most}, or "
    return text + "penalise length in the reward"


def blind_critic(first: Sequence[Row], last: Sequence[Row], of: Settings, gained: bool) -> str | None:
    """The critic is far off, or explains nothing although there is something to explain."""
    rows = [row for row in last if "explained" in row]
    began, now = values("reward_std", first), values("reward_std", rows[-WINDOW:])
    if len(now) < WINDOW or not began or median(now) <= STILL_VARIES * mean(began):
        return None  # if rewards hardly vary, any error is large compared with them
    advice = "lower optimizer.head_lr" if of.head_lr is None else f"set optimizer.head_lr={of.head_lr / 10:.2g}"
    explained = median(values("explained", rows[-WINDOW:]))
    if explained < WORSE:
        return f"the critic is far off (explained variance {explained:.2g}), so that advantages are noise: {advice}"
    known = values("between", rows)
    if len(rows) < WIDE or len(known) < WIDE or mean(known) <= PREDICTABLE:
        return None
    explained = mean(values("explained", rows))
    if abs(explained) >= NOTHING:
        return None
    text = f"the critic explains nothing of the returns in {WIDE} steps, though prompts explain {mean(known):.0%} of the reward: "
    return text + ("raise optimizer.head_lr" if of.head_lr is None else f"set optimizer.head_lr={10 * of.head_lr:.2g}")


def rate_held(first: Sequence[Row], last: Sequence[Row], of: Settings, gained: bool) -> str | None:
    """training.kl_band holds the learning rate far below the recipe's."""
    now = values("held", last[-WINDOW:])
    if len(now) < WINDOW or median(now) >= HELD:
        return None
    return (
        f"steps move the policy too far, and the learning rate is held to {median(now):.0%} of the recipe's: lower optimizer.lr from "
        f"{of.lr:.2g} to {of.lr * median(now):.2g}"
    )


def exploding_gradients(first: Sequence[Row], last: Sequence[Row], of: Settings, gained: bool) -> str | None:
    """Gradients are far larger than at the start, while nothing is gained by them."""
    began, now = values("grad_norm", first), values("grad_norm", last[-WINDOW:])
    if gained or len(began) < START or len(now) < WINDOW or median(now) <= STEEP * median(began):
        return None
    return (
        f"gradients have grown from {median(began):.2g} to {median(now):.2g}: lower optimizer.lr from {of.lr:.2g} to "
        f"{of.lr / 3:.2g}"
    )


DETECTORS = {
    one.__name__: one
    for one in (
        no_movement,
        no_signal,
        endless_turns,
        all_cut,
        many_failed,
        runaway_entropy,
        runaway_length,
        blind_critic,
        rate_held,
        exploding_gradients,
    )
}


def values(name: str, rows: Sequence[Row]) -> list[float]:
    """A measure over the steps that have it as a finite number."""
    return [row[name] for row in rows if name in row and math.isfinite(row[name])]


def between_groups(earned: Sequence[tuple[int, float]]) -> float | None:
    """Share of the reward's variance that lies between groups (the intraclass correlation of a one-way analysis of
    variance), from the group and reward of each episode; None if there is one group, groups have one episode, or rewards
    do not vary."""
    groups: dict[int, list[float]] = {}
    for group, reward in earned:
        groups.setdefault(group, []).append(reward)
    count, size = len(groups), len(earned)
    if count < 2 or size == count:
        return None
    centre = math.fsum(reward for _, reward in earned) / size
    between = math.fsum(len(own) * (mean(own) - centre) ** 2 for own in groups.values()) / (count - 1)
    within = math.fsum((reward - mean(own)) ** 2 for own in groups.values() for reward in own) / (size - count)
    typical = (size - math.fsum(len(own) ** 2 for own in groups.values()) / size) / (count - 1)
    total = between + (typical - 1) * within
    return (between - within) / total if total > 0 else None
