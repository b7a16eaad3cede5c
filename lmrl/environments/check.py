"""Checks of an environment before anything is trained on it."""

from __future__ import annotations

import math
import pickle
import string
import time
from collections.abc import Callable, Iterator
from itertools import zip_longest
from pathlib import Path
from traceback import walk_tb
from typing import Any

import numpy as np

from lmrl.environments import environment_factory, limits_of, sample_texts
from lmrl.environments.calls import allowed_actions, begin_episode, call_player, take_step
from lmrl.environments.games import GameEnvironment, check_says_what_is_allowed, inner, lists_actions
from lmrl.errors import LmrlError, counted
from lmrl.findings import Finding
from lmrl.recipe import EnvironmentTask
from lmrl.seeding import stream
from lmrl.visible import visible

EPISODES, REPEATED = 20, 3
NONSENSE = ("", "nonsense \x00", "A" * 10_000)
"""Actions that a model might write."""
DRAW = "call super().reset(seed=seed), and draw from self.np_random"


def check_environment(task: EnvironmentTask, episodes: int = EPISODES) -> Iterator[Finding]:
    """Check the environment of a recipe's `task`. Findings are yielded one by one; a failure that makes the rest
    meaningless is the last."""
    try:
        make = environment_factory(task)
        environment = make()
        if task.allowed_actions:
            check_says_what_is_allowed(environment, task.environment)
    except LmrlError as error:
        yield Finding("can be made", False, str(error))
        return
    yield Finding("can be made", True, type(inner(environment)).__name__)
    yield _picklable(environment)
    try:
        first, again = (begin_episode(environment, 1, None, task.call_timeout)[0] for _ in range(2))
    except (Exception, SystemExit) as error:
        yield Finding("reset", False, _raised(error, environment))
        return
    yield Finding("reset", True, f"begins with {visible(str(first))[:80]!r}")
    yield Finding(
        "the seed decides the start",
        first == again,
        "same seed, same start" if first == again else f"same seed, different start: {DRAW}",
    )
    yield _starts(environment, task)
    player = _player(environment)
    try:
        played = [_play(make(), seed, player, task) for seed in range(episodes)]
        repeated = [_play(make(), seed, player, task) for seed in range(min(episodes, REPEATED))]
    except (Exception, SystemExit) as error:
        yield Finding("step", False, _raised(error, environment))
        return
    yield Finding(
        "step", True, f"five values of the right types in {counted(sum(len(one.rewards) for one in played), 'step')}"
    )
    same = all(one.trace == other.trace for one, other in zip(repeated, played, strict=False))
    yield Finding(
        "the seed decides the episode",
        same,
        "same seed and actions, same episode" if same else f"same seed and actions, different episode: {DRAW}",
    )
    if same:
        yield _again(make, player, task, played)
        yield _side_by_side(make, player, task, played)
    if isinstance(environment, GameEnvironment):
        yield _turns(environment.game.num_players, played)
    yield _ends(played, task)
    returns = [sum(one.rewards) for one in played]
    spread = len(set(returns)) > 1
    yield Finding(
        "rewards differ",
        True if spread else None,
        f"returns of {'random play' if player == 'random' else player} {min(returns):.3g} to {max(returns):.3g}, mean {np.mean(returns):.3g}"
        + ("" if spread else ": if all episodes earn the same, nothing can be learned"),
    )
    yield from _within_limits(environment, played)
    yield from _scripted(make, environment, task)
    yield _odd_actions(make, task, environment)
    yield _texts(environment, played)
    yield _speed(played)


class _Played:
    """An episode, and what was seen of it."""

    def __init__(self, environment: Any, seed: int, player: str, task: EnvironmentTask) -> None:
        """player: a scripted one, or `texts`: any of the allowed actions, else of the environment's texts."""
        self.environment, self.seed, self.player, self.task = environment, seed, player, task
        self.rewards: list[float] = []
        self.trace: list[Any] = []
        self.texts: list[str] = []
        self.metrics: dict[str, float | None] = {}
        self.ended = self.terminated = False
        self.seconds = 0.0
        self.movers: set[int] = set()
        """Players of a game that had a turn."""

    def steps(self) -> Iterator[None]:
        """Play it, one step at a time."""
        environment, limit = self.environment, self.task.call_timeout
        rng = stream("check", self.seed)
        observation, _ = begin_episode(environment, self.seed, None, limit)
        words = (sample_texts(environment) or ["a"]) if self.player == "texts" else []
        for _ in range(self.task.max_turns):
            allowed = allowed_actions(environment, limit) if self.task.allowed_actions else None
            if words:
                action = str(rng.choice(allowed or words))
            else:
                action = call_player(environment, self.player, rng, limit)
            if allowed is not None and action not in allowed:
                raise ValueError(
                    f"act('{self.player}', ...) returned {action!r:.60}, which is not allowed: {allowed!r:.60}"
                )
            begun = time.perf_counter()
            after, reward, terminated, truncated, self.metrics = take_step(environment, action, limit)
            self.seconds += time.perf_counter() - begun
            self.rewards.append(reward)
            self.texts += [str(observation), action]
            self.trace.append((observation, action, reward, terminated, truncated, after))
            observation = after
            self.ended, self.terminated = terminated or truncated, terminated
            if self.ended:
                break
            yield
        if isinstance(environment, GameEnvironment):
            self.movers = {player for player, _ in environment.referee.moves}


