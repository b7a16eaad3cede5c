"""Tools that a recipe names: functions with type hints, and tools of MCP servers."""

from __future__ import annotations

import asyncio
import inspect
import json
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from itertools import takewhile
from typing import Any, Protocol, cast, get_type_hints

from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from lmrl.coroutines import call_user, in_thread
from lmrl.errors import PluginError, first_of
from lmrl.plugins.loading import load_plugin
from lmrl.tools.formats import Tool

SECONDS, CHARACTERS = 30.0, 4000
"""Default time limit of a call, and maximum length of its result."""
PREFIX = "parameter_"
"""Of the fields that hold a tool's parameters."""


class ToolFailed(Exception):
    """A call failed; the model reads the message unchanged."""


class ToolLost(Exception):
    """A tool is no longer available, whatever the model wrote: the episode fails."""


class OfferedTool(Protocol):
    """A tool that a model may call. name: the name it calls."""

    name: str

    @property
    def described(self) -> Tool:
        """The tool as OpenAI's API describes it."""

    def check(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """The arguments that the tool is called with. Raises ToolFailed."""

    def instance(self) -> Callable[..., Any]:
        """The callable for one episode."""


class PythonTool:
    """A function whose parameters are type-hinted, or a class whose instances are called: a new one for each episode.

    name: how the model calls it. key: the recipe's key, for messages. Raises PluginError for parameters that cannot be
    described.
    """

    def __init__(self, call: Callable[..., Any], key: str = "task.tools"):
        if not callable(call):
            raise PluginError(f"{key}: {call!r:.60} is not a function")
        self.call, self.key = call, key
        self.name: str = getattr(call, "__name__", type(call).__name__)
        target = call.__call__ if inspect.isclass(call) else call
        skipped = 1 if inspect.isclass(call) else 0
        if inspect.isclass(call):
            _check_made_without_arguments(call, self.name, key)
        self.arguments, self.schema = _model_of(target, self.name, key, skipped)
        self.text = inspect.cleandoc(getattr(call, "__doc__", None) or "").partition("\n\n")[0]

    @property
    def described(self) -> Tool:
        """The tool as OpenAI's API describes it."""
        return {
            "type": "function",
            "function": {"name": self.name, "description": " ".join(self.text.split()), "parameters": self.schema},
        }

    def check(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """The arguments with the types of the hints. Raises ToolFailed."""
        try:
            checked = self.arguments.model_validate(arguments)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"])) or "arguments"
            raise ToolFailed(f"error: {place}: {first['msg']}") from error
        return {name.removeprefix(PREFIX): getattr(checked, name) for name in type(checked).model_fields}

    def instance(self) -> Callable[..., Any]:
        """The callable for one episode."""
        made: Any = self.call() if inspect.isclass(self.call) else self.call
        return cast(Callable[..., Any], made)


class ToolBox:
    """The tools of one episode. seconds: time limit of a call; characters: maximum length of a result; of longer ones
    the middle is left out. failed: calls that failed so far."""

    def __init__(self, tools: Sequence[OfferedTool], seconds: float = SECONDS, characters: int = CHARACTERS):
        self.tools = {tool.name: tool for tool in tools}
        self.calls = {tool.name: tool.instance() for tool in tools}
        self.seconds, self.characters = seconds, characters
        self.failed = 0

    async def run(self, name: str, arguments: dict[str, Any]) -> str:
        """The result of a call as text; errors become text too, for the model to read. Raises ToolLost."""
        try:
            text = await self._run(name, arguments)
        except ToolFailed as error:
            self.failed += 1
            text = str(error)
        text = shortened(text, self.characters)
        return text.encode(errors="replace").decode()  # without the lone surrogates of undecodable file names

    async def _run(self, name: str, arguments: dict[str, Any]) -> str:
        """The result of a call as text. Raises ToolFailed or ToolLost."""
        tool = self.tools.get(name)
        if tool is None:
            raise ToolFailed(f"error: there is no tool '{name:.60}'; the tools are {', '.join(self.tools)}")
        call = self.calls[name]
        try:
            given = tool.check(arguments)
            async with asyncio.timeout(self.seconds) as limit:
                return as_text(await _listed(await call_user(call, **given)))
        except (ToolLost, ToolFailed):
            raise
        except (Exception, SystemExit) as error:
            late = isinstance(error, TimeoutError) and limit.expired()
            raise ToolFailed(f"error: {f'timed out after {self.seconds:g} s' if late else _reason(error)}") from error


def load_tools(names: Sequence[Any]) -> list[OfferedTool]:
    """The tools that a recipe names. Raises PluginError.

    A name is `file.py:function`, a dotted path, `python`, `{python: {seconds: 5}}`, or a server: `{mcp: {command:
    [...]}}`, `{mcp: {url: ...}}`, which is started or connected to.
    """
    tools: list[OfferedTool] = []
    for index, name in enumerate(names):
        tools += _load(name, f"task.tools.{index}")
    called = [tool.name for tool in tools]
    if twice := [name for name in called if called.count(name) > 1]:
        raise PluginError(f"task.tools: two tools are called '{twice[0]}'")
    return tools


def _load(name: Any, key: str) -> Sequence[OfferedTool]:
    if isinstance(name, str) and name != "python":
        return [PythonTool(load_plugin(name, key), key)]
    kinds = {"python": None} if name == "python" else dict(name)
    if kinds.keys() == {"python"}:
        from lmrl.tools.sandbox import python_tool

        return [PythonTool(python_tool(kinds["python"] or {}, key), key)]
    if kinds.keys() == {"mcp"}:
        from lmrl.tools.mcp_server import mcp_tools

        return mcp_tools(kinds["mcp"], key)
    raise PluginError(
        f"{key}: {', '.join(map(repr, kinds)) or 'nothing'} is not a kind of tool; write {{python: ...}} or {{mcp: ...}}"
    )


async def _listed(result: Any) -> Any:
    """The items that a generator yields, as a list; any other result unchanged. One that nobody waits for any more is
    stopped."""
    if isinstance(result, AsyncIterator):
        return [item async for item in result]
    if not isinstance(result, Iterator):
        return result
    stopped = threading.Event()
    try:
        return await in_thread(lambda: list(takewhile(lambda _: not stopped.is_set(), result)))
    finally:
        stopped.set()


def as_text(result: Any) -> str:
    """A result as the model reads it: text unchanged, other data as JSON if possible."""
    if isinstance(result, str):
        return result
    try:
        return json.dumps(result, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        return str(result)


def shortened(text: str, characters: int) -> str:
    """The text, with its middle left out if it is longer."""
    if len(text) <= characters:
        return text
    half = characters // 2
    return f"{text[:half]}\n[... {len(text) - 2 * half} characters ...]\n{text[len(text) - half :]}"


def _reason(error: BaseException) -> str:
    error = first_of(error)
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _check_made_without_arguments(cls: type, name: str, key: str) -> None:
    try:
        inspect.signature(cls).bind()
    except TypeError as error:
        raise PluginError(f"{key}: class '{name}' is made without arguments, but {error}: give it a default") from error
    except ValueError:
        pass  # written in C


def _model_of(call: Callable[..., Any], name: str, key: str, skipped: int) -> tuple[type[BaseModel], dict[str, Any]]:
    """The parameters of a function as a model that checks them, and its JSON schema. Parameters are aliases of its
    fields, because a parameter may be called like a method of the model (`json`, `copy`)."""
    parameters = list(inspect.signature(call).parameters.values())[skipped:]
    try:
        hints = get_type_hints(call, include_extras=True)
    except Exception as error:  # names in annotations that do not exist
        raise PluginError(f"{key}: the type hints of '{name}' cannot be read: {error}") from error
    fields: dict[str, Any] = {}
    for parameter in parameters:
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise PluginError(
                f"{key}: '{name}' takes *{parameter.name}, which cannot be described to a model: name its parameters"
            )
        if parameter.name not in hints:
            raise PluginError(f"{key}: parameter '{parameter.name}' of '{name}' has no type hint: add one")
        default = ... if parameter.default is parameter.empty else parameter.default
        fields[PREFIX + parameter.name] = (hints[parameter.name], default)
    config = ConfigDict(extra="forbid", alias_generator=lambda field: field.removeprefix(PREFIX))
    try:
        model = create_model(name, __config__=config, **fields)
        schema = _without_titles(model.model_json_schema())
        schema.pop("additionalProperties", None)
        return model, schema
    except Exception as error:  # a type without a JSON schema
        raise PluginError(f"{key}: '{name}' cannot be described: {' '.join(str(error).split()):.200}") from error


def _without_titles(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            name: _without_titles(one) for name, one in value.items() if not (name == "title" and isinstance(one, str))
        }
    return [_without_titles(one) for one in value] if isinstance(value, list) else value
