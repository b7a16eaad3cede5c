"""The sampler: plays episodes of a task, each in its own coroutine: reset, generate, step, until it ends."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from lmrl import distributed
from lmrl.agents.play import play_agents
from lmrl.coroutines import run, watched
from lmrl.engines.base import Completion, Engine, Key, Sampling, before_stop
from lmrl.engines.token_trie import TokenTrie
from lmrl.environments.calls import (
    EpisodeFailed,
    allowed_actions,
    begin_episode,
    call_player,
    failure_text,
    take_step,
)
from lmrl.errors import EndpointError
from lmrl.rewards.early import EarlyScores
from lmrl.rollouts.allowed_actions import ActionTries
from lmrl.rollouts.game_play import GamePlay
from lmrl.rollouts.step_threads import StepThreads
from lmrl.rollouts.task import Task
from lmrl.seeding import key, stream
from lmrl.trajectories.allowed import AllowedTokens
from lmrl.trajectories.recorder import Recorder
from lmrl.trajectories.trajectory import Trajectory, transcript

T = TypeVar("T")


@dataclass
class Action:
    tokens: list[int]
    logprobs: list[float] | None
    text: str
    finish_reason: Literal["eos", "stop", "length"]
    allowed: Sequence[AllowedTokens | None] = ()
    """The tokens each was chosen from, if the environment restricts actions."""


@dataclass
class Episode:
    """An episode in progress."""

    environment: Any
    name: Key
    trajectory: Trajectory
    recorder: Recorder
    observation: Any = ""
    metrics: dict[str, float | None] = field(default_factory=dict)
    """The metrics of the last step."""
    turn: int = 0
    over: bool = False
    allowed: TokenTrie | None = None
    """The actions to choose from now (None: any)."""
    place: int = 0
    """Index of its environment among the sampler's."""
    side: int = 0
    """The player, in a game of several."""

    def fail(self, failure: str) -> None:
        self.over = True
        self.trajectory.reward = None
        self.trajectory.failure = failure


Act = Callable[[Episode, list[int]], Awaitable[Action]]
"""Chooses the action that answers an episode's context."""