def _ends(played: list[_Played], task: EnvironmentTask) -> Finding:
    ended, terminated = sum(one.ended for one in played), sum(one.terminated for one in played)
    said = f"{ended} of {len(played)} episodes"
    if ended < len(played):
        said += f", the others after task.max_turns={task.max_turns}"
    if ended and not terminated:
        said += ", all by truncated=True, as if the game would go on: if the limit is one of its rules, return terminated=True"
    return Finding("ends by itself", True if terminated else None, said)


def _player(environment: Any) -> str:
    players = tuple(getattr(environment, "players", ()))
    return "random" if "random" in players else players[0] if players else "texts"


def _play(environment: Any, seed: int, player: str, task: EnvironmentTask) -> _Played:
    played = _Played(environment, seed, player, task)
    for _ in played.steps():
        pass
    return played


def _again(make: Callable[[], Any], player: str, task: EnvironmentTask, first: list[_Played]) -> Finding:
    """The first episode, in an environment that has played the second: rollouts keep environments."""
    name, environment, fix = "reset begins anew", make(), "set all state of an episode in reset()"
    try:
        _play(environment, 1, player, task)
        same = _play(environment, 0, player, task).trace == first[0].trace
    except (Exception, SystemExit) as error:
        return Finding(name, False, f"a second episode raises {_raised(error, environment)}: {fix}")
    return Finding(name, same, "after an episode" if same else f"an episode changes the next one: {fix}")


def _side_by_side(make: Callable[[], Any], player: str, task: EnvironmentTask, alone: list[_Played]) -> Finding:
    """Two episodes, whose steps take turns, against the same ones alone."""
    name, both = "episodes run side by side", [_Played(make(), seed, player, task) for seed in range(2)]
    fix = "keep an episode's state in self, not in the class or the module"
    try:
        for _ in zip_longest(*(one.steps() for one in both)):
            pass
    except (Exception, SystemExit) as error:
        return Finding(name, False, f"two at a time raise {_raised(error, both[0].environment)}: {fix}")
    same = all(one.trace == other.trace for one, other in zip(both, alone, strict=False))
    return Finding(name, same, "two at a time, as each alone" if same else f"two at a time disturb each other: {fix}")


def _raised(error: BaseException, environment: Any) -> str:
    """An error, and the last line of the environment's own file that it passed."""
    module = type(inner(environment)).__module__
    frames = [at for at in walk_tb(error.__traceback__) if at[0].f_globals.get("__name__") == module]
    place = f" ({Path(frames[-1][0].f_code.co_filename).name}, line {frames[-1][1]})" if frames else ""
    return f"{type(error).__name__}: {error}{place}"


def _turns(players: int, played: list[_Played]) -> Finding:
    idle = [player for player in range(players) if not any(player in one.movers for one in played)]
    detail = f"player {idle[0] + 1} of {players} never has one: step() says in self.to_move who is next" if idle else ""
    return Finding("all players have turns", None if idle else True, detail or counted(players, "player"))


def _picklable(environment: Any) -> Finding:
    try:
        pickle.loads(pickle.dumps(environment))
    except Exception as error:
        return Finding(
            "can be pickled", None, f"no ({type(error).__name__}: {error}): it cannot be sent to another process"
        )
    return Finding("can be pickled", True, "for other processes")


