"""Tools of MCP servers (Model Context Protocol): a command that a run starts, or an address. Needs the package `mcp`.

One server serves all episodes of a process concurrently. Its connection lives in an event loop in a separate thread,
because episodes are played in loops that end with their batch. A server that has ended is restarted by the next call.
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import threading
import time
import weakref
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack, suppress
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from lmrl.errors import PluginError, first_of
from lmrl.extras import need
from lmrl.secrets import redact, remember
from lmrl.tools.formats import Tool
from lmrl.tools.functions import ToolFailed, ToolLost, as_text

T = TypeVar("T")
ALIVE_SECONDS = 5.0
"""Seconds that a server may take to list its tools again after a call without an answer."""
END_SECONDS = 8.0
"""Seconds to wait for a server's end; the package asks it to end, and kills it after four."""
LAST_BYTES = 2000
"""Bytes of a server's error output that are kept for messages."""
CLOSED = -32000
"""The package's error code for a closed connection."""
PAGES = 100
"""Maximum pages of a list of tools."""


class McpServer(BaseModel):
    """A server: command and arguments of a process, or url of one that runs (streamable HTTP)."""

    model_config = ConfigDict(extra="forbid")

    command: list[str] = []
    env: list[str] = []
    """Names of environment variables that are passed to the command besides HOME, LOGNAME, PATH, SHELL, TERM and
    USER."""
    url: str | None = None
    token_env: str | None = None
    """Environment variable that holds the token for `url`."""
    only: list[str] = []
    """The tools that are offered, by their names at the server (empty: all)."""
    start_seconds: float = Field(60, gt=0)
    """Seconds that it may take to start and to list its tools."""

    @model_validator(mode="after")
    def _one_address(self) -> McpServer:
        if bool(self.command) == bool(self.url):
            raise ValueError("set either `command`, a program and its arguments, or `url`")
        if self.url is not None and not re.match(r"https?://", self.url):
            raise ValueError(f"url: {self.url!r:.80} does not begin with http:// or https://")
        if (self.env and not self.command) or (self.token_env and not self.url):
            raise ValueError("`env` goes with `command`, and `token_env` with `url`")
        return self

    @property
    def shown(self) -> str:
        """The server, for messages."""
        return redact(self.url or " ".join(self.command))


