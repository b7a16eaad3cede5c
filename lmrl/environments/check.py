"""Checks of an environment before anything is trained on it."""

from __future__ import annotations

import pickle
import string
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from lmrl.environments import environment_factory, limits_of, sample_texts
from lmrl.environments.calls import begin_episode, call_player, take_step
from lmrl.environments.games import GameEnvironment, lists_actions
from lmrl.errors import LmrlError, counted
from lmrl.findings import Finding
from lmrl.recipe import EpisodeLimits
from lmrl.seeding import stream
from lmrl.visible import visible

EPISODES = 20
NONSENSE = ("", "nonsense \x00", "A" * 10_000)
"""Actions that a model might write."""


def check_environment(task: EpisodeLimits, episodes: int = EPISODES) -> Iterator[Finding]:
    """Check the environment of a recipe's `task`. Findings are yielded one by one; a failure that makes the rest
    meaningless is the last."""
    try:
        make = environment_factory(task)
        environment = make()
    except LmrlError as error:
        yield Finding("can be made", False, str(error))
        return
    inner = environment.game if isinstance(environment, GameEnvironment) else environment
    yield Finding("can be made", True, type(inner).__name__)
    yield _picklable(environment)
    try:
        first, _ = begin_episode(environment, 1, None)
        again, _ = begin_episode(environment, 1, None)
    except (Exception, SystemExit) as error:
        yield Finding("reset", False, f"{type(error).__name__}: {error}")
        return
    yield Finding("reset", True, f"begins with {visible(str(first))[:80]!r}")
    yield Finding(
        "the seed decides the start",
        first == again,
        "same seed, same start" if first == again else "same seed, different start",
    )
    yield _starts(environment)
    player = _player(environment)
    try:
        played = [_play(make(), seed, player, task.max_turns) for seed in range(episodes)]
        repeated = _play(make(), 0, player, task.max_turns)
    except (Exception, SystemExit) as error:
        yield Finding("step", False, f"{type(error).__name__}: {error}")
        return
    yield Finding(
        "step", True, f"five values of the right types in {counted(sum(len(one.rewards) for one in played), 'step')}"
    )
    same = repeated.trace == played[0].trace
    yield Finding(
        "the seed decides the episode",
        same,
        "same seed and actions, same episode"
        if same
        else "same seed and actions, different episode: draw from self.np_random",
    )
    if isinstance(environment, GameEnvironment):
        yield _turns(environment.game.num_players, played)
    ended = sum(one.ended for one in played)
    yield Finding(
        "ends by itself",
        True if ended else None,
        f"{ended} of {episodes} episodes, the others after task.max_turns={task.max_turns}",
    )
    returns = [sum(one.rewards) for one in played]
    spread = len(set(returns)) > 1
    yield Finding(
        "rewards differ",
        True if spread else None,
        f"returns of {'random play' if player == 'random' else player} {min(returns):.3g} to {max(returns):.3g}, mean {np.mean(returns):.3g}"
        + ("" if spread else ": if all episodes earn the same, nothing can be learned"),
    )
    yield _within_limits(environment, returns)
    yield from _scripted(make, environment, task)
    yield _odd_actions(make, task, environment)
    yield _texts(environment, played)
    yield _speed(played)


class _Played:
    def __init__(self) -> None:
        self.rewards: list[float] = []
        self.trace: list[Any] = []
        self.texts: list[str] = []
        self.ended, self.seconds = False, 0.0
        self.movers: set[int] = set()
        """Players of a game that had a turn."""


def _player(environment: Any) -> str:
    players = tuple(getattr(environment, "players", ()))
    return "random" if "random" in players else players[0] if players else "texts"


def _play(environment: Any, seed: int, player: str, turns: int) -> _Played:
    played, rng = _Played(), stream("check", seed)
    observation, _ = begin_episode(environment, seed, None)
    words = None
    if player == "texts":
        words = sample_texts(environment) or ["a"]
    for _ in range(turns):
        action = str(rng.choice(words)) if words else call_player(environment, player, rng)
        begun = time.perf_counter()
        after, reward, terminated, truncated, _ = take_step(environment, action)
        played.seconds += time.perf_counter() - begun
        played.rewards.append(reward)
        played.texts += [str(observation), action]
        played.trace.append((observation, action, reward, terminated, truncated, after))
        observation = after
        if terminated or truncated:
            played.ended = True
            break
    if isinstance(environment, GameEnvironment):
        played.movers = {player for player, _ in environment.referee.moves}
    return played


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


def _starts(environment: Any) -> Finding:
    count = getattr(environment, "num_starts", None)
    if count is None:
        return Finding(
            "start states",
            None,
            "drawn by the seed; with `num_starts`, rollouts and evaluation would go through all of them",
        )
    try:
        pairs = [begin_episode(environment, seed, count - 1)[0] for seed in (1, 2)]
    except (Exception, SystemExit) as error:
        return Finding(
            "start states",
            False,
            f"num_starts is {count}, but start {count - 1} raises {type(error).__name__}: {error}",
        )
    same = pairs[0] == pairs[1]
    detail = (
        f"{count} of them"
        if same
        else f"start {count - 1} depends on the seed: reset(options={{'start': i}}) must begin in the i-th"
    )
    return Finding("start states", same, detail)


def _within_limits(environment: Any, returns: list[float]) -> Finding:
    limits = limits_of(environment).get("return")
    if limits is None:
        return Finding(
            "limits of the return",
            None,
            "unknown; `metric_limits = {'return': (LOW, HIGH)}` keeps intervals within them",
        )
    inside = all(limits[0] <= value <= limits[1] for value in returns)
    return Finding("limits of the return", inside, f"{limits}; seen {min(returns):.3g} to {max(returns):.3g}")


def _scripted(make: Any, environment: Any, task: EpisodeLimits) -> Iterator[Finding]:
    players = tuple(getattr(environment, "players", ()))
    if not players:
        yield Finding(
            "scripted players",
            None,
            "none; with `players` and `act`, episodes can be collected and imitated, and scores compared with theirs",
        )
    for player in players:
        try:
            returns = [sum(_play(make(), seed, player, task.max_turns).rewards) for seed in range(5)]
        except (Exception, SystemExit) as error:
            yield Finding(f"player '{player}'", False, f"{type(error).__name__}: {error}")
            continue
        yield Finding(f"player '{player}'", True, f"mean return {np.mean(returns):.3g} in 5 episodes")


def _odd_actions(make: Any, task: EpisodeLimits, environment: Any) -> Finding:
    name = "survives odd actions"
    if task.allowed_actions:
        return Finding(name, None, "not tried: task.allowed_actions=true plays only those that the environment lists")
    raised = raised_by_odd_actions(make)
    if raised is None:
        return Finding(name, True, "empty, odd and very long actions")
    fix = (
        "set task.allowed_actions=true" if lists_actions(environment) else "answer any text, or list allowed_actions()"
    )
    return Finding(name, False, f"{raised}: {fix}")


def raised_by_odd_actions(make: Any) -> str | None:
    """Which odd action an environment does not survive, and what it raises; None: it survives them all."""
    for action in NONSENSE:
        environment = make()
        try:
            begin_episode(environment, 0, None)
            take_step(environment, action)
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
