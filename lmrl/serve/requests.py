"""Requests in the supported part of OpenAI's API: parsing and checking them.

Unsupported fields are refused by name; no field that would change the answer is ignored.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

from lmrl.engines.base import Sampling
from lmrl.tools.formats import Tool
from lmrl.trajectories.fields import ROLES
from lmrl.trajectories.trajectory import Messages

WITHOUT_EFFECT = {
    "model",
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
}
"""Fields that do not affect the answer. (`model` is checked separately.)"""
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "tool_choice": ("auto", "none"),
    "parallel_tool_calls": (True,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "min_p": (0,),
    "repetition_penalty": (1,),
    "modalities": (["text"],),
    "functions": ([],),
}
"""Fields for which only these values (and null) are supported."""
LONGEST_STOP, MOST_STOPS = 256, 16
CONTEXT_FULL = "context_length_exceeded"
"""OpenAI's code for a prompt that does not fit the model."""


class BadRequest(Exception):
    """A request that cannot be served, in OpenAI's terms."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None, status: int = 400):
        super().__init__(message)
        self.param, self.code, self.status = param, code, status


@dataclass(frozen=True)
class Ask:
    """A request for completions of a dialogue, or of prompts of text or tokens."""

    sampling: Sampling
    limited: bool
    """True if the client set a token limit; otherwise it is what fits, up to the default."""
    messages: Messages | None = None
    tools: tuple[Tool, ...] = ()
    prompts: tuple[str | tuple[int, ...], ...] = ()
    n: int = 1
    seed: int | None = None
    stream: bool = False
    usage_in_stream: bool = False
    logprobs: bool = False
    token_ids: bool = False
    """Also return the token ids of prompt and completion (`return_token_ids`, as in vLLM)."""
    model: str | None = None

    @property
    def is_chat(self) -> bool:
        return self.messages is not None

    @property
    def completions(self) -> int:
        return self.n * (1 if self.is_chat else len(self.prompts))


class Fields:
    """The fields of a request; each known field is taken once, and those left at the end are unknown."""

    def __init__(self, payload: Any):
        if not isinstance(payload, dict):
            raise BadRequest("the body is not a JSON object")
        self.left: dict[str, Any] = {name: value for name, value in payload.items() if value is not None}

    def take(self, name: str, kinds: type | tuple[type, ...], default: Any = None) -> Any:
        value = self.left.pop(name, None)
        if value is None:
            return default
        wrong_flag = isinstance(value, bool) and bool not in (kinds if isinstance(kinds, tuple) else (kinds,))
        if wrong_flag or not isinstance(value, kinds):
            raise BadRequest(f"'{name}' is {value!r:.60}; expected {_type_names(kinds)}", name)
        return value

    def number(self, name: str, low: float, high: float, default: Any, whole: bool = False) -> Any:
        value = self.take(name, int if whole else (int, float), default)
        if value is not None and not low <= value <= high:
            raise BadRequest(f"'{name}' is {value}; expected a number from {low:g} to {high:g}", name)
        return value

    def finish(self) -> None:
        """Refuse the remaining fields, unless they have no effect or ask for the default behaviour."""
        for name, value in self.left.items():
            if name in WITHOUT_EFFECT or any(_is_same(value, one) for one in NEUTRAL.get(name, ())):
                continue
            allowed = f"; only {json.dumps(NEUTRAL[name][0])} is" if name in NEUTRAL else ""
            raise BadRequest(f"'{name}' is not supported{allowed}", name, "unsupported_parameter")


def _is_same(value: Any, other: Any) -> bool:
    """True for the same JSON value: False is not 0, though Python has them equal."""
    return bool(value == other and isinstance(value, bool) == isinstance(other, bool))


def _type_names(kinds: type | tuple[type, ...]) -> str:
    names = {
        int: "a whole number",
        float: "a number",
        str: "text",
        list: "a list",
        dict: "an object",
        bool: "true or false",
    }
    return " or ".join(names[kind] for kind in (kinds if isinstance(kinds, tuple) else (kinds,)))


def read_ask(payload: Any, chat: bool, defaults: Sampling, most: int = 128) -> Ask:
    """A request for completions, checked. defaults: how to sample unless the request says otherwise. most: maximum
    `n`."""
    fields = Fields(payload)
    given = fields.number("max_completion_tokens", 1, 2**31, None, whole=True) if chat else None
    limit = fields.number("max_tokens", 1, 2**31, None, whole=True)
    limit = given if given is not None else limit
    sampling = replace(
        defaults,
        max_new_tokens=limit or defaults.max_new_tokens,
        temperature=float(fields.number("temperature", 0, 2, defaults.temperature)),
        top_p=float(fields.number("top_p", 0, 1, defaults.top_p)),
        top_k=max(fields.number("top_k", -1, 2**31, defaults.top_k, whole=True), 0),
        stop=_stops(fields, defaults),
    )
    if not sampling.top_p:
        raise BadRequest("'top_p' is 0; expected a number above 0", "top_p")
    stream = fields.take("stream", bool, False)
    options = Fields(fields.take("stream_options", dict, {}))
    usage = options.take("include_usage", bool, False)
    options.left.pop("include_obfuscation", None)
    options.finish()
    ask = Ask(
        sampling,
        limit is not None,
        n=fields.number("n", 1, most, 1, whole=True),
        seed=fields.number("seed", -(2**63), 2**63 - 1, None, whole=True),
        stream=stream,
        usage_in_stream=usage,
        token_ids=fields.take("return_token_ids", bool, False),
        model=fields.take("model", str),
    )
    if chat:
        wanted = fields.take("logprobs", bool, False)
        if fields.number("top_logprobs", 0, 20, 0, whole=True):
            raise BadRequest("'top_logprobs' above 0 is not supported: only sampled tokens have theirs", "top_logprobs")
        tools = _tools(fields)
        ask = replace(ask, messages=_messages(fields), tools=tools, logprobs=wanted)
    else:
        wanted = fields.number("logprobs", 0, 1, None, whole=True) is not None
        ask = replace(ask, prompts=_prompts(fields), logprobs=wanted)
    fields.finish()
    return ask


def _stops(fields: Fields, defaults: Sampling) -> tuple[str, ...]:
    given = fields.take("stop", (str, list))
    if given is None:
        return defaults.stop
    stops = [given] if isinstance(given, str) else given
    if len(stops) > MOST_STOPS or not all(isinstance(one, str) and 0 < len(one) <= LONGEST_STOP for one in stops):
        raise BadRequest(
            f"'stop' is {given!r:.60}; expected up to {MOST_STOPS} texts of 1 to {LONGEST_STOP} characters", "stop"
        )
    return tuple(stops)


def _tools(fields: Fields) -> tuple[Tool, ...]:
    choice = fields.left.get("tool_choice")
    found = []
    for number, tool in enumerate(fields.take("tools", list, [])):
        function = (
            tool.get("function") if isinstance(tool, dict) and tool.get("type", "function") == "function" else None
        )
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise BadRequest(f"'tools.{number}' is {tool!r:.60}; expected an object with function.name", "tools")
        parameters = function.get("parameters") or {"type": "object", "properties": {}}
        if not isinstance(parameters, dict) or not isinstance(parameters.get("properties", {}), dict):
            raise BadRequest(f"'tools.{number}.function.parameters' is not a JSON schema of an object", "tools")
        kept = {
            "name": function["name"],
            "description": str(function.get("description") or ""),
            "parameters": parameters,
        }
        found.append({"type": "function", "function": kept})
    return () if choice == "none" else tuple(found)


def _messages(fields: Fields) -> Messages:
    given = fields.take("messages", list)
    if not given:
        raise BadRequest("'messages' is missing or empty", "messages")
    return [_message(message, f"messages.{number}") for number, message in enumerate(given)]


def _message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, dict) or message.get("role") not in ROLES:
        raise BadRequest(
            f"'{where}' is {message!r:.60}; expected an object with a role of {', '.join(ROLES)}", "messages"
        )
    role = "system" if message["role"] == "developer" else message["role"]
    kept: dict[str, Any] = {"role": role, "content": _content(message.get("content"), where)}
    if calls := message.get("tool_calls"):
        if role != "assistant" or not isinstance(calls, list):
            raise BadRequest(f"'{where}.tool_calls': expected a list, in an assistant message", "messages")
        kept["tool_calls"] = [_tool_call(call, where) for call in calls]
    elif message.get("content") is None:
        raise BadRequest(f"'{where}.content' is missing", "messages")
    return kept | {name: message[name] for name in ("name", "tool_call_id") if isinstance(message.get(name), str)}


def _content(content: Any, where: str) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    texts = []
    for part in content if isinstance(content, list) else [content]:
        if not isinstance(part, dict) or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise BadRequest(f"'{where}.content' holds {kind!r:.40}; only text is served", "messages")
        texts.append(part["text"])
    return "".join(texts)


def _tool_call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise BadRequest(f"'{where}.tool_calls' holds {call!r:.60}; expected objects with function.name", "messages")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError) as error:
            raise BadRequest(f"'{where}.tool_calls': function.arguments is not JSON: {error}", "messages") from error
    if not isinstance(arguments, dict):
        raise BadRequest(
            f"'{where}.tool_calls': function.arguments is {arguments!r:.60}; expected an object", "messages"
        )
    kept = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    return ({"id": call["id"]} if isinstance(call.get("id"), str) else {}) | kept


def _prompts(fields: Fields) -> tuple[str | tuple[int, ...], ...]:
    given = fields.take("prompt", (str, list))
    if isinstance(given, list) and given and all(type(one) is int for one in given):
        given = [given]
    prompts = [given] if isinstance(given, str) else given
    if not prompts:
        raise BadRequest("'prompt' is missing or empty", "prompt")
    found: list[str | tuple[int, ...]] = []
    for prompt in prompts:
        is_tokens = isinstance(prompt, list) and prompt and all(type(one) is int and one >= 0 for one in prompt)
        if not isinstance(prompt, str) and not is_tokens:
            raise BadRequest(f"'prompt' holds {prompt!r:.60}; expected text or token ids", "prompt")
        found.append(prompt if isinstance(prompt, str) else tuple(prompt))
    return tuple(found)
