"""Formats of tool calls: of Qwen and Hermes, of Llama and of Mistral, and a plain one for all others.

    hermes    <tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>   (Qwen's newer templates: <function=add> inside)
    llama     {"name": "add", "parameters": {"a": 1}}, optionally after <|python_tag|>
    mistral   [TOOL_CALLS][{"name": "add", "arguments": {"a": 1}}], or [TOOL_CALLS]add[ARGS]{"a": 1}
    plain     [add(a=1)], as Python would write it

The plain format is for models whose chat template does not support tools: the system message then describes them.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lmrl.trajectories.trajectory import Messages

Tool = dict[str, Any]
"""A tool as OpenAI's API describes it: {"type": "function", "function": {"name", "description", "parameters"}}."""
SEPARATORS = " \n\t;,"
"""Characters between the calls that a Llama model writes."""


@dataclass(frozen=True)
class Call:
    """A call that a model wrote."""

    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Parsed:
    """A parsed reply: its text, and its calls."""

    content: str
    calls: list[Call]


Parser = Callable[[str, list[Tool]], Parsed]


# ---------------------------------------------------------------------------------------------------------------- parsers
def parse_hermes(text: str, tools: list[Tool]) -> Parsed:
    """<tool_call> blocks; an unclosed one at the end counts, because a stop string or limit may cut the closing tag."""
    calls: list[Call] = []

    def take(match: re.Match[str]) -> str:
        inner = match[1].strip()
        found = _xml_call(inner, tools) if inner.startswith("<function=") else _json_call(_loaded(inner))
        if found is None:
            return match[0]
        calls.append(found)
        return ""

    words = re.sub(r"<tool_call>(.*?)(?:</tool_call>|\Z)", take, text, flags=re.DOTALL)
    return Parsed(words.strip() if calls else text, calls)


def parse_llama(text: str, tools: list[Tool]) -> Parsed:
    """A sequence of JSON objects, with nothing else after an optional <|python_tag|>."""
    words, tag, rest = text.rpartition("<|python_tag|>")
    calls = _json_calls(rest)
    if calls is None and not tag:
        return parse_plain(text, tools)
    return Parsed(words.strip(), calls) if calls else Parsed(text, [])


def parse_mistral(text: str, tools: list[Tool]) -> Parsed:
    """Calls after [TOOL_CALLS]: a JSON list, or NAME[ARGS]{...} for each mark."""
    words, *blocks = text.split("[TOOL_CALLS]")
    calls: list[Call] = []
    for block in blocks:
        name, mark, arguments = block.partition("[ARGS]")
        if mark:
            given = _loaded(arguments.strip())
            found = [Call(re.sub(r"\[CALL_ID\].*", "", name.strip()), given)] if isinstance(given, dict) else None
        else:
            listed = _loaded(block.strip())
            parts = [_json_call(one) for one in listed] if isinstance(listed, list) else [None]
            found = [one for one in parts if one is not None] if None not in parts else None
        if not found:
            return Parsed(text, [])
        calls += found
    return Parsed(words.strip(), calls) if calls else Parsed(text, [])


def parse_plain(text: str, tools: list[Tool]) -> Parsed:
    """`[name(argument=value, ...)]` of known tools at the end of the text, with literals of Python as values."""
    stripped = text.rstrip()
    for match in re.finditer(r"\[\s*[A-Za-z_]\w*\(", stripped) if stripped.endswith("]") else ():
        calls = _python_calls(stripped[match.start() :], tools)
        if calls:
            return Parsed(stripped[: match.start()].strip(), calls)
    return Parsed(text, [])


def _python_calls(text: str, tools: list[Tool]) -> list[Call] | None:
    """The calls in a list of Python; None if it is anything else."""
    parameters = {tool["function"]["name"]: list(_properties(tool)) for tool in tools}
    try:
        tree = ast.parse(text, mode="eval").body
        calls = [_python_call(node, parameters) for node in tree.elts] if isinstance(tree, ast.List) else [None]
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
        return None
    found = [call for call in calls if call is not None]
    return found if len(found) == len(calls) else None


def _python_call(node: ast.expr, parameters: dict[str, list[str]]) -> Call | None:
    """A call of a known tool; None if it is anything else. Raises ValueError or TypeError for values that are not
    literals, or have no form in JSON."""
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name) or node.func.id not in parameters:
        return None
    names = parameters[node.func.id][: len(node.args)]
    given = [*names, *(keyword.arg for keyword in node.keywords)]
    if len(names) < len(node.args) or None in given or len(set(given)) < len(given):
        return None
    values = [*node.args, *(keyword.value for keyword in node.keywords)]
    arguments = {str(name): ast.literal_eval(value) for name, value in zip(given, values, strict=True)}
    json.dumps(arguments)
    return Call(node.func.id, arguments)


