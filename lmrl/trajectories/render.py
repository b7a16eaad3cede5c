"""Turning text into context tokens: raw, or through the model's chat template."""

from __future__ import annotations

from typing import Any

from lmrl.errors import ModelError
from lmrl.recipe import SpecialTokens
from lmrl.trajectories.encoding import Encoder, Part, absent, strings
from lmrl.trajectories.trajectory import Messages, as_messages, prompt_key

SENTINEL = "LMRL-SENTINEL"
"""Placeholder for an action, used to find the template's text around it; a number follows."""
KEPT, KEPT_LENGTH = 4096, 256
"""Games show the same few texts again and again: the tokens of this many texts, of at most this many characters, are
cached."""


class Renderer:
    """Turns observations into tokens. Sampled tokens are never touched: what follows them is rendered separately.

    special_tokens: how special tokens in prompts, observations and logged actions are read: as `text`, or as control
    tokens (`parse`). The chat template's own are always control tokens. tools: rendered by the chat template.
    """

    def __init__(
        self,
        tokenizer: Any,
        chat: bool = False,
        system: str | None = None,
        special_tokens: SpecialTokens = "text",
        tools: list[dict[str, Any]] | None = None,
    ):
        if chat and not tokenizer.chat_template:
            raise ModelError(
                "the model's tokenizer has no chat template: take an instruct model, or prompts that are text with "
                "`chat: false`"
            )
        self.tokenizer, self.chat, self.system = tokenizer, chat, system
        self.encoder = Encoder(tokenizer, special_tokens, tools)
        self._encoded: dict[tuple[tuple[Part, ...], bool], list[int]] = {}
        self.unknown: str | None = None
        """The first letter or word so far that the vocabulary lacks."""

    def first(self, observation: str | Messages) -> list[int]:
        """Context that opens a segment."""
        if isinstance(observation, str) and not self.chat:
            tokens = self._encode(self.encoder.content(observation), opening=True)
        else:
            tokens = self._encode(self.encoder.dialogue(self._with_system(observation)))
        return tokens or [self._start_token()]

    def next(self, observation: str | Messages, last_token: int, said: dict[str, Any] | None = None) -> list[int]:
        """Context that follows an action in the same segment.

        last_token: the action's last token. said: the action's message, if it calls tools.
        """
        if not self.chat and isinstance(observation, str):
            return self._encode(self.encoder.content(observation))
        tokens = self._encode(self._after_action(as_messages(observation), said=said))
        return tokens[1:] if tokens[:1] == [last_token] else tokens  # the policy has closed its turn itself

    def keys(self, prompt: str | Messages) -> set[str]:
        """Keys of a prompt: two prompts that ask the model the same share at least one key.

        They may be given as text or as messages, rendered or not, with another system message or none.
        """
        messages = [message for message in as_messages(prompt) if message["role"] not in ("system", "developer")]
        keys = {prompt_key(prompt), prompt_key(messages)}
        if [message["role"] for message in messages] == ["user"]:
            keys.add(messages[0]["content"])
        if self.tokenizer.chat_template and (self.chat or isinstance(prompt, list)):
            keys |= {
                self.encoder.template(form)
                for form in (as_messages(prompt), self._with_system(prompt), messages)
                if form
            }
        return {key.strip() for key in keys} - {""}

    def action(self, text: str) -> list[int]:
        """An action written by someone else, closed as the chat template closes a turn, or with end-of-sequence."""
        eos = self.tokenizer.eos_token_id
        end = [] if eos is None else [eos]
        if self.chat:
            closing = self._encode(self._after_action([], open_turn=False))
            end = closing[:1] if closing[:1] and closing[0] in self.tokenizer.all_special_ids else end
        return self.plain(text) + end

    def call(self, message: dict[str, Any]) -> list[int]:
        """An action that calls tools, as the chat template writes it, up to the token that closes its turn."""
        sentinel = absent(SENTINEL, strings(message))
        opening = [{"role": "user", "content": "."}]
        plain = self.encoder.template([*opening, {"role": "assistant", "content": sentinel}], open_turn=False)
        parts = self.encoder.dialogue([*opening, message], open_turn=False)
        text = "".join(part.text for part in parts)
        header = next((one for one in self._headers(opening, plain, sentinel) if text.startswith(one)), None)
        if header is None:
            raise ModelError("the tokenizer's chat template cannot render tool calls: give such turns as text")
        names = [call.get("function", call).get("name", "") for call in message.get("tool_calls") or ()]
        if lost := next((name for name in names if name not in text[len(header) :]), None):
            raise ModelError(
                f"the tokenizer's chat template leaves out the call of the tool '{lost}': take a model whose template renders "
                "tool calls, or give such turns as text"
            )
        tokens = self._encode(_without(parts, len(header)))
        closing = [at for at, token in enumerate(tokens) if token in self.tokenizer.all_special_ids]
        return tokens[: closing[-1] + 1] if closing else tokens

    def _headers(self, opening: Messages, plain: str, sentinel: str) -> list[str]:
        """Text that may precede the assistant's words."""
        before, found, _ = plain.rpartition(sentinel)
        return ([before] if found else []) + [self.encoder.template(opening)]

    def plain(self, text: str) -> list[int]:
        """Context in the middle of a raw segment, without special tokens."""
        return self._encode(self.encoder.content(text))

    def _with_system(self, observation: str | Messages) -> Messages:
        return ([{"role": "system", "content": self.system}] if self.system else []) + as_messages(observation)

    def _encode(self, parts: list[Part], opening: bool = False) -> list[int]:
        """opening: with the special tokens that the tokenizer adds at the start of a text."""
        name = (tuple(parts), opening)
        known = self._encoded.get(name)
        if known is None:
            known = self.encoder.encode(parts, opening)
            if self.unknown is None and self.tokenizer.is_fast and self.tokenizer.unk_token_id in known:
                self.unknown = self._unknown("".join(part.text for part in parts))
            if sum(len(part.text) for part in parts) <= KEPT_LENGTH and len(self._encoded) < KEPT:
                self._encoded[name] = known
        return list(known)

    def _unknown(self, text: str) -> str | None:
        found = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        spans = zip(found.input_ids, found.offset_mapping, strict=True)
        return next((text[low:high] for token, (low, high) in spans if token == self.tokenizer.unk_token_id), None)

    def _after_action(
        self, messages: Messages, open_turn: bool = True, said: dict[str, Any] | None = None
    ) -> list[Part]:
        """The template's text from the end of an action on. said: the action's message, if it calls tools."""
        sentinel = absent(SENTINEL, strings([messages, said]))
        if said is not None and messages:
            return self._after_call(messages, said)
        dialogue = [{"role": "user", "content": "."}, {"role": "assistant", "content": sentinel}]
        parts = self.encoder.dialogue(dialogue + messages, open_turn)
        for index in range(len(parts) - 1, -1, -1):
            before, found, after = parts[index].text.rpartition(sentinel)
            if found:
                return [Part(after, parts[index].control), *parts[index + 1 :]]
        raise ModelError("the tokenizer's chat template leaves out the assistant's text, so no turn can follow it")

    def _after_call(self, messages: Messages, said: dict[str, Any]) -> list[Part]:
        """The same after tool calls, which templates need before their results."""
        before = [{"role": "user", "content": "."}, said]
        shorter = self.encoder.template(before, open_turn=False)
        parts = self.encoder.dialogue(before + messages)
        text = "".join(part.text for part in parts)
        closing = "".join(part.text for part in self._after_action([], open_turn=False))
        if not text.startswith(shorter) or not shorter.endswith(closing):
            return self._after_action(messages)  # this template renders earlier turns differently
        return _without(parts, len(shorter) - len(closing))

    def _start_token(self) -> int:
        for token in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id):
            if token is not None:
                return int(token)
        raise ModelError("a prompt is empty, and the tokenizer has neither a bos nor an eos token to start from")


def _without(parts: list[Part], count: int) -> list[Part]:
    """Parts without their first `count` characters."""
    rest = []
    for part in parts:
        rest.append(Part(part.text[count:], part.control))
        count = max(count - len(part.text), 0)
    return [part for part in rest if part.text]