class Sampler:
    """Plays a task. Actions come from an engine, or from a scripted player of the environment."""

    def __init__(self, task: Task, engine: Engine | None = None, decode: Any = None, deterministic: bool = True):
        """decode: turns sampled tokens into text without special tokens. deterministic: the engine waits for every step
        of an environment, so that the order of computation does not depend on how long steps take; otherwise episodes
        may overtake each other."""
        self.task, self.samples_from, self.decode, self.deterministic = task, engine, decode, deterministic
        self.environments: list[Any] = []  # kept between plays: building one may be slow, resetting is not
        self.threads = StepThreads(task.workers) if task.workers else None
        self.tries = ActionTries(task.renderer) if task.allowed_actions else None

    @property
    def engine(self) -> Engine:
        """The engine that chooses actions. Not for a sampler that only has scripted players."""
        assert self.samples_from is not None, "the sampler has no engine"
        return self.samples_from

    def play(
        self,
        starts: Sequence[int | None],
        samples: int,
        sampling: Sampling,
        name: Key,
        shared: bool = False,
        first: int = 0,
    ) -> list[Trajectory]:
        """Play `samples` episodes from every start state and judge them. `name` names the random stream.

        shared: play and return only this process's share of the start states; numbers and streams are those of a single
        process.
        first: number of the first start state, if several plays form one.
        """
        if self.task.agent is not None:
            played = play_agents(self.task.agent, self.engine, starts, samples, sampling, name, shared, first)
            self.task.judge(played)
            return played
        low, high = distributed.shard_bounds(len(starts)) if shared else (0, len(starts))
        episodes = self._new_episodes(starts[low:high], samples, name, first + low)

        async def act(episode: Episode, context: list[int]) -> Action:
            name = (*episode.name, episode.turn)
            try:
                completion = await self.engine.generate(context, sampling, name, allowed=episode.allowed)
            except EndpointError as error:
                if error.of_one_request:
                    raise EpisodeFailed(f"endpoint refused a request: {error}") from error
                raise
            versions = [one for one in (completion.version, episode.trajectory.version) if one is not None]
            episode.trajectory.version = min(versions, default=None)
            text = self._text(completion, sampling)
            if episode.allowed is not None:
                text = episode.allowed.text(completion.tokens)
            return Action(completion.tokens, completion.logprobs, text, completion.finish_reason, completion.allowed)

        early = EarlyScores(self.task.rewards, len(episodes)) if self.task.judged_by == "reward" else None
        if not self.engine.weights_pinned:
            self.engine.refresh()
        for engine in self._engines():
            engine.forget()  # a resumed run would not have it
            engine.keeps = self.task.history == "all" and self.task.max_turns > 1
        try:
            run(self._play_all(episodes, act, sampling.max_new_tokens, early))
        finally:
            for engine in self._engines():
                engine.forget()
        for episode in episodes:
            if episode.trajectory.version is None:
                episode.trajectory.version = self.engine.syncs
        return self._judged(episodes, early)

    def play_scripted(self, player: str, starts: Sequence[int | None], name: Key) -> list[Trajectory]:
        """Play one episode from every start state with a scripted player of the environment."""
        episodes = self._new_episodes(starts, 1, name)
        streams = {id(episode): stream(*episode.name, player) for episode in episodes}

        async def act(episode: Episode, context: list[int]) -> Action:
            rng = streams[id(episode)]
            text = await self.call(lambda limit: call_player(episode.environment, player, rng, limit))
            return Action(self.task.renderer.action(text), None, text, "eos")

        for episode in episodes:
            episode.trajectory.player = player
        run(self._play_all(episodes, act))
        return self._judged(episodes)

    # ---------------------------------------------------------------------------------------------------- all episodes
    def _new_episodes(self, starts: Sequence[int | None], samples: int, name: Key, first: int = 0) -> list[Episode]:
        """first: number of the first start state. In a self-play game, each side is an episode, and each side forms its
        own group: the rewards of different sides, even from one start state, have no common mean to compare with."""
        episodes: list[Episode] = []
        sides = self.task.sides
        for group, start in enumerate(starts, start=first):
            for sample in range(samples):
                place = len(episodes) // sides
                if place == len(self.environments):
                    self.environments.append(self.task.make())
                for side in range(sides):
                    number = (group * samples + sample) * sides + side
                    trajectory = Trajectory([], "", "", group=group * sides + side, episode=number)
                    # Episodes of a group share their start state, so it is drawn from the group's seed.
                    trajectory.seed, trajectory.start = key(*name, "start", group) % 2**31, start
                    positions = None if self.samples_from is None else self.task.positions
                    recorder = Recorder(trajectory, self.task.renderer, self.task.history, positions)
                    environment = self.environments[place]
                    episodes.append(Episode(environment, (*name, number), trajectory, recorder, place=place, side=side))
        return episodes

    async def _play_all(
        self,
        episodes: list[Episode],
        act: Act,
        max_new_tokens: int = 0,
        early: EarlyScores | None = None,
    ) -> None:
        groups: dict[int, list[Trajectory]] = {}
        for episode in episodes:
            groups.setdefault(episode.trajectory.group, []).append(episode.trajectory)
        left = {group: len(members) for group, members in groups.items()}

        sides = self.task.sides

        async def play(first: int) -> None:
            episode = episodes[first]
            if self.task.match is not None:
                await GamePlay(self, episodes[first : first + sides], act, max_new_tokens).play()
                return
            await self._play(episode, act, max_new_tokens)
            group = episode.trajectory.group
            left[group] -= 1
            if early is not None and not left[group]:
                early.add(groups[group])

        async def everything() -> None:
            await asyncio.gather(*map(play, range(0, len(episodes), sides)))
            if early is not None:
                await early.finish()

        try:
            await watched(everything(), lambda: self.engine.check() if self.samples_from is not None else None)
        finally:
            if self.threads is not None:
                self.threads.close()

    def _judged(self, episodes: list[Episode], early: EarlyScores | None = None) -> list[Trajectory]:
        for place in {episode.place for episode in episodes if episode.trajectory.failure}:
            self.environments[place] = self.task.make()  # an environment that failed is not trusted again
        trajectories = [episode.trajectory for episode in episodes]
        self.task.judge(trajectories, early)
        return trajectories

    # ----------------------------------------------------------------------------------------------------- one episode
    async def _play(self, episode: Episode, act: Act, max_new_tokens: int) -> None:
        try:
            with self.waited_for():
                await self._begin(episode)
                context = episode.recorder.observe(episode.observation)
                if self.task.longest_prompt is None:  # prompts are known: they are checked before the run
                    self.check_first(context, max_new_tokens)
            while not episode.over:
                action = await act(episode, context)
                with self.waited_for():
                    await self._step(episode, action)
                    if not episode.over:
                        context = episode.recorder.observe(episode.observation)
                        if not self.fits(len(context) + max_new_tokens):
                            episode.over = True
                            episode.trajectory.metrics = episode.metrics
                            episode.recorder.stop()
        except EpisodeFailed as error:
            episode.fail(str(error))
        episode.trajectory.completion = transcript(episode.trajectory.turns)

    def waited_for(self, by: Engine | None = None) -> ExitStack:
        """Inside, an episode is between two requests, and the engines wait for it, unless episodes may overtake each
        other.

        by: the engine that the episode itself waits for.
        """
        held = ExitStack()
        for engine in self._engines() if self.deterministic else ():
            if engine is not by:
                held.enter_context(engine.held())
        return held

    def _engines(self) -> list[Engine]:
        """The policy's engine, and that of an opponent that is a model."""
        party = self.task.match.party if self.task.match is not None else None
        return [engine for engine in (self.samples_from, party.engine if party else None) if engine is not None]

    def fits(self, tokens: int) -> bool:
        """False if an episode exceeds the model's positions, so that it is truncated."""
        return self.task.positions is None or tokens <= self.task.positions or self.samples_from is None

    def check_first(self, context: list[int], max_new_tokens: int) -> None:
        """Raise EpisodeFailed for a first observation that leaves no room for an action."""
        tokens = len(context)
        if not self.fits(tokens + max_new_tokens):
            raise EpisodeFailed(
                f"model has {self.task.positions} positions, but a first observation of {tokens} tokens and "
                f"max_new_tokens={max_new_tokens} need {tokens + max_new_tokens}"
            )

    async def _begin(self, episode: Episode) -> None:
        trajectory = episode.trajectory
        episode.observation, info = await self.call(
            lambda limit: begin_episode(episode.environment, trajectory.seed, trajectory.start, limit)
        )
        trajectory.columns = info.get("columns", {})
        episode.allowed = await self.allowed(episode)

    async def _step(self, episode: Episode, action: Action) -> None:
        trajectory = episode.trajectory
        cut = action.finish_reason == "length"
        episode.recorder.act(action.text, action.tokens, action.logprobs, cut=cut, allowed=action.allowed)
        observation, reward, terminated, truncated, metrics = await self.call(
            lambda limit: take_step(episode.environment, action.text, limit)
        )
        trajectory.place_reward(reward, episode.turn)
        trajectory.reward = (trajectory.reward or 0.0) + reward
        episode.turn += 1
        episode.observation = observation
        episode.metrics = metrics
        if terminated or truncated or episode.turn >= self.task.max_turns:
            episode.over = True
            trajectory.metrics = metrics
            if not terminated:
                episode.recorder.truncate(observation)
            return
        episode.allowed = await self.allowed(episode)

    async def allowed(self, episode: Episode) -> TokenTrie | None:
        """The actions that the environment allows now, for an engine that samples."""
        tries = self.tries
        if tries is None or self.samples_from is None:
            return None

        def choices(limit: float | None) -> TokenTrie | None:
            actions = allowed_actions(episode.environment, limit)
            return None if actions is None else tries.of(actions)

        return await self.call(choices)

    async def call(self, work: Callable[[float | None], T]) -> T:
        """Call an environment: in this thread, where it is interrupted at its time limit; or in another thread, which
        is then abandoned. Raises EpisodeFailed for what it raises."""
        try:
            if self.threads is None:
                return work(self.task.call_timeout)
            return await self.threads.run(lambda: work(None), self.task.call_timeout)
        except (Exception, SystemExit) as error:
            raise EpisodeFailed(failure_text(error)) from error

    def _text(self, completion: Completion, sampling: Sampling) -> str:
        text: str = self.decode(completion.tokens)
        return before_stop(text, sampling.stop) if completion.finish_reason == "stop" else text