class McpTool:
    """A tool of a server. name: how the model calls it, the server's name for it, with all but word characters replaced
    by `_`."""

    def __init__(self, connection: Connection, name: str, text: str, schema: dict[str, Any]):
        self.connection, self.real_name, self.text, self.schema = connection, name, text, schema
        self.name = re.sub(r"\W", "_", name)

    @property
    def described(self) -> Tool:
        """The tool as OpenAI's API describes it."""
        shown = {name: value for name, value in self.schema.items() if name not in ("$schema", "title")}
        return {
            "type": "function",
            "function": {"name": self.name, "description": " ".join(self.text.split()), "parameters": shown},
        }

    def check(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """The arguments, unchanged: the server checks them."""
        return {"arguments": arguments}

    def instance(self) -> Callable[..., Any]:
        """A function that calls the server."""

        async def call(arguments: dict[str, Any]) -> str:
            return await self.connection.call(self.real_name, arguments)

        return call


def mcp_tools(settings: Any, key: str = "task.tools") -> list[McpTool]:
    """The tools of a server, which is started or connected to. Raises PluginError."""
    try:
        server = McpServer.model_validate(settings)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(["mcp", *map(str, first["loc"])])
        raise PluginError(f"{key}: {place}: {first['msg'].removeprefix('Value error, ')}") from error
    need("mcp", f"{key}: an MCP server", PluginError)
    if server.command and shutil.which(server.command[0]) is None:
        raise PluginError(f"{key}: mcp.command: '{server.command[0]}' is not a program on this machine")
    for name in [*server.env, *([server.token_env] if server.token_env else [])]:
        if not os.environ.get(name):
            raise PluginError(f"{key}: mcp: the environment variable {name} is not set")
    if server.token_env:
        remember(os.environ[server.token_env])
    try:
        connection = Connection(server)
        listed = connection.tools()
    except ToolLost as error:
        raise PluginError(f"{key}: mcp: {error}") from error
    if missing := [name for name in server.only if name not in listed]:
        raise PluginError(f"{key}: mcp.only: {server.shown} has no tool '{missing[0]}'; it has {', '.join(listed)}")
    if not listed:
        raise PluginError(f"{key}: mcp: {server.shown} has no tools")
    chosen = server.only or list(listed)
    return [McpTool(connection, name, *listed[name]) for name in chosen]


class Connection:
    """A server in use, for all threads and event loops. It ends with the last tool that holds it, or with the
    process."""

    def __init__(self, server: McpServer):
        self._loop = asyncio.new_event_loop()
        self._link = _Link(server)
        thread = threading.Thread(target=_run_and_close, args=(self._loop,), name="lmrl-mcp", daemon=True)
        thread.start()
        self._finalizer = weakref.finalize(self, _end, self._loop, self._link, thread, os.getpid())

    def tools(self) -> dict[str, tuple[str, dict[str, Any]]]:
        """Description and schema of each tool. Raises ToolLost."""
        listed: dict[str, tuple[str, dict[str, Any]]] = self._submit(self._link.tools()).result()
        return listed

    async def call(self, name: str, arguments: dict[str, Any]) -> str:
        """The result of a tool as text. Raises ToolFailed, or ToolLost if the server cannot be restarted."""
        return await asyncio.wrap_future(self._submit(self._link.call(name, arguments)))

    def close(self) -> None:
        """End the server, or the connection to it."""
        self._finalizer()

    def _submit(self, work: Coroutine[Any, Any, T]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop)


def _run_and_close(loop: asyncio.AbstractEventLoop) -> None:
    loop.run_forever()
    loop.close()


def _end(loop: asyncio.AbstractEventLoop, link: _Link, thread: threading.Thread, owner: int) -> None:
    if os.getpid() != owner or not thread.is_alive():  # a forked process has neither the thread nor the server
        return

    async def stop() -> None:
        with suppress(Exception):
            await link.drop()
        loop.stop()

    asyncio.run_coroutine_threadsafe(stop(), loop)
    if thread is not threading.current_thread():
        thread.join(END_SECONDS)


class _Link:
    """The connection, inside its loop. `_life` is the task that holds it open: clients of the package are bound to
    one."""

    def __init__(self, server: McpServer):
        self.server = server
        self._lock = asyncio.Lock()
        self._client: Any = None
        self._life: asyncio.Task[None] | None = None
        self._stop = asyncio.Event()
        self._suspected: Any = None
        self._lost: tuple[float, str] | None = None

    async def tools(self) -> dict[str, tuple[str, dict[str, Any]]]:
        async with self._lock:
            client, _ = await self._connected()
            try:
                async with asyncio.timeout(self.server.start_seconds):
                    listed: dict[str, tuple[str, dict[str, Any]]] = {}
                    cursor = None
                    for _ in range(PAGES):
                        page = await client.list_tools(cursor=cursor)
                        listed |= {tool.name: (tool.description or "", tool.input_schema) for tool in page.tools}
                        cursor = page.next_cursor
                        if cursor is None:
                            break
                    return listed
            except Exception as error:
                raise ToolLost(f"{self.server.shown} does not list its tools: {_reason(error)}") from error

    async def call(self, name: str, arguments: dict[str, Any]) -> str:
        connecting = asyncio.ensure_future(self._ready())
        connecting.add_done_callback(
            lambda task: task.cancelled() or task.exception()
        )  # retrieved, even if nobody waits any more
        client, life = await asyncio.shield(connecting)
        asked = asyncio.ensure_future(client.call_tool(name, arguments))
        try:
            await asyncio.wait({asked, life}, return_when=asyncio.FIRST_COMPLETED)
        finally:  # also after the caller's timeout
            if not asked.done() or asked.cancelled() or asked.exception() is not None:
                self._suspected = client
            asked.cancel()
        if not asked.done() or asked.cancelled() or _is_closed(asked.exception()):
            raise ToolFailed("error: the tool's server ended during the call")
        if (error := asked.exception()) is not None:
            raise ToolFailed(f"error: {_reason(error)}") from error
        result = asked.result()
        text = _text(result)
        if result.is_error:
            raise ToolFailed(f"error: {text}")
        return text

    async def _ready(self) -> tuple[Any, asyncio.Task[None]]:
        """The client of a server that is believed to answer, after a restart if need be."""
        async with self._lock:
            if self._suspected is not None and self._suspected is self._client:
                try:
                    async with asyncio.timeout(ALIVE_SECONDS):
                        await self._client.list_tools(cache_mode="refresh")
                except (Exception, asyncio.CancelledError):
                    await self.drop()
            self._suspected = None
            return await self._connected()

    async def _connected(self) -> tuple[Any, asyncio.Task[None]]:
        """The client, connected if it is not. For holders of the lock."""
        if self._life is not None and not self._life.done():
            return self._client, self._life
        if self._lost is not None and time.monotonic() < self._lost[0]:
            raise ToolLost(self._lost[1])
        self._stop = asyncio.Event()
        ready: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        tail = _Tail()
        life = asyncio.ensure_future(self._hold(ready, self._stop, tail))
        await asyncio.wait({ready, life}, timeout=self.server.start_seconds, return_when=asyncio.FIRST_COMPLETED)
        if not ready.done():
            over = not life.done()
            life.cancel()
            await asyncio.wait({life}, timeout=END_SECONDS)
            error = None if not life.done() or life.cancelled() else life.exception()
            why = f"not ready after {self.server.start_seconds:g} s" if over or error is None else _reason(error)
            last = await asyncio.to_thread(tail.last_line)
            text = (
                f"{self.server.shown} cannot be started or reached: {why}{f'; its last output: {last}' if last else ''}"
            )
            self._lost = (time.monotonic() + self.server.start_seconds, text)
            raise ToolLost(text)
        self._client, self._life, self._lost = ready.result(), life, None
        return self._client, life

    async def _hold(self, ready: asyncio.Future[Any], stop: asyncio.Event, tail: _Tail) -> None:
        try:
            async with AsyncExitStack() as stack:
                client = await stack.enter_async_context(await self._opened(stack, tail))
                ready.set_result(client)
                await stop.wait()
        finally:
            tail.close()

    async def _opened(self, stack: AsyncExitStack, tail: _Tail) -> Any:
        from mcp import Client, StdioServerParameters
        from mcp.client.stdio import stdio_client
        from mcp.client.streamable_http import streamable_http_client

        if self.server.url is None:
            given = {name: os.environ[name] for name in self.server.env}
            program, *arguments = self.server.command
            parameters = StdioServerParameters(command=program, args=arguments, env=given)
            return Client(stdio_client(parameters, errlog=tail.file))
        if self.server.token_env is None:
            return Client(self.server.url)
        import httpx2

        headers = {"Authorization": f"Bearer {os.environ[self.server.token_env]}"}
        http = await stack.enter_async_context(
            httpx2.AsyncClient(headers=headers, timeout=httpx2.Timeout(30, read=300))
        )
        return Client(streamable_http_client(self.server.url, http_client=http))

    async def drop(self) -> None:
        """End the connection, and the process behind it."""
        life, self._life, self._client = self._life, None, None
        if life is not None:
            self._stop.set()
            await asyncio.wait({life}, timeout=END_SECONDS)
            if life.done() and not life.cancelled():
                life.exception()  # retrieved


class _Tail:
    """The end of what a server writes to its error output."""

    def __init__(self) -> None:
        read, write = os.pipe()
        self.file = os.fdopen(write, "w")
        self._kept = b""
        self._reader = threading.Thread(target=self._read, args=(read,), daemon=True)
        self._reader.start()

    def _read(self, descriptor: int) -> None:
        while part := os.read(descriptor, 65536):
            self._kept = (self._kept + part)[-LAST_BYTES:]
        os.close(descriptor)

    def last_line(self) -> str:
        """Its last line; for a server that has ended."""
        self._reader.join(1)
        lines = [line.strip() for line in self._kept.decode(errors="replace").splitlines() if line.strip()]
        return redact(lines[-1]) if lines else ""

    def close(self) -> None:
        self.file.close()


def _text(result: Any) -> str:
    """A result as text: its texts, or else its data; other contents are named by type."""
    parts = []
    for block in result.content:
        resource = getattr(block, "resource", None)
        text = getattr(block, "text", None) if resource is None else getattr(resource, "text", None)
        parts.append(f"[{block.type}]" if text is None else text)
    if not parts and result.structured_content is not None:
        return as_text(result.structured_content)
    return "\n".join(parts)


def _is_closed(error: BaseException | None) -> bool:
    return getattr(error, "code", None) == CLOSED


def _reason(error: BaseException) -> str:
    """An error in one line; for an exception group, its first error."""
    error = first_of(error)
    text = " ".join(str(error).split())
    return redact(text or type(error).__name__)
