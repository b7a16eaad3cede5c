"""The sampler: plays episodes of a task, each in its own coroutine: reset, generate, step, until it ends."""

from __future__ import annotations

import asyncio
import math
import numbers
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

from lmrl import distributed
from lmrl.agents.play import play_agents
from lmrl.coroutines import run, watched
from lmrl.engines.base import Completion, Engine, Sampling
from lmrl.engines.token_trie import TokenTrie
from lmrl.foreign import CallTimedOut, foreign
from lmrl.rewards.early import EarlyScores
from lmrl.rollouts.allowed_actions import ActionTries, allowed_actions
from lmrl.rollouts.step_threads import StepThreads
from lmrl.rollouts.task import Task
from lmrl.secrets import redact
from lmrl.seeding import key, stream
from lmrl.trajectories.allowed import AllowedTokens
from lmrl.trajectories.recorder import Recorder
from lmrl.trajectories.trajectory import Trajectory, transcript


@dataclass
class Action:
    tokens: list[int]
    logprobs: list[float] | None
    text: str
    finish_reason: Literal["eos", "stop", "length"]
    allowed: Sequence[AllowedTokens | None] = ()
    """What each token was chosen from, if the environment restricts actions."""


@dataclass
class _Episode:
    """An episode in progress."""

    environment: Any
    name: tuple[int | str, ...]
    trajectory: Trajectory
    recorder: Recorder
    observation: Any = ""
    metrics: dict[str, float | None] = field(default_factory=dict)
    """Of the last step."""
    turn: int = 0
    over: bool = False
    allowed: TokenTrie | None = None
    """The actions to choose from now (None: any)."""

    def fail(self, error: BaseException) -> None:
        self.over = True
        self.trajectory.reward = None
        self.trajectory.failure = failure_text(error)


Act = Callable[[_Episode, list[int]], Awaitable[Action]]
"""Chooses the action that answers an episode's context."""


