"""A served policy: turns messages and text into tokens, and sampled tokens into answers for clients."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from lmrl.engines.base import Completion, Engine, Key, Sampling, before_stop
from lmrl.policy.policy import Policy
from lmrl.recipe import SpecialTokens
from lmrl.serve.answers import Choice, tool_calls
from lmrl.serve.requests import CONTEXT_FULL, Ask, BadRequest
from lmrl.tools.formats import Tool, format_of
from lmrl.trajectories.render import Renderer
from lmrl.trajectories.trajectory import Messages

RENDERERS = 64
"""Maximum sets of tools whose renderers are cached."""
REASONS = {"eos": "stop", "stop": "stop", "length": "length"}


class ServedPolicy:
    """A policy with its engine. sampling: the default for requests; name: of the model, for clients."""

    def __init__(
        self,
        policy: Policy,
        engine: Engine,
        sampling: Sampling,
        name: str,
        special_tokens: SpecialTokens = "text",
    ):
        self.policy, self.engine, self.sampling, self.name = policy, engine, sampling, name
        self.special_tokens = special_tokens
        self.tokenizer = policy.tokenizer
        self.format = format_of(self.tokenizer)
        self.raw = Renderer(self.tokenizer, special_tokens=special_tokens)
        self._renderers: dict[str, Renderer] = {}

    # ---------------------------------------------------------------------------------------------------------- prompts
    def renderer(self, tools: list[Tool] | None) -> Renderer:
        """A renderer of dialogues with these tools. Raises BadRequest if there is no chat template."""
        if not self.tokenizer.chat_template:
            raise BadRequest(f"'{self.name}' has no chat template: use /v1/completions", "messages")
        name = json.dumps(tools, sort_keys=True)
        if name not in self._renderers:
            if len(self._renderers) >= RENDERERS:
                self._renderers.clear()
            self._renderers[name] = Renderer(self.tokenizer, True, special_tokens=self.special_tokens, tools=tools)
        return self._renderers[name]

    def dialogue(self, messages: Messages, tools: tuple[Tool, ...]) -> list[int]:
        """The tokens of a dialogue, including the opening of the assistant's turn."""
        prepared, written = self.format.prepare(messages, list(tools) or None)
        return self.renderer(written).first(prepared)

    def following(self, messages: Messages, tools: tuple[Tool, ...], last: int, said: dict[str, Any]) -> list[int]:
        """The tokens that follow an answer: those of the messages after it, including the opening of the next assistant
        turn.

        last: the answer's last token. said: the answer as a message.
        """
        prepared, _ = self.format.prepare([said, *messages], None)
        written = self.format.prepare([], list(tools) or None)[1]
        call = prepared[0] if prepared[0].get("tool_calls") else None
        return self.renderer(written).next(prepared[1:], last, call)

    def text(self, prompt: str | tuple[int, ...]) -> list[int]:
        """The tokens of a plain-text prompt. Raises BadRequest for ids that the model does not have."""
        if isinstance(prompt, str):
            return self.raw.first(prompt)
        rows = self.policy.vocabulary.shape[0]
        if unknown := [token for token in prompt if token >= rows]:
            raise BadRequest(f"'prompt' holds the token {unknown[0]}, but the model has {rows}", "prompt")
        return list(prompt)

    def fit(self, sampling: Sampling, limited: bool, prompt: int) -> Sampling:
        """The sampling with a token limit that leaves room for the prompt, if the client has set none. Raises
        BadRequest."""
        positions = self.policy.max_length
        if positions is None:
            return sampling
        room = positions - prompt
        if room < 1 or (limited and sampling.max_new_tokens > room):
            wanted = sampling.max_new_tokens if limited else 1
            raise BadRequest(
                f"the prompt has {prompt} tokens, and {wanted} more need {prompt + wanted} positions, but the model has "
                f"{positions}",
                code=CONTEXT_FULL,
            )
        return replace(sampling, max_new_tokens=min(sampling.max_new_tokens, room))

    # ---------------------------------------------------------------------------------------------------------- answers
    async def complete(
        self, tokens: list[int], sampling: Sampling, key: Key, heard: Callable[[int], None] | None = None
    ) -> Completion:
        return await self.engine.generate(tokens, sampling, key, heard)

    def choice(self, ask: Ask, prompt: list[int], done: Completion, sampling: Sampling, key: Key) -> Choice:
        """A completion as the client sees it. key: of its random stream."""
        text = self.shown(done.tokens, sampling.stop if done.finish_reason == "stop" else ())
        reason, calls = REASONS[done.finish_reason], []
        if ask.tools:
            parsed = self.format.parse(self.marked(done.tokens, sampling.stop), list(ask.tools))
            if parsed.calls:
                text, reason = self.plain(parsed.content), "tool_calls"
                calls = tool_calls(parsed.calls, key, prompt)
        pieces = [self.tokenizer.decode([token]) for token in done.tokens]
        return Choice(text, pieces, done.tokens, done.logprobs, reason, calls, prompt)

    def shown(self, tokens: list[int], stop: tuple[str, ...] = ()) -> str:
        """The text of sampled tokens without special tokens, up to the first stop string."""
        return before_stop(self.policy.decode(tokens), stop)

    def plain(self, text: str) -> str:
        """Text without the names of special tokens."""
        return self.raw.encoder.without_special(text)

    def marked(self, tokens: list[int], stop: tuple[str, ...] = ()) -> str:
        """The text with special tokens, which may mark tool calls, but without the one that ends the turn."""
        ended = tokens[:-1] if tokens and tokens[-1] in self.policy.eos_ids else tokens
        return before_stop(self.tokenizer.decode(ended), stop)


class TextStream:
    """The text of tokens as they are sampled, in parts that later tokens do not change."""

    def __init__(self, served: ServedPolicy, stop: tuple[str, ...]):
        self.served, self.stop = served, stop
        self.tokens: list[int] = []
        self.text, self.sent = "", 0
        self._prefix = self._read = 0

    def add(self, token: int) -> str:
        """The text that may be sent after this token."""
        self.tokens.append(token)
        decode = self.served.policy.decode
        before, now = decode(self.tokens[self._prefix : self._read]), decode(self.tokens[self._prefix :])
        if len(now) > len(before) and not now.endswith("\ufffd"):  # otherwise a character is still incomplete
            self.text += now[len(before) :]
            self._prefix, self._read = self._read, len(self.tokens)
        text = before_stop(self.text, self.stop)
        held = max((size for one in self.stop for size in range(1, len(one)) if text.endswith(one[:size])), default=0)
        return self._send(text[: len(text) - held])

    def finish(self, text: str) -> str:
        """The rest of the complete text."""
        return self._send(text)

    def _send(self, text: str) -> str:
        part, self.sent = text[self.sent :], max(self.sent, len(text))
        return part