def _starts(environment: Any, task: EnvironmentTask) -> Finding:
    count = getattr(environment, "num_starts", None)
    if count is None:
        return Finding(
            "start states",
            None,
            "drawn by the seed; with `num_starts`, rollouts and evaluation would go through all of them",
        )
    try:
        pairs = [begin_episode(environment, seed, count - 1, task.call_timeout)[0] for seed in (1, 2)]
    except (Exception, SystemExit) as error:
        return Finding(
            "start states",
            False,
            f"num_starts is {count}, but start {count - 1} raises {_raised(error, environment)}",
        )
    same = pairs[0] == pairs[1]
    detail = (
        f"{count} of them"
        if same
        else f"start {count - 1} depends on the seed: reset(options={{'start': i}}) must begin in the i-th"
    )
    return Finding("start states", same, detail)


def _within_limits(environment: Any, played: list[_Played]) -> Iterator[Finding]:
    limits = limits_of(environment)
    if "return" not in limits:
        yield Finding(
            "limits of the return",
            None,
            "unknown; `metric_limits = {'return': (LOW, HIGH)}` keeps intervals within them",
        )
    for name, (low, high) in limits.items():
        measured = [sum(one.rewards) if name == "return" else one.metrics.get(name) for one in played]
        seen = [value for value in measured if value is not None]
        if seen:
            yield Finding(
                "limits of the return" if name == "return" else f"limits of the metric '{name}'",
                all(
                    low <= value <= high or any(math.isclose(value, one, abs_tol=1e-9) for one in (low, high))
                    for value in seen
                ),
                f"({low:g}, {high:g}); seen {min(seen):.3g} to {max(seen):.3g}",
            )


def _scripted(make: Any, environment: Any, task: EnvironmentTask) -> Iterator[Finding]:
    players = tuple(getattr(environment, "players", ()))
    if not players:
        yield Finding(
            "scripted players",
            None,
            "none; with `players` and `act`, episodes can be collected and imitated, and scores compared with theirs",
        )
    for player in players:
        try:
            returns = [sum(_play(make(), seed, player, task).rewards) for seed in range(5)]
        except (Exception, SystemExit) as error:
            yield Finding(f"player '{player}'", False, _raised(error, environment))
            continue
        yield Finding(f"player '{player}'", True, f"mean return {np.mean(returns):.3g} in 5 episodes")


def _odd_actions(make: Any, task: EnvironmentTask, environment: Any) -> Finding:
    name = "survives odd actions"
    if task.allowed_actions:
        return Finding(name, None, "not tried: task.allowed_actions=true plays only those that the environment lists")
    raised = raised_by_odd_actions(make, task.call_timeout)
    if raised is None:
        return Finding(name, True, "empty, odd and very long actions")
    fix = (
        "set task.allowed_actions=true" if lists_actions(environment) else "answer any text, or list allowed_actions()"
    )
    return Finding(name, False, f"{raised}: {fix}")


def raised_by_odd_actions(make: Any, limit: float | None) -> str | None:
    """The odd action that an environment does not survive, with its error; None: it survives them all. limit: seconds
    that a call may take."""
    for action in NONSENSE:
        environment = make()
        try:
            begin_episode(environment, 0, None, limit)
            take_step(environment, action, limit)
        except (Exception, SystemExit) as error:
            return f"action {action[:12]!r} raises {type(error).__name__}: {error}"
    return None


def _texts(environment: Any, played: list[_Played]) -> Finding:
    try:
        known = sample_texts(environment)
    except LmrlError as error:
        return Finding("texts", False, str(error))
    seen = [text for one in played for text in one.texts]
    letters = {letter for text in known or [string.printable] for letter in text}
    missing = "".join(sorted({letter for text in seen for letter in text} - letters))
    lacking = f" lack {visible(missing)[:40]!r}" if missing else ""
    if not known:
        begins = "none; without, a model from scratch reads printable ASCII letter by letter"
        return Finding("texts", None, begins + (lacking and f", which{lacking.replace('lack', 'lacks')}"))
    if lacking:
        return Finding("texts", False, lacking.strip())
    words = sorted({word for text in seen for word in text.split()} - {word for text in known for word in text.split()})
    others = f", but not all words, so use model.tokenizer=char: {visible(' '.join(words))[:40]!r}" if words else ""
    return Finding("texts", True, f"cover the letters of {counted(len(played), 'episode')}{others}")


def _speed(played: list[_Played]) -> Finding:
    steps = sum(len(one.rewards) for one in played)
    each = sum(one.seconds for one in played) / max(steps, 1)
    return Finding(
        "speed",
        True if each < 0.1 else None,
        f"{each * 1000:.3g} ms per step" + ("" if each < 0.1 else ": rollouts wait for it"),
    )
