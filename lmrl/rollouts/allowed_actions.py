"""The actions that an environment allows (`task.allowed_actions`), as tries of tokens."""

from __future__ import annotations

from lmrl.engines.token_trie import TokenTrie
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
