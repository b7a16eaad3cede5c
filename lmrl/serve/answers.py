"""Answers in the supported part of OpenAI's API, whole or as a stream of events."""

from __future__ import annotations

import hashlib
import json
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lmrl.engines.base import Key
from lmrl.serve.requests import Ask
from lmrl.tools.formats import Call


@dataclass(frozen=True)
class Choice:
    """A completion as the client sees it. tokens: the text of each token."""

    text: str
    tokens: list[str]
    ids: list[int]
    logprobs: list[float]
    finish_reason: str
    calls: list[dict[str, Any]]
    prompt_ids: list[int]


def tool_calls(calls: Sequence[Call], key: Key, prompt: Sequence[int]) -> list[dict[str, Any]]:
    """Calls in a message's form, each with an id: nine letters and digits, as Mistral's templates require, drawn from
    the answer's random stream and prompt, because templates that show ids make them a part of later prompts."""
    name = json.dumps([key, list(prompt)])
    return [
        {
            "id": hashlib.blake2b(f"{name}{at}".encode()).hexdigest()[:9],
            "type": "function",
            "function": {"name": call.name, "arguments": call.arguments},
        }
        for at, call in enumerate(calls)
    ]


def _wire(calls: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Calls in the form in which they are sent: with arguments as JSON text."""
    return [
        {**call, "function": {**call["function"], "arguments": json.dumps(call["function"]["arguments"])}}
        for call in calls
    ]


def logprobs_of(choice: Choice, chat: bool) -> dict[str, Any]:
    if chat:
        content = [
            {"token": token, "logprob": value, "bytes": list(token.encode()), "top_logprobs": []}
            for token, value in zip(choice.tokens, choice.logprobs, strict=True)
        ]
        return {"content": content, "refusal": None}
    offsets = [sum(map(len, choice.tokens[:at])) for at in range(len(choice.tokens))]
    return {"tokens": choice.tokens, "token_logprobs": choice.logprobs, "top_logprobs": None, "text_offset": offsets}


class Writer:
    """Writes the answers to one request."""

    def __init__(self, ask: Ask, model: str):
        self.ask, self.id = ask, f"{'chatcmpl' if ask.is_chat else 'cmpl'}-{uuid.uuid4().hex}"
        self.model, self.created = model, int(time.time())

    def whole(self, choices: Sequence[Choice]) -> dict[str, Any]:
        written = []
        for index, choice in enumerate(choices):
            one: dict[str, Any] = {"index": index, "finish_reason": choice.finish_reason}
            if self.ask.is_chat:
                one["message"] = message_of(choice)
            else:
                one["text"] = choice.text
            one["logprobs"] = logprobs_of(choice, self.ask.is_chat) if self.ask.logprobs else None
            if self.ask.token_ids:
                one |= {"token_ids": choice.ids, "prompt_token_ids": choice.prompt_ids}
            written.append(one)
        kind = "chat.completion" if self.ask.is_chat else "text_completion"
        return self._frame(kind) | {"choices": written, "usage": self.usage(choices)}

    def usage(self, choices: Sequence[Choice]) -> dict[str, int]:
        prompt = sum(len(choice.prompt_ids) for choice in choices[:: self.ask.n])
        completion = sum(len(choice.ids) for choice in choices)
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}

    def opening(self, index: int) -> bytes:
        """The first event of a choice of a chat."""
        return self._event(index, {"role": "assistant", "content": ""})

    def part(self, index: int, text: str) -> bytes:
        return self._event(index, {"content": text} if self.ask.is_chat else text)

    def closing(self, index: int, choice: Choice) -> bytes:
        """The last event of a choice: calls, finish reason, and token details."""
        delta: Any = "" if not self.ask.is_chat else {}
        if choice.calls:
            delta = {"tool_calls": [{"index": at, **call} for at, call in enumerate(_wire(choice.calls))]}
        extra: dict[str, Any] = (
            {"token_ids": choice.ids, "prompt_token_ids": choice.prompt_ids} if self.ask.token_ids else {}
        )
        logprobs = logprobs_of(choice, self.ask.is_chat) if self.ask.logprobs else None
        return self._event(index, delta, choice.finish_reason, logprobs, extra)

    def totals(self, choices: Sequence[Choice]) -> bytes:
        return sse(self._frame(self._kind) | {"choices": [], "usage": self.usage(choices)})

    @property
    def _kind(self) -> str:
        return "chat.completion.chunk" if self.ask.is_chat else "text_completion"

    def _event(
        self, index: int, delta: Any, reason: str | None = None, logprobs: Any = None, extra: Mapping[str, Any] = {}
    ) -> bytes:
        name = "delta" if self.ask.is_chat else "text"
        choice = {"index": index, name: delta, "logprobs": logprobs, "finish_reason": reason, **extra}
        return sse(self._frame(self._kind) | {"choices": [choice]})

    def _frame(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


def message_of(choice: Choice) -> dict[str, Any]:
    """The assistant's message of a choice, as it is sent."""
    message: dict[str, Any] = {"role": "assistant", "content": choice.text or (None if choice.calls else "")}
    return message | ({"tool_calls": _wire(choice.calls)} if choice.calls else {})


def sse(value: Any) -> bytes:
    """A server-sent event."""
    return b"data: " + (value if isinstance(value, bytes) else json.dumps(value).encode()) + b"\n\n"
