"""One game of several players: the policy plays its sides, an opponent the others, and each of the policy's sides is a
trajectory."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from lmrl.environments.calls import EpisodeFailed
from lmrl.environments.games import Referee, split_start
from lmrl.rollouts.parties import ContextFull, Side, opponent_failure
from lmrl.trajectories.trajectory import transcript

if TYPE_CHECKING:
    from lmrl.rollouts.sampler import Act, Episode, Sampler


class GamePlay:
    """A running game. sides: the policy's episodes in this game; all sides, or one against an opponent."""

    def __init__(self, sampler: Sampler, sides: list[Episode], act: Act, max_new_tokens: int):
        match = sampler.task.match
        assert match is not None
        self.sampler, self.act, self.max_new_tokens = sampler, act, max_new_tokens
        first = sides[0]
        self.referee = Referee(first.environment)
        self.start, self.seed = first.trajectory.start, first.trajectory.seed or 0
        self.others: dict[int, Side] = {}
        self.party = match.party
        if match.party is not None:
            self.start, first.side = split_start(first.environment, self.start, first.trajectory.group)
            numbers = [number for number in range(match.players) if number != first.side]
            self.others = {number: match.party.side((*first.name, "opponent", number)) for number in numbers}
        self.own = {episode.side: episode for episode in sides}
        self.waiting = dict.fromkeys(self.own, 0.0)
        """What a side earned before its first turn."""
        self.most_moves = sampler.task.max_turns * match.players

    async def play(self) -> None:
        """Play the game to its end. If it or an opponent fails, all its trajectories do."""
        try:
            await self._begin()
            while not self.referee.over and await self._turn():
                pass
            for episode in self.own.values():
                self._end(episode)
        except EpisodeFailed as error:
            for episode in self.own.values():
                episode.fail(str(error))
        for episode in self.own.values():
            trajectory = episode.trajectory
            trajectory.completion = transcript(trajectory.turns)
            trajectory.game = {
                "player": episode.side,
                "start": self.start,
                "moves": [list(move) for move in self.referee.moves],
            }

    async def _begin(self) -> None:
        with self.sampler.waited_for():
            info = await self.sampler.call(lambda limit: self.referee.begin(self.seed, self.start, limit))
        for episode in self.own.values():
            episode.trajectory.columns = info.get("columns", {})

    async def _turn(self) -> bool:
        """The turn of the player to move; False if a limit ends the game."""
        with self.sampler.waited_for():
            player = await self.sampler.call(lambda limit: self.referee.to_move)
            observation = await self.sampler.call(lambda limit: self.referee.observe(player, limit))
            episode = self.own.get(player)
            context = []
            if episode is not None:
                context = episode.recorder.observe(observation)
                if not episode.turn:
                    self.sampler.check_first(context, self.max_new_tokens)
                episode.allowed = await self.sampler.allowed(episode)
        if episode is not None and not self.sampler.fits(len(context) + self.max_new_tokens):
            episode.recorder.stop()
            await self._truncate(but=episode)
            return False
        try:
            action = await (
                self._answer(player, observation) if episode is None else self._own_action(episode, context)
            )
        except ContextFull:
            await self._truncate()
            return False
        with self.sampler.waited_for():
            rewards = await self.sampler.call(lambda limit: self.referee.step(action, limit))
            for side, own in self.own.items():
                self._reward(own, rewards[side])
            if len(self.referee.moves) >= self.most_moves and not self.referee.over:
                self.referee.truncated = True
            if self.referee.truncated and not self.referee.terminated:
                await self._truncate()
        return True

    async def _own_action(self, episode: Episode, context: list[int]) -> str:
        action = await self.act(episode, context)
        cut = action.finish_reason == "length"
        episode.recorder.act(action.text, action.tokens, action.logprobs, cut=cut, allowed=action.allowed)
        episode.turn += 1
        return action.text

    async def _answer(self, player: int, observation: Any) -> str:
        """The opponent's action."""
        with self.sampler.waited_for(by=self.party.engine if self.party is not None else None):
            try:
                return await self.others[player].answer(self.referee.game, observation, self.sampler.task.call_timeout)
            except ContextFull:
                raise
            except (Exception, SystemExit) as error:
                raise EpisodeFailed(opponent_failure(error)) from error

    def _reward(self, episode: Episode, reward: float) -> None:
        if not episode.turn:
            self.waiting[episode.side] += reward
            return
        reward += self.waiting.pop(episode.side, 0.0)
        episode.trajectory.place_reward(reward, episode.turn - 1)
        episode.trajectory.reward = (episode.trajectory.reward or 0.0) + reward

    async def _truncate(self, but: Episode | None = None) -> None:
        """End the game by a limit: each side ends with what it would have seen next."""
        for side, episode in self.own.items():
            if episode.turn and episode is not but:
                observation = await self.sampler.call(partial(self.referee.observe, side))
                episode.recorder.truncate(observation)

    def _end(self, episode: Episode) -> None:
        episode.over = True
        if not episode.trajectory.failure:
            episode.trajectory.metrics = dict(self.referee.metrics_of(episode.side))
            if not episode.turn:  # over before this side had a turn: nothing to train on, but its result counts
                episode.trajectory.reward = self.waiting[episode.side]
