"""The sampler: plays episodes of a task with an engine, all episodes side by side."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lmrl import distributed
from lmrl.engines.base import Completion, Engine, Sampling
from lmrl.foreign import CallTimedOut, foreign
from lmrl.rollouts.task import Task
from lmrl.secrets import redact
from lmrl.seeding import key, stream
from lmrl.trajectories.recorder import Recorder
from lmrl.trajectories.trajectory import Trajectory, transcript


@dataclass
class _Episode:
    """An episode under way."""

    environment: Any
    name: tuple[int | str, ...]
    trajectory: Trajectory
    recorder: Recorder
    observation: Any = ""
    turn: int = 0
    over: bool = False

    def fail(self, error: BaseException) -> None:
        self.over = True
        self.trajectory.reward = None
        self.trajectory.failure = failure_text(error)


class Sampler:
    """Plays a task. Actions come from an engine, or from a scripted player of the environment."""

    def __init__(self, task: Task, engine: Engine | None = None, decode: Any = None):
        """decode: from sampled tokens to text, special tokens left out."""
        self.task, self.engine, self.decode = task, engine, decode
        self.environments: list[Any] = []  # kept between plays: building one may be slow, resetting one is not

    def play(
        self,
        starts: Sequence[int | None],
        samples: int,
        sampling: Sampling,
        name: tuple[int | str, ...],
        shared: bool = False,
        first: int = 0,
    ) -> list[Trajectory]:
        """Play `samples` episodes from every start state and judge them. `name` names the random stream.

        shared: play and return this process's share of the start states alone; numbers and streams are those of one process.
        first: number of the first start state, of several plays that are to be as one.
        """
        low, high = distributed.shard_bounds(len(starts)) if shared else (0, len(starts))
        episodes = self._begin(starts[low:high], samples, name, first + low)
        while active := [episode for episode in episodes if not episode.over]:
            contexts = [episode.recorder.observe(episode.observation) for episode in active]
            keys = [(*episode.name, episode.turn) for episode in active]
            completions = self.engine.complete(contexts, sampling, keys)
            for episode, completion in zip(active, completions, strict=True):
                text = self._text(completion, sampling)
                self._act(episode, completion.tokens, completion.logprobs, text, completion.finish_reason)
        for episode in episodes:
            episode.trajectory.version = self.engine.syncs
        return self._finish(episodes)

    def play_scripted(self, player: str, starts: Sequence[int | None], name: tuple[int | str, ...]) -> list[Trajectory]:
        """Play one episode from every start state with a scripted player of the environment."""
        episodes = self._begin(starts, 1, name)
        for episode in episodes:
            rng = stream(*episode.name, player)
            episode.trajectory.player = player
            while not episode.over:
                episode.recorder.observe(episode.observation)
                try:
                    with foreign("the environment", self.task.call_timeout):
                        text = episode.environment.act(player, rng)
                except CallTimedOut as error:
                    episode.fail(error)
                    break
                self._act(episode, self.task.renderer.action(text), None, text, "eos")
        return self._finish(episodes)

    # ----------------------------------------------------------------------------------------------------- one episode
    def _begin(
        self, starts: Sequence[int | None], samples: int, name: tuple[int | str, ...], first: int = 0
    ) -> list[_Episode]:
        """first: number of the first group."""
        episodes: list[_Episode] = []
        for group, start in enumerate(starts, start=first):
            for sample in range(samples):
                number = group * samples + sample
                trajectory = Trajectory([], "", "", group=group, episode=number)
                if len(episodes) == len(self.environments):
                    self.environments.append(self.task.make())
                recorder = Recorder(trajectory, self.task.renderer, self.task.history)
                environment = self.environments[len(episodes)]
                episode = _Episode(environment, (*name, number), trajectory, recorder)
                # Episodes of a group begin alike: a start state that is drawn is drawn from the group's own seed.
                seed = key(*name, "start", group) % 2**31
                trajectory.seed, trajectory.start = seed, start
                try:
                    episode.observation, info = begin_episode(episode.environment, seed, start, self.task.call_timeout)
                    trajectory.columns = info.get("columns", {})
                except (Exception, SystemExit) as error:
                    episode.fail(error)
                episodes.append(episode)
        return episodes

    def _act(self, episode: _Episode, tokens: list[int], logprobs: list[float] | None, text: str, end: str) -> None:
        trajectory = episode.trajectory
        episode.recorder.act(text, tokens, logprobs, cut=end == "length")
        try:
            observation, reward, terminated, truncated, metrics = take_step(
                episode.environment, text, self.task.call_timeout
            )
        except (Exception, SystemExit) as error:
            episode.fail(error)
            return
        trajectory.place_reward(reward, episode.turn)
        trajectory.reward += reward
        episode.turn += 1
        episode.observation = observation
        if terminated or truncated or episode.turn >= self.task.max_turns:
            episode.over = True
            trajectory.metrics = metrics
            if not terminated:
                episode.recorder.truncate(observation)

    def _finish(self, episodes: list[_Episode]) -> list[Trajectory]:
        trajectories = [episode.trajectory for episode in episodes]
        for place, episode in enumerate(episodes):
            episode.trajectory.completion = transcript(episode.trajectory.turns)
            if episode.trajectory.failure:  # an environment that failed is not trusted again
                self.environments[place] = self.task.make()
        self.task.judge(trajectories)
        return trajectories

    def _text(self, completion: Completion, sampling: Sampling) -> str:
        text = self.decode(completion.tokens)
        if completion.finish_reason == "stop":
            cuts = [text.find(stop) for stop in sampling.stop if stop in text]
            text = text[: min(cuts)] if cuts else text
        return text


def begin_episode(
    environment: Any, seed: int, start: int | None, limit: float | None = None
) -> tuple[Any, dict[str, Any]]:
    """An environment's first observation, checked, and its info. start: number of the start state (None: drawn by the seed).

    limit: seconds that the call may take.
    """
    options = None if start is None else {"start": start}
    with foreign("the environment", limit):
        result = environment.reset(seed=seed, options=options)
    observation, info = unpacked("reset", result, ("observation", "info"))
    return check_text(observation), info


def take_step(
    environment: Any, action: str, limit: float | None = None
) -> tuple[Any, float, bool, bool, dict[str, float]]:
    """A step of an environment, checked: observation, reward, terminated, truncated, metrics."""
    with foreign("the environment", limit):
        result = environment.step(action)
    observation, reward, terminated, truncated, info = unpacked(
        "step", result, ("observation", "reward", "terminated", "truncated", "info")
    )
    observation, reward = check_text(observation), checked_reward(reward)
    terminated, truncated = checked_flag("terminated", terminated), checked_flag("truncated", truncated)
    metrics = {name: float(value) for name, value in info.get("metrics", {}).items()}
    return observation, reward, terminated, truncated, metrics


def failure_text(error: BaseException) -> str:
    if isinstance(error, CallTimedOut):
        return f"environment {error}"
    return redact(f"environment raised {type(error).__name__}: {error}")


def check_text(observation: Any) -> Any:
    """Observations are text; a prompt may also be a list of messages."""
    if not isinstance(observation, str | list):
        raise TypeError(f"the observation is a {type(observation).__name__}, expected text")
    return observation


def unpacked(method: str, result: Any, names: tuple[str, ...]) -> tuple:
    """The values that an environment's method returned, checked for their number."""
    if not isinstance(result, tuple | list) or len(result) != len(names):
        count = f"{len(result)} values" if isinstance(result, tuple | list) else f"a {type(result).__name__}"
        old = (
            " (older gym returns four: its `done` is `terminated` here)"
            if method == "step" and len(names) - 1 == _len(result)
            else ""
        )
        raise TypeError(f"{method}() returned {count}; expected {', '.join(names)}{old}")
    if not isinstance(result[-1], dict):
        raise TypeError(f"{method}() returned the info {result[-1]!r:.60}; expected an object")
    return tuple(result)


def _len(result: Any) -> int:
    return len(result) if isinstance(result, tuple | list) else 0


def checked_reward(value: Any) -> float:
    value = _plain(value)
    if not isinstance(value, numbers.Real):
        raise TypeError(f"step() returned the reward {value!r:.60} ({type(value).__name__}); expected a number")
    if not math.isfinite(value):
        raise ValueError(f"step() returned the reward {value}")
    return float(value)


def checked_flag(name: str, value: Any) -> bool:
    value = _plain(value)
    if not isinstance(value, bool | int) or value not in (0, 1):
        raise TypeError(f"step() returned {name}={value!r:.60}; expected true or false")
    return bool(value)


def _plain(value: Any) -> Any:
    """A scalar of numpy or torch as a number of Python."""
    return value.item() if hasattr(value, "item") and getattr(value, "ndim", None) == 0 else value
