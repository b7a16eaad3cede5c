"""From text to tokens, with control tokens only where a chat template (or the recipe) put them.

`<|im_end|>` in a prompt, an observation or a tool result is content, and becomes ordinary tokens. Only the
template's own text is searched for special tokens, unless `special_tokens: parse` says that prompts are already
rendered.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Iterable
from functools import cached_property
from itertools import count
from typing import Any, NamedTuple

from lmrl.errors import ModelError
from lmrl.recipe import SpecialTokens
from lmrl.trajectories.trajectory import Messages


class Part(NamedTuple):
    """A piece of text. control: True if special tokens in it become control tokens (otherwise they are spelled out)."""

    text: str
    control: bool


class Encoder:
    """Encodes text and dialogues with a tokenizer.

    special_tokens: `text` spells out the special tokens in content, `parse` makes them control tokens. Text without
    special tokens has the same tokens either way. tools: those that the chat template renders; they are content too.
    """

    def __init__(
        self, tokenizer: Any, special_tokens: SpecialTokens = "text", tools: list[dict[str, Any]] | None = None
    ):
        self.tokenizer, self.parses, self.tools = tokenizer, special_tokens == "parse", tools
        added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
        names = sorted({*map(str, tokenizer.all_special_tokens), *added}, key=lambda name: (-len(name), name))
        self.special = {name: tokenizer.convert_tokens_to_ids(name) for name in names if name}
        pattern = pattern_of(self.special)
        self._exact, self._any_case = re.compile(f"({pattern})"), re.compile(pattern, re.IGNORECASE)

    def content(self, text: str) -> list[Part]:
        """The parts of text from users, environments or models."""
        return [Part(text, self.parses)]

    def without_special(self, text: str) -> str:
        """Text without the special tokens in it."""
        return self._exact.sub("", text)

    def dialogue(self, messages: Messages, open_turn: bool = True) -> list[Part]:
        """Messages through the chat template. open_turn: add the opening of the assistant's turn.

        Raises ModelError if there is no template, or if it fails.
        """
        hidden: dict[str, str] = {}
        tools = self.tools
        if not self.parses and any(map(self._any_case.search, strings([messages, tools]))):
            mark = absent("lmrl", strings([messages, tools]))

            def hide(match: re.Match[str]) -> str:
                stand_in = f"{mark}x{len(hidden)}x"
                hidden[stand_in] = match[0]
                return stand_in

            messages, tools = _replaced([messages, tools], lambda text: self._any_case.sub(hide, text))
        rendered = self._rendered(messages, tools, open_turn)
        if not hidden:
            return [Part(rendered, True)]
        # Odd positions hold placeholders.
        pieces = re.split("(" + "|".join(hidden) + ")", rendered)
        return [Part(hidden[piece], False) if at % 2 else Part(piece, True) for at, piece in enumerate(pieces)]

    def template(self, messages: Messages, open_turn: bool = True) -> str:
        """The chat template's text for messages."""
        return self._rendered(messages, self.tools, open_turn)

    def _rendered(self, messages: Messages, tools: list[dict[str, Any]] | None, open_turn: bool) -> str:
        if not self.tokenizer.chat_template:
            raise ModelError("the prompts are dialogues, but the tokenizer has no chat template")
        tools = next((message["tools"] for message in messages if message.get("tools")), tools)
        messages = [{key: value for key, value in message.items() if key != "tools"} for message in messages]
        try:
            text: str = self.tokenizer.apply_chat_template(
                messages, tools=tools, tokenize=False, add_generation_prompt=open_turn
            )
            return text
        except Exception as error:  # a template may raise anything
            roles = ", ".join(str(message["role"]) for message in messages)
            raise ModelError(
                f"the tokenizer's chat template fails on messages of the roles {roles}: {type(error).__name__}: {error}"
            ) from error

    def encode(self, parts: list[Part], opening: bool = False, max_length: int | None = None) -> list[int]:
        """Tokens of text. opening: with the special tokens that the tokenizer adds at the start (or end) of a text.

        max_length: cut longer texts on the tokenizer's `truncation_side`.
        """
        if not any(self._any_case.search(part.text) for part in parts if not part.control):
            limits = {} if max_length is None else {"truncation": True, "max_length": max_length}
            text = "".join(part.text for part in parts)
            found: list[int] = self.tokenizer(text, add_special_tokens=opening, **limits).input_ids
            return found
        if not self.tokenizer.is_fast:
            return self._encode_in_pieces(parts, opening, max_length)
        ids, leaked = self._literal.encode(parts, opening, max_length)
        if leaked:  # this tokenizer's vocabulary also holds special tokens as words: break these up
            ids, _ = self._literal.encode(self._broken(parts, self._literal.gap), opening, max_length)
        return ids

    def _spelled(self, text: str) -> list[int]:
        spelling = {"add_special_tokens": False, "split_special_tokens": True}
        return self.tokenizer(text, **spelling).input_ids if text else []

    def _broken(self, parts: Iterable[Part], gap: str) -> list[Part]:
        """Parts in which no special token occurs as a whole."""
        part_up = lambda match: match[0][:1] + gap + match[0][1:]  # noqa: E731
        return [part if part.control else Part(self._any_case.sub(part_up, part.text), False) for part in parts]

    @cached_property
    def _literal(self) -> _LiteralTokenizer:
        return _LiteralTokenizer(self.tokenizer, self.special, self._exact)

    def _encode_in_pieces(self, parts: list[Part], opening: bool, max_length: int | None) -> list[int]:
        """For slow (Python) tokenizers: the pieces between control tokens, each by itself."""
        ids, stretch = [], ""
        for part in parts:
            first, *others = self._exact.split(part.text) if part.control else [part.text]
            stretch += first
            for token, following in zip(others[::2], others[1::2], strict=True):
                ids += [*self._spelled(stretch), self.special[token]]
                stretch = following
        ids += self._spelled(stretch)
        # The opening and closing tokens are those that the tokenizer puts around a single letter.
        frame, letter = self.tokenizer("a").input_ids, self.tokenizer("a", add_special_tokens=False).input_ids
        start = next((at for at in range(len(frame)) if frame[at : at + len(letter)] == letter), 0)
        before, after = (frame[:start], frame[start + len(letter) :]) if opening else ([], [])
        if max_length is not None:
            room = max(max_length - len(before) - len(after), 0)
            left = self.tokenizer.truncation_side == "left"
            ids = ids[max(len(ids) - room, 0) :] if left else ids[:room]
        return before + ids + after


