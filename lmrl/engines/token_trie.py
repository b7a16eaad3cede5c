"""The actions that an engine may sample, as a trie of tokens: after each token, which ones may follow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from lmrl.errors import DataError
from lmrl.trajectories.allowed import AllowedTokens


@dataclass(eq=False)
class Node:
    """What has been sampled so far. An action is complete where nothing can follow."""

    children: dict[int, Node] = field(default_factory=dict)
    allowed: AllowedTokens = ()
    """Tokens that may follow, in ascending order."""
    text: str | None = None
    """The action, if it is complete."""

    @property
    def complete(self) -> bool:
        return not self.children


class TokenTrie:
    """Actions by their tokens. Each has a single tokenization, so its probability is the product of its tokens'."""

    def __init__(self, actions: Mapping[str, Sequence[int]]):
        """actions: the tokens of each text, including those that end a turn.

        Raises DataError if there are none, or if two cannot be told apart: because their tokens are the same, or
        because one is the beginning of the other.
        """
        if not actions:
            raise DataError("no action is allowed")
        self.root = Node()
        self.longest = max(map(len, actions.values()))
        """Tokens of the longest action."""
        for text, tokens in actions.items():
            node = self.root
            for token in tokens:
                if node.text is not None:
                    raise _alike(node.text, text)
                node = node.children.setdefault(token, Node())
            if node.text is not None or node.children or node is self.root:
                raise _alike(_text_below(node), text)
            node.text = text
        _fill(self.root)

    def text(self, tokens: Sequence[int]) -> str:
        """The action that these tokens spell."""
        node = self.root
        for token in tokens:
            node = node.children[token]
        assert node.text is not None, "the action is not complete"
        return node.text


def _fill(node: Node) -> None:
    stack = [node]
    while stack:
        node = stack.pop()
        node.allowed = tuple(sorted(node.children))
        stack += node.children.values()


def _text_below(node: Node) -> str:
    while node.text is None and node.children:
        node = next(iter(node.children.values()))
    return node.text or ""


def _alike(one: str, other: str) -> DataError:
    return DataError(
        f"the allowed actions {one!r:.40} and {other!r:.40} cannot be told apart by their tokens: one is the other's beginning, or "
        "the same"
    )
