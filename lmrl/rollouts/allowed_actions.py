"""Environments that declare which actions are allowed (`task.allowed_actions`), and their actions as tries of
tokens."""

from __future__ import annotations

from typing import Any

from lmrl.engines.token_trie import TokenTrie
from lmrl.environments.games import lists_actions
from lmrl.errors import PluginError
from lmrl.foreign import foreign
from lmrl.trajectories.render import Renderer

KEPT = 4096
"""Sets of actions whose tries are cached: games allow the same few again and again."""


class ActionTries:
    """Turns allowed actions into tries of the tokens that a renderer closes them with."""

    def __init__(self, renderer: Renderer):
        self.renderer = renderer
        self._known: dict[tuple[str, ...], TokenTrie] = {}

    def of(self, actions: tuple[str, ...]) -> TokenTrie:
        """The trie of these actions. Raises DataError for actions that cannot be told apart by their tokens."""
        trie = self._known.get(actions)
        if trie is None:
            trie = TokenTrie({text: self.renderer.action(text) for text in actions})
            if len(self._known) < KEPT:
                self._known[actions] = trie
        return trie


def allowed_actions(environment: Any, limit: float | None = None) -> tuple[str, ...] | None:
    """The actions that an environment allows next (None: any), checked. limit: seconds that the call may take."""
    with foreign("the environment", limit):
        actions = environment.allowed_actions()
    if actions is None:
        return None
    if isinstance(actions, str) or not all(isinstance(text, str) and text for text in actions) or not len(actions):
        raise TypeError(f"allowed_actions() returned {actions!r:.60}; expected a list of texts, or None for any")
    return tuple(dict.fromkeys(actions))


def check_says_what_is_allowed(environment: Any, name: str) -> None:
    """Raise PluginError for an environment that does not declare which actions are allowed."""
    if not lists_actions(environment):
        raise PluginError(
            f"task.allowed_actions: environment '{name}' has no method allowed_actions(): add it, or leave the key out"
        )