class Sampler:
    """Plays a task. Actions come from an engine, or from a scripted player of the environment."""

    def __init__(self, task: Task, engine: Engine | None = None, decode: Any = None, deterministic: bool = True):
        """decode: turns sampled tokens into text without special tokens. deterministic: the engine waits for every step of an
        environment, so that the order of computation does not depend on how long steps take; otherwise episodes overtake each other."""
        self.task, self.samples_from, self.decode, self.deterministic = task, engine, decode, deterministic
        self.environments: list[Any] = []  # kept between plays: building one may be slow, resetting one is not
        self.threads = StepThreads(task.workers) if task.workers else None
        self.tries = ActionTries(task.renderer) if task.allowed_actions else None

    @property
    def engine(self) -> Engine:
        """The engine that chooses actions. Not for a sampler of scripted players alone."""
        assert self.samples_from is not None, "the sampler has no engine"
        return self.samples_from

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
        if self.task.agent is not None:
            played = play_agents(self.task.agent, self.engine, starts, samples, sampling, name, shared, first)
            self.task.judge(played)
            return played
        low, high = distributed.shard_bounds(len(starts)) if shared else (0, len(starts))
        episodes = self._new_episodes(starts[low:high], samples, name, first + low)

        async def act(episode: _Episode, context: list[int]) -> Action:
            name = (*episode.name, episode.turn)
            completion = await self.engine.generate(context, sampling, name, allowed=episode.allowed)
            versions = [one for one in (completion.version, episode.trajectory.version) if one is not None]
            episode.trajectory.version = min(versions, default=None)
            text = self._text(completion, sampling)
            if episode.allowed is not None:
                text = episode.allowed.text(completion.tokens)
            return Action(completion.tokens, completion.logprobs, text, completion.finish_reason, completion.allowed)

        early = EarlyScores(self.task.rewards, len(episodes)) if self.task.judged_by == "reward" else None
        if not self.engine.weights_pinned:
            self.engine.refresh()
        self.engine.forget()  # a resumed run would not have it
        self.engine.keeps = self.task.history == "all" and self.task.max_turns > 1
        try:
            run(self._play_all(episodes, act, sampling.max_new_tokens, early))
        finally:
            self.engine.forget()
        for episode in episodes:
            if episode.trajectory.version is None:
                episode.trajectory.version = self.engine.syncs
        return self._judged(episodes, early)

    def play_scripted(self, player: str, starts: Sequence[int | None], name: tuple[int | str, ...]) -> list[Trajectory]:
        """Play one episode from every start state with a scripted player of the environment."""
        episodes = self._new_episodes(starts, 1, name)
        streams = {id(episode): stream(*episode.name, player) for episode in episodes}

        async def act(episode: _Episode, context: list[int]) -> Action:
            rng = streams[id(episode)]
            text = await self._call(lambda limit: call_player(episode.environment, player, rng, limit))
            return Action(self.task.renderer.action(text), None, text, "eos")

        for episode in episodes:
            episode.trajectory.player = player
        run(self._play_all(episodes, act))
        return self._judged(episodes)

    # ---------------------------------------------------------------------------------------------------- all episodes
    def _new_episodes(
        self, starts: Sequence[int | None], samples: int, name: tuple[int | str, ...], first: int = 0
    ) -> list[_Episode]:
        """first: number of the first group."""
        episodes: list[_Episode] = []
        for group, start in enumerate(starts, start=first):
            for sample in range(samples):
                number = group * samples + sample
                trajectory = Trajectory([], "", "", group=group, episode=number)
                # Episodes of a group share their start state, so it is drawn from the group's seed.
                trajectory.seed, trajectory.start = key(*name, "start", group) % 2**31, start
                if len(episodes) == len(self.environments):
                    self.environments.append(self.task.make())
                recorder = Recorder(trajectory, self.task.renderer, self.task.history)
                episodes.append(_Episode(self.environments[len(episodes)], (*name, number), trajectory, recorder))
        return episodes

    async def _play_all(
        self,
        episodes: list[_Episode],
        act: Act,
        max_new_tokens: int = 0,
        early: EarlyScores | None = None,
    ) -> None:
        groups: dict[int, list[Trajectory]] = {}
        for episode in episodes:
            groups.setdefault(episode.trajectory.group, []).append(episode.trajectory)
        left = {group: len(members) for group, members in groups.items()}

        def columns() -> list[str]:
            return list(dict.fromkeys(name for episode in episodes for name in episode.trajectory.columns))

        async def play(episode: _Episode) -> None:
            await self._play(episode, act, max_new_tokens)
            group = episode.trajectory.group
            left[group] -= 1
            if early is not None and not left[group]:
                early.add(groups[group], columns)

        async def everything() -> None:
            await asyncio.gather(*map(play, episodes))
            if early is not None:
                await early.finish(columns)

        try:
            await watched(everything(), lambda: self.engine.check() if self.samples_from is not None else None)
        finally:
            if self.threads is not None:
                self.threads.close()

    def _judged(self, episodes: list[_Episode], early: EarlyScores | None = None) -> list[Trajectory]:
        for place, episode in enumerate(episodes):
            if episode.trajectory.failure:  # an environment that failed is not trusted again
                self.environments[place] = self.task.make()
        trajectories = [episode.trajectory for episode in episodes]
        self.task.judge(trajectories, early)
        return trajectories

    # ----------------------------------------------------------------------------------------------------- one episode
    async def _play(self, episode: _Episode, act: Act, max_new_tokens: int) -> None:
        context: list[int] = []
        with self._waited_for():
            await self._begin(episode)
            if not episode.over:
                context = episode.recorder.observe(episode.observation)
        while not episode.over:
            try:
                action = await act(episode, context)
            except CallTimedOut as error:  # a scripted player
                episode.fail(error)
                break
            with self._waited_for():
                await self._step(episode, action)
                if not episode.over:
                    context = episode.recorder.observe(episode.observation)
                    if not self._fits(len(context) + max_new_tokens):
                        episode.over = True
                        episode.trajectory.metrics = episode.metrics
                        episode.recorder.stop()
        episode.trajectory.completion = transcript(episode.trajectory.turns)

    def _waited_for(self) -> AbstractContextManager[None]:
        """Inside, an episode is between two requests, and the engine waits for it, unless episodes may overtake each other."""
        return self.engine.held() if self.samples_from is not None and self.deterministic else nullcontext()

    def _fits(self, tokens: int) -> bool:
        """False if an episode has grown longer than the model can see: it is truncated then."""
        return self.task.positions is None or tokens <= self.task.positions or self.samples_from is None

    async def _begin(self, episode: _Episode) -> None:
        trajectory = episode.trajectory
        try:
            episode.observation, info = await self._call(
                lambda limit: begin_episode(episode.environment, trajectory.seed, trajectory.start, limit)
            )
            trajectory.columns = info.get("columns", {})
            episode.allowed = await self._allowed(episode)
        except (Exception, SystemExit) as error:
            episode.fail(error)

    async def _step(self, episode: _Episode, action: Action) -> None:
        trajectory = episode.trajectory
        cut = action.finish_reason == "length"
        episode.recorder.act(action.text, action.tokens, action.logprobs, cut=cut, allowed=action.allowed)
        try:
            observation, reward, terminated, truncated, metrics = await self._call(
                lambda limit: take_step(episode.environment, action.text, limit)
            )
        except (Exception, SystemExit) as error:
            episode.fail(error)
            return
        trajectory.place_reward(reward, episode.turn)
        trajectory.reward += reward
        episode.turn += 1
        episode.observation = observation
        episode.metrics = metrics
        if terminated or truncated or episode.turn >= self.task.max_turns:
            episode.over = True
            trajectory.metrics = metrics
            if not terminated:
                episode.recorder.truncate(observation)
            return
        try:
            episode.allowed = await self._allowed(episode)
        except (Exception, SystemExit) as error:
            episode.fail(error)

    async def _allowed(self, episode: _Episode) -> TokenTrie | None:
        """The actions that the environment allows now, for an engine that samples."""
        if self.tries is None or self.samples_from is None:
            return None
        actions = await self._call(lambda limit: allowed_actions(episode.environment, limit))
        return None if actions is None else self.tries.of(actions)

    async def _call(self, work: Callable[[float | None], Any]) -> Any:
        """Call an environment: here, where it is interrupted at the limit it is given; or in a thread, where it is left
        behind then."""
        if self.threads is None:
            return work(self.task.call_timeout)
        return await self.threads.run(lambda: work(None), self.task.call_timeout)

    def _text(self, completion: Completion, sampling: Sampling) -> str:
        text: str = self.decode(completion.tokens)
        if completion.finish_reason == "stop":
            cuts = [text.find(stop) for stop in sampling.stop if stop in text]
            text = text[: min(cuts)] if cuts else text
        return text


def call_player(environment: Any, player: str, rng: Any, limit: float | None = None) -> str:
    """The action of a scripted player."""
    with foreign("the environment", limit):
        action: str = environment.act(player, rng)
    return action


def begin_episode(
    environment: Any, seed: int | None, start: int | None, limit: float | None = None
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
) -> tuple[Any, float, bool, bool, dict[str, float | None]]:
    """A step of an environment, checked: observation, reward, terminated, truncated, metrics."""
    with foreign("the environment", limit):
        result = environment.step(action)
    observation, reward, terminated, truncated, info = unpacked(
        "step", result, ("observation", "reward", "terminated", "truncated", "info")
    )
    observation, reward = check_text(observation), checked_reward(reward)
    terminated, truncated = checked_flag("terminated", terminated), checked_flag("truncated", truncated)
    metrics: dict[str, float | None] = {name: float(value) for name, value in info.get("metrics", {}).items()}
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


def unpacked(method: str, result: Any, names: tuple[str, ...]) -> tuple[Any, ...]:
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