class _LiteralTokenizer:
    """A copy of a fast tokenizer that treats special tokens as ordinary text, and placeholders as special tokens.

    The text is tokenized in one piece, so that merges across parts are those of the tokenizer itself. The placeholders
    are drawn at random in every process, so no text can contain them.
    """

    def __init__(self, tokenizer: Any, special: dict[str, int], pattern: re.Pattern[str]):
        from tokenizers import AddedToken, Tokenizer

        self.pattern, self.side = pattern, tokenizer.truncation_side
        self.copy = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self.copy.no_truncation()
        self.copy.no_padding()
        self.copy.encode_special_tokens = True
        nonce = secrets.token_hex(12)
        self.stand_ins = {name: f"q{nonce}x{index}q" for index, name in enumerate(special)}
        self.gap = f"q{nonce}q"
        known = {str(token): token for token in tokenizer.added_tokens_decoder.values()}
        for name, stand_in in self.stand_ins.items():
            token = known.get(name)
            strips = {} if token is None else {"lstrip": token.lstrip, "rstrip": token.rstrip}
            self.copy.add_tokens([AddedToken(stand_in, normalized=False, special=False, **strips)])
        self.copy.add_tokens([AddedToken(self.gap, normalized=False, special=False)])
        self.meaning = {self.copy.token_to_id(one): special[name] for name, one in self.stand_ins.items()}
        self.gap_id = self.copy.token_to_id(self.gap)
        structural = {tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id}
        self.forbidden = {*special.values()} - ({tokenizer.unk_token_id} - structural)

    def encode(self, parts: list[Part], opening: bool, max_length: int | None) -> tuple[list[int], bool]:
        """Tokens, without special tokens that come from content, and whether there were any."""
        if max_length is None:
            self.copy.no_truncation()
        else:
            self.copy.enable_truncation(max_length, direction=self.side)
        text = "".join(self._control(part.text) if part.control else part.text for part in parts)
        encoding = self.copy.encode(text, add_special_tokens=opening)
        ids, leaked = [], False
        for token, is_frame in zip(encoding.ids, encoding.special_tokens_mask, strict=True):
            if token in self.forbidden and not is_frame:
                leaked = True
            elif token != self.gap_id:
                ids.append(self.meaning.get(token, token))
        return ids, leaked

    def _control(self, text: str) -> str:
        return self.pattern.sub(lambda match: self.stand_ins[match[0]], text)


def pattern_of(words: Iterable[str]) -> str:
    """A regular expression that finds any of these words, the longest first, as a trie of their common beginnings.

    Tokenizers may have thousands of special tokens: a plain alternation would try each of them at every character.
    """
    root: dict[str, Any] = {}
    for word in words:
        node = root
        for letter in word:
            node = node.setdefault(letter, {})
        node[""] = {}
    return _branches(root) or r"(?!)"


def _branches(node: dict[str, Any]) -> str:
    options = [re.escape(letter) + _branches(inner) for letter, inner in node.items() if letter]
    body = options[0] if len(options) == 1 else f"(?:{'|'.join(options)})" if options else ""
    return f"(?:{body})?" if body and "" in node else body


def strings(value: Any) -> Iterable[str]:
    """All texts in nested lists and objects."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, one in value.items():
            yield from strings(key)
            yield from strings(one)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from strings(one)


def absent(word: str, texts: Iterable[str]) -> str:
    """`word` with a number added so that it occurs in none of the texts."""
    texts = list(texts)
    names = (f"{word}{number}" for number in count())
    return next(name for name in names if not any(name in text for text in texts))


def _replaced(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {_replaced(key, change): _replaced(one, change) for key, one in value.items()}
    return [_replaced(one, change) for one in value] if isinstance(value, list | tuple) else value
