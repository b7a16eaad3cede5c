"""The other side of a game: a scripted player, a model that is loaded here, or one at an address."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

from lmrl.coroutines import run
from lmrl.engines.base import Completion, Engine, Key, Sampling, before_stop
from lmrl.engines.remote import check_address, is_address
from lmrl.environments.calls import call_player
from lmrl.environments.games import Answer, Game
from lmrl.errors import EndpointError, RecipeError, did_you_mean
from lmrl.openai_client import OpenAIClient
from lmrl.plugins.foreign import CallTimedOut
from lmrl.recipe.opponent import SELF, Opponent
from lmrl.run_folders import checkpoint_of
from lmrl.secrets import redact
from lmrl.seeding import key, stream
from lmrl.trajectories.recorder import Recorder
from lmrl.trajectories.render import Renderer
from lmrl.trajectories.trajectory import Messages, Trajectory, as_messages


class ContextFull(Exception):
    """A game has outgrown the context of the player to move."""


class Side:
    """One side of one game. `answer` may be called in turn only."""

    async def answer(self, game: Game, observation: str | Messages, limit: float | None = None) -> str:
        """The action. limit: seconds that a scripted player may take; `timeout` and `retries` limit an address. Raises
        ContextFull if the game no longer fits its context, never on its first turn."""
        raise NotImplementedError


class Party:
    """The player of the other side, in any number of games."""

    engine: Engine | None = None
    """The engine that samples its actions, if it is a model that is loaded here."""

    def side(self, name: Key) -> Side:
        """A side of a new game. name: of its random stream."""
        raise NotImplementedError


class ScriptedParty(Party):
    def __init__(self, player: str):
        self.player = player

    def side(self, name: Key) -> Side:
        return ScriptedSide(self.player, stream(*name, self.player))


class ScriptedSide(Side):
    def __init__(self, player: str, rng: Any):
        self.player, self.rng = player, rng

    async def answer(self, game: Game, observation: str | Messages, limit: float | None = None) -> str:
        return call_player(game, self.player, self.rng, limit)


class ModelParty(Party):
    """A model that is loaded here, once for all games; those that wait at the same time are answered in one batch."""

    def __init__(self, options: Opponent, chat: bool, history: int | str):
        """chat, history: what a side sees, as for the policy that is trained."""
        from lmrl.accelerators import default_device
        from lmrl.engines.hf import HFEngine
        from lmrl.policy.load import open_policy

        self.policy = open_policy(checkpoint_of(options.player, options.checkpoint, "task.opponent"))
        self.policy.to(default_device())
        self.engine: Engine = HFEngine(self.policy)
        self.options, self.history = options, history
        self.renderer = Renderer(self.policy.tokenizer, chat if options.chat is None else options.chat)
        if options.system is not None and not self.renderer.chat:
            raise RecipeError(
                "task.opponent.system is a message, but this model gets plain text: set task.opponent.chat=true"
            )

    def side(self, name: Key) -> Side:
        return ModelSide(self, name)


class ModelSide(Side):
    def __init__(self, party: ModelParty, name: Key):
        self.party, self.name, self.turn = party, name, 0
        self.recorder = Recorder(Trajectory([], "", ""), party.renderer, party.history)

    async def answer(self, game: Game, observation: str | Messages, limit: float | None = None) -> str:
        party, options = self.party, self.party.options
        if not self.turn and options.system is not None:
            observation = [{"role": "system", "content": options.system}, *as_messages(observation)]
        context = self.recorder.observe(observation)
        positions = party.policy.max_length
        if self.turn and positions is not None and len(context) + options.max_new_tokens > positions:
            raise ContextFull(f"opponent has {positions} positions, and the game has outgrown them")
        sampling = Sampling(options.max_new_tokens, options.temperature, stop=tuple(options.stop))
        done: Completion = await party.engine.generate(context, sampling, (*self.name, self.turn))
        self.turn += 1
        text = before_stop(party.policy.decode(done.tokens), options.stop)
        self.recorder.act(text, done.tokens, done.logprobs, cut=done.finish_reason == "length")
        return text


class AddressParty(Party):
    """A model at an OpenAI-compatible address, called by chat completions."""

    def __init__(self, options: Opponent):
        check_address(options.player)
        url, _, model = options.player.partition("#")
        names = ("key_env", "timeout", "retries", "connections", "requests_per_minute", "cache")
        self.client = OpenAIClient(url, model or None, **{name: getattr(options, name) for name in names})
        self.options = options

    def side(self, name: Key) -> Side:
        return AddressSide(self, name)


class AddressSide(Side):
    def __init__(self, party: AddressParty, name: Key):
        self.party, self.name, self.turn = party, name, 0
        system = party.options.system
        self.messages: Messages = [] if system is None else [{"role": "system", "content": system}]

    async def answer(self, game: Game, observation: str | Messages, limit: float | None = None) -> str:
        options = self.party.options
        self.messages += as_messages(observation)
        settings: dict[str, Any] = {"max_tokens": options.max_new_tokens, "temperature": options.temperature}
        settings |= {"stop": options.stop} if options.stop else {}
        seed = key(*self.name, self.turn) % 2**31
        found = await self.party.client.chat_async(self.messages, seed=seed, **settings)
        if found.message.get("content") is None:  # refused, or all tokens spent on thoughts: not an empty move
            raise EndpointError(f"{self.party.client.name} answered without text (finish_reason={found.finish_reason})")
        self.turn += 1
        text = before_stop(found.text, options.stop)
        self.messages.append({"role": "assistant", "content": text})
        return text


def opponent_failure(error: BaseException) -> str:
    """The failure of an episode whose opponent gave no answer."""
    if isinstance(error, CallTimedOut):
        return f"opponent {error}"
    return redact(f"opponent raised {type(error).__name__}: {error}")


def build_party(section: Any, game: Game) -> Party | None:
    """The opponent of a recipe's `task` section; None: the policy itself. Models and addresses are opened once until
    `forget_parties`."""
    options = section.opponent or Opponent(player=SELF)
    if options.player in game.players and options.player != SELF:
        return ScriptedParty(options.player)
    if options.player == SELF:
        return None
    if is_address(options.player):
        return _address_party(options.model_dump_json())
    if "/" not in options.player and not options.player.startswith(("~", ".")):
        known = (SELF, *game.players)
        raise RecipeError(
            f"task.opponent: the game has no player '{options.player}'{did_you_mean(options.player, known)} "
            "(a model's folder is named with its path, ./NAME)"
        )
    return _model_party(options.model_dump_json(), section.chat, section.history)


@cache
def _address_party(options: str) -> AddressParty:
    return AddressParty(Opponent.model_validate_json(options))


@cache
def _model_party(options: str, chat: bool, history: int | str) -> ModelParty:
    return ModelParty(Opponent.model_validate_json(options), chat, history)


def forget_parties() -> None:
    """Open models and addresses again, when they are next named."""
    _address_party.cache_clear()
    _model_party.cache_clear()


def against_other(section: Any) -> Any:
    """A task's section for evaluation: a self-play game is played against `opponent_in_evaluation`, or else a scripted
    player, `random` if there is one, because what all sides earn together says nothing about the policy."""
    if not hasattr(section, "opponent"):
        return section
    if section.opponent_in_evaluation is not None:
        return section.model_copy(update={"opponent": section.opponent_in_evaluation, "opponent_in_evaluation": None})
    if section.opponent is not None and section.opponent.player != SELF:
        return section
    from lmrl.environments import GameEnvironment, environment_factory

    environment = environment_factory(section)()
    if not isinstance(environment, GameEnvironment):
        return section
    players = environment.players
    if not players:
        raise RecipeError(
            f"task.opponent_in_evaluation: '{section.environment}' has no scripted player that the policy could be scored against: "
            "name an opponent (a model's folder, an address), or leave evaluation out, evaluation.suite=null"
        )
    return section.model_copy(update={"opponent": Opponent(player="random" if "random" in players else players[0])})


_turns = threading.Lock()


def new_opponent(section: Any, game: Game) -> NewOpponent | None:
    """For GameEnvironment: makes the other side of a new game; None: the same player plays all sides."""
    opponent = getattr(section, "opponent", None)
    return None if opponent is None or opponent.player == SELF else NewOpponent(section, game)


@dataclass
class NewOpponent:
    """Makes the other side of a new game, from its number and the seed, for synchronous code."""

    section: Any
    game: Game

    def __call__(self, number: int, seed: int) -> Answer:
        party = build_party(self.section, self.game)
        assert party is not None  # not `self`
        return partial(_answer, party.side((seed, "opponent", number)), self.section.call_timeout)


def _answer(side: Side, limit: float | None, game: Game, observation: str | Messages) -> str:
    with _turns:  # an engine belongs to one event loop at a time
        return run(side.answer(game, observation, limit))
