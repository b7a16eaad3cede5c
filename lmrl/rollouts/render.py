"""From text to context tokens: raw, or through the model's chat template."""

from __future__ import annotations

from typing import Any

from lmrl.errors import ModelError

SENTINEL = "LMRL-SENTINEL"
KEPT, KEPT_LENGTH = 4096, 256
"""Games show the same few texts again and again: tokens of so many texts of so many characters are kept."""
Messages = list[dict[str, str]]


class Renderer:
    """Turns observations into tokens. Sampled tokens are never touched: what follows them is rendered on its own."""

    def __init__(self, tokenizer: Any, chat: bool = False, system: str | None = None):
        if chat and not tokenizer.chat_template:
            raise ModelError("the tokenizer has no chat template: set `chat: false` to use the text as it is")
        self.tokenizer, self.chat, self.system = tokenizer, chat, system
        self._encoded: dict[tuple[str, bool], list[int]] = {}

    def first(self, observation: str | Messages) -> list[int]:
        """Context that opens a segment."""
        if isinstance(observation, str) and not self.chat:
            tokens = self._encode(observation, special_tokens=True)
        else:
            messages = [{"role": "system", "content": self.system}] if self.system else []
            own = [{"role": "user", "content": observation}] if isinstance(observation, str) else observation
            tokens = self._encode(self._template(messages + own))
        return tokens or [self._start_token()]

    def next(self, observation: str, last_token: int) -> list[int]:
        """Context that follows an action in the same segment; `last_token` is the action's last."""
        if not self.chat:
            return self._encode(observation)
        dialogue = [
            {"role": "user", "content": "."},
            {"role": "assistant", "content": SENTINEL},
            {"role": "user", "content": observation},
        ]
        tokens = self._encode(self._template(dialogue).rsplit(SENTINEL, 1)[1])
        return tokens[1:] if tokens[:1] == [last_token] else tokens  # the policy has closed its turn by itself

    def action(self, text: str) -> list[int]:
        """An action written by someone else, closed as the chat template closes a turn, or with end-of-sequence."""
        eos = self.tokenizer.eos_token_id
        end = [] if eos is None else [eos]
        if self.chat:
            dialogue = [{"role": "user", "content": "."}, {"role": "assistant", "content": SENTINEL}]
            closing = self._encode(self._template(dialogue, open_turn=False).rsplit(SENTINEL, 1)[1])
            end = closing[:1] if closing[:1] and closing[0] in self.tokenizer.all_special_ids else end
        return self._encode(text) + end

    def plain(self, text: str) -> list[int]:
        """Context in the middle of a raw segment, without special tokens."""
        return self._encode(text)

    def _encode(self, text: str, special_tokens: bool = False) -> list[int]:
        """special_tokens: with those that the tokenizer opens a text with."""
        known = self._encoded.get((text, special_tokens))
        if known is None:
            known = self.tokenizer(text, add_special_tokens=special_tokens).input_ids
            if len(text) <= KEPT_LENGTH and len(self._encoded) < KEPT:
                self._encoded[text, special_tokens] = known
        return list(known)

    def _template(self, messages: Messages, open_turn: bool = True) -> str:
        if not self.tokenizer.chat_template:
            raise ModelError("the prompts are dialogues, but the tokenizer has no chat template")
        return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=open_turn)

    def _start_token(self) -> int:
        for token in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id):
            if token is not None:
                return token
        raise ModelError("a prompt is empty, and the tokenizer has neither a bos nor an eos token to start from")
