"""Checks of the fields of logged rows: an error names the field and what was expected."""

from __future__ import annotations

import json
from typing import Any

from lmrl.trajectories.readers import Malformed, Row
from lmrl.trajectories.trajectory import (
    LARGEST_REWARD,
    Messages,
    is_reward,
)

ROLES = ("system", "developer", "user", "assistant", "tool")
OTHER_NAMES = "; if columns have other names, set `columns`, for instance {prompt: question, completion: answer}"
_KINDS = {str: "text", int: "a whole number", bool: "true or false"}


def take(row: Row, name: str, *kinds: type, items: str = "messages", fix: str = "") -> Any:
    """A row's field, checked: Malformed names the field and what was expected. items: what a list holds; fix: for a field
    that is missing."""
    expected = " or ".join(f"a list of {items}" if kind is list else _KINDS[kind] for kind in kinds)
    if row.get(name) is None:
        given = ", ".join(key for key, value in row.items() if value is not None)
        raise Malformed(f"has no field '{name}' (fields: {given}); expected {expected}{fix}")
    if not isinstance(row[name], kinds) or (isinstance(row[name], bool) and bool not in kinds):
        raise Malformed(f"field '{name}' is {row[name]!r:.60}; expected {expected}")
    return row[name]


def json_of(row: Row, name: str) -> Any:
    """A field that is JSON text in Parquet."""
    if not isinstance(row.get(name), str):
        return row.get(name)
    try:
        return json.loads(row[name])
    except json.JSONDecodeError as error:
        raise Malformed(f"field '{name}' is {row[name]!r:.60}; expected JSON") from error


def optional(row: Row, name: str, kind: type, default: Any = None) -> Any:
    return default if row.get(name) is None else take(row, name, kind)


def reward_in(row: Row) -> float | None:
    return None if row.get("reward") is None else reward_of(row["reward"], "reward")


def reward_of(value: Any, name: str) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool) and is_reward(value):
        return float(value)
    raise Malformed(f"field '{name}' holds {value!r:.60}; expected a finite number up to {LARGEST_REWARD:g}")


def not_empty(text: str, name: str) -> str:
    if not text:
        raise Malformed(f"field '{name}' is empty after the prompt; expected text")
    return text


def text_or_messages(row: Row, name: str) -> str | Messages:
    return row[name] if isinstance(take(row, name, str, list, fix=OTHER_NAMES), str) else messages_in(row, name)


def messages_in(row: Row, name: str) -> Messages:
    return with_tools(checked_messages(take(row, name, list), name), row)


def with_tools(messages: Messages, row: Row) -> Messages:
    """Messages that open a dialogue, with the tool definitions of a row's column `tools`. Raises Malformed."""
    tools = json_of(row, "tools")
    if not tools or messages[0]["role"] == "assistant":  # a continuation: its prompt has the tools
        return messages
    if not isinstance(tools, list):
        raise Malformed(f"field 'tools' is {tools!r:.60}; expected a list of tool definitions")
    known = [json_of({"tools": one}, "tools") for one in tools]
    if not all(isinstance(one, dict) for one in known):
        raise Malformed(
            f"field 'tools' holds {tools!r:.60}; expected objects such as {{'type': 'function', 'function': ...}}"
        )
    return [messages[0] | {"tools": known}, *messages[1:]]


def checked_messages(messages: list[Any], name: str) -> Messages:
    """Messages with the keys that chat templates read. Raises Malformed."""
    if not messages:
        raise Malformed(f"field '{name}' is empty; expected messages")
    return [checked_message(message, name) for message in messages]


def checked_message(message: Any, name: str) -> dict[str, Any]:
    """A message with the keys that chat templates read; one with tool calls may have no content. Raises Malformed."""
    given = message if isinstance(message, dict) else {}
    role, content, calls = given.get("role"), given.get("content"), json_of(given, "tool_calls")
    if calls and content is None:
        content = ""
    if not isinstance(role, str) or not isinstance(content, str):
        raise Malformed(f"field '{name}' holds {message!r:.60}; expected messages with text in 'role' and 'content'")
    if role not in ROLES:
        raise Malformed(f"field '{name}' has a message with the role {role!r:.40}; expected one of {', '.join(ROLES)}")
    if calls and role != "assistant":
        raise Malformed(f"field '{name}' has 'tool_calls' in a message with the role '{role}'; expected 'assistant'")
    others = {key: given[key] for key in ("name", "tool_call_id") if isinstance(given.get(key), str)}
    others |= {"tools": given["tools"]} if given.get("tools") else {}
    return {"role": role, "content": content} | ({"tool_calls": _checked_calls(calls, name)} if calls else {}) | others


def _checked_calls(calls: Any, name: str) -> list[dict[str, Any]]:
    """Tool calls, with arguments as objects: templates convert these to JSON themselves."""
    found = []
    for call in calls if isinstance(calls, list) else [calls]:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise Malformed(
                f"field '{name}' has the tool call {call!r:.60}; expected an object with function.name and "
                "function.arguments"
            )
        arguments = json_of(function, "arguments")
        if not isinstance(arguments, dict):
            raise Malformed(f"field '{name}' has the tool arguments {arguments!r:.60}; expected an object")
        found.append({"type": "function"} | call | {"function": function | {"arguments": arguments}})
    return found