def _xml_call(text: str, tools: list[Tool]) -> Call | None:
    """<function=NAME><parameter=KEY>VALUE</parameter></function>; values have the types of the tool's parameters."""
    match = re.match(r"<function=([^>\s]+)>(.*)", text, flags=re.DOTALL)
    if match is None:
        return None
    kinds = next((_properties(tool) for tool in tools if tool["function"]["name"] == match[1]), {})
    arguments: dict[str, Any] = {}
    for key, value in re.findall(r"<parameter=([^>\s]+)>\n?(.*?)\n?</parameter>", match[2], flags=re.DOTALL):
        loaded = value if kinds.get(key, {}).get("type") == "string" else _loaded(value)
        arguments[key] = value if loaded is None else loaded
    return Call(match[1], arguments)


def _json_calls(text: str) -> list[Call] | None:
    """JSON objects with SEPARATORS between them, and nothing else; None if there is none, or something else."""
    calls, rest = [], text.lstrip(SEPARATORS)
    while rest:
        try:
            value, end = json.JSONDecoder().raw_decode(rest)
        except (ValueError, RecursionError):
            return None
        call = _json_call(value)
        if call is None:
            return None
        calls.append(call)
        rest = rest[end:].lstrip(SEPARATORS)
    return calls or None


def _json_call(value: Any) -> Call | None:
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):
        arguments = _loaded(arguments)
    return Call(value["name"], arguments) if isinstance(arguments, dict) else None


def _loaded(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _properties(tool: Tool) -> dict[str, Any]:
    found: dict[str, Any] = (tool["function"].get("parameters") or {}).get("properties") or {}
    return found


# ---------------------------------------------------------------------------------------------------------------- formats
PARSERS: dict[str, Parser] = {
    "hermes": parse_hermes,
    "llama": parse_llama,
    "mistral": parse_mistral,
    "plain": parse_plain,
}
PROBE: Tool = {
    "type": "function",
    "function": {
        "name": "lmrl_probe",
        "description": "",
        "parameters": {"type": "object", "properties": {}},
    },
}


@dataclass(frozen=True)
class ToolFormat:
    """The tool-call format of a tokenizer's chat template."""

    name: str
    tool_role: bool = True
    """False: the template has no tool messages, so results become user messages."""

    def parse(self, text: str, tools: list[Tool]) -> Parsed:
        """The text and calls of a reply. A call that cannot be parsed stays in the text."""
        return PARSERS[self.name](text, tools)

    def prepare(self, messages: Messages, tools: list[Tool] | None) -> tuple[Messages, list[Tool] | None]:
        """Messages in the chat template's form, and the tools that the template renders itself."""
        if self.name != "plain":
            return messages, tools
        prepared = [self._plain(message) for message in messages]
        return (with_instructions(prepared, tools) if tools else prepared), None

    def _plain(self, message: dict[str, Any]) -> dict[str, Any]:
        if message["role"] == "tool" and not self.tool_role:
            return {"role": "user", "content": message["content"]}
        if not message.get("tool_calls"):
            return message
        words = [message["content"]] if message.get("content") else []
        return {"role": "assistant", "content": "\n".join([*words, plain_text(message["tool_calls"])])}


def format_of(tokenizer: Any) -> ToolFormat:
    """The tool-call format of a tokenizer's chat template; plain if it does not render tools."""
    template = tokenizer.chat_template or ""
    template = template if isinstance(template, str) else str(template)
    question = [{"role": "user", "content": "."}]
    shown = _rendered(tokenizer, question, [PROBE])
    if shown is None or PROBE["function"]["name"] not in shown:
        result = [*question, {"role": "assistant", "content": "."}, {"role": "tool", "content": "lmrl-result"}]
        return ToolFormat("plain", "lmrl-result" in (_rendered(tokenizer, result, None) or ""))
    if "[TOOL_CALLS]" in template:
        return ToolFormat("mistral")
    if "<tool_call>" in template:
        return ToolFormat("hermes")
    return ToolFormat("llama")


def _rendered(tokenizer: Any, messages: Messages, tools: list[Tool] | None) -> str | None:
    try:
        text: str = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=True)
        return text
    except Exception:  # a template may raise anything
        return None


def plain_text(calls: list[dict[str, Any]]) -> str:
    """Calls in the plain format."""
    written = []
    for call in calls:
        arguments = ", ".join(f"{name}={value!r}" for name, value in call["function"]["arguments"].items())
        written.append(f"{call['function']['name']}({arguments})")
    return f"[{', '.join(written)}]"


def with_instructions(messages: Messages, tools: list[Tool]) -> Messages:
    """Messages whose system message describes the tools and how to call them in the plain format."""
    lines = ["To call a tool, end with [name(argument=value)]:"]
    for tool in tools:
        function = tool["function"]
        names = ", ".join(_properties(tool))
        lines.append(f"{function['name']}({names}): {function.get('description') or ''}".rstrip(": "))
    text = "\n".join(lines)
    if messages and messages[0]["role"] == "system":
        return [{"role": "system", "content": f"{messages[0]['content']}\n\n{text}"}, *messages[1:]]
    return [{"role": "system", "content": text}, *messages]
