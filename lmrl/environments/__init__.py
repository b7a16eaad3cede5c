"""Text environments: gymnasium environments whose observations and actions are strings."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from lmrl.environments.base import TextEnvironment, check_extras, limits_of, sample_texts, version_of
from lmrl.environments.games import Game, GameEnvironment, check_game
from lmrl.errors import LmrlError, PluginError
from lmrl.plugins import registry
from lmrl.plugins.foreign import foreign
from lmrl.secrets import expand

ADAPTERS = {
    "gymnasium": "lmrl.environments.gymnasium_text:GymnasiumText",
    "reasoning_gym": "lmrl.environments.reasoning:ReasoningGym",
    "openenv": "lmrl.environments.openenv:OpenEnvText",
    "textarena": "lmrl.environments.textarena_games:make",
    "verifiers": "lmrl.environments.verifiers_tasks:VerifiersTasks",
}
"""Adapters for environments of other libraries, by the name before the colon."""

__all__ = [
    "Game",
    "GameEnvironment",
    "TextEnvironment",
    "environment_factory",
    "limits_of",
    "sample_texts",
    "version_of",
]


def environment_factory(task: Any) -> Callable[[], Any]:
    """A function that makes one environment of a recipe's `task` section; a game is wrapped with its opponent, see
    GameEnvironment."""
    name, options = adapted(task.environment, expand(task.options, "task"))
    cls = registry.load("environment", name, "task.environment")
    players = [key for key in ("opponent", "opponent_in_evaluation") if getattr(task, key, None) is not None]
    if "opponent" in players and isinstance(cls, type) and not issubclass(cls, Game):
        players.remove("opponent")  # it is the environment's own option
        options = options | {"opponent": task.opponent.player}
    make = partial(_make, cls, task.environment, options)
    try:
        environment = make()
    except LmrlError:
        raise
    except (Exception, SystemExit) as error:
        reason = f"{type(error).__name__}: {error}"
        raise PluginError(
            f"task: environment '{task.environment}' cannot be made with these options: {reason}"
        ) from error
    check_extras(environment)
    if isinstance(environment, Game):
        check_game(environment, task.environment)
        return partial(_as_environment, make, task)
    if players:
        raise PluginError(f"task.{players[0]}: '{task.environment}' is not a game of several players: leave it out")
    for method in ("reset", "step"):
        if not callable(getattr(environment, method, None)):
            raise PluginError(
                f"task.environment: '{task.environment}' has no {method}(): it is not a gymnasium environment"
            )
    return make


def adapted(name: str, options: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The class that plays an environment of another library, named LIBRARY:ID, and its options; any other name is
    returned as it is."""
    library, colon, id = name.partition(":")
    return (ADAPTERS[library], options | {"id": id}) if colon and library in ADAPTERS else (name, options)


def _as_environment(make: Callable[[], Any], task: Any) -> GameEnvironment:
    from lmrl.rollouts.parties import new_opponent  # imports models and endpoints, which not every game needs

    game = make()
    return GameEnvironment(game, new_opponent(task, game))


def _make(cls: type, name: str, options: dict[str, Any]) -> Any:
    with foreign(f"environment {name}"):
        return cls(**options)
