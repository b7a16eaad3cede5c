"""HTTP/1.1 over asyncio within limits. Parsing is done by h11, as in httpx and uvicorn."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from typing import Any

import h11

from lmrl.errors import RunError

log = logging.getLogger(__name__)
CHUNK = 65536


@dataclass(frozen=True)
class Limits:
    """Limits on clients.

    body_bytes: size of a request. read_seconds: for a request to arrive completely. write_seconds: for a client to
    receive what is sent. idle_seconds: between two requests of a connection. connections: open at a time.
    grace_seconds: for running requests when the server stops.
    """

    body_bytes: int = 8 * 2**20
    head_bytes: int = 32 * 2**10
    read_seconds: float = 30
    write_seconds: float = 30
    idle_seconds: float = 75
    connections: int = 1024
    grace_seconds: float = 30


@dataclass(frozen=True)
class HTTPRequest:
    method: str
    path: str
    headers: dict[str, str]
    """Names in lower case."""
    body: bytes = b""


@dataclass
class HTTPResponse:
    """An answer: a body, or the parts of a stream."""

    status: int
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    stream: AsyncGenerator[bytes, None] | None = None
    content_type: str = "application/json"


Handler = Callable[[HTTPRequest], Awaitable[HTTPResponse]]


class Refused(Exception):
    """A request that gets an error status at once; the connection is then closed."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


class Disconnected(Exception):
    """The client has disconnected, or does not read."""


def error_body(
    message: str, kind: str = "invalid_request_error", code: str | None = None, param: str | None = None
) -> bytes:
    """An error in OpenAI's form."""
    return json.dumps({"error": {"message": message, "type": kind, "param": param, "code": code}}).encode()


class HTTPServer:
    """Serves a handler in the running event loop."""

    def __init__(self, handler: Handler, limits: Limits = Limits()):
        self.handler, self.limits = handler, limits
        self.ending = False
        self._server: asyncio.Server | None = None
        self._connections: dict[asyncio.Task[None], bool] = {}
        """Tasks of connections, and whether each is serving a request."""

    async def start(self, host: str, port: int) -> int:
        """Listen; returns the port. Raises RunError if the address cannot be used."""
        try:
            self._server = await asyncio.start_server(self._accepted, host, port, limit=CHUNK)
        except OSError as error:
            raise RunError(f"{host}:{port} cannot be served: {error.strerror}; choose another --port") from error
        return int(self._server.sockets[0].getsockname()[1])

    async def close(self, grace: float | None = None) -> None:
        """Stop listening, let running requests finish within `grace` seconds (None: the limit), end the rest."""
        self.ending = True
        if self._server is not None:
            self._server.close()
        for task, serving in list(self._connections.items()):
            if not serving:
                task.cancel()
        left = set(self._connections)
        if left:
            await asyncio.wait(left, timeout=self.limits.grace_seconds if grace is None else grace)
        for task in list(self._connections):
            task.cancel()
        if self._connections:
            await asyncio.wait(list(self._connections))

    # ------------------------------------------------------------------------------------------------------ connections
    async def _accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections[task] = False
        try:
            await _Connection(self, reader, writer, task).run()
        except (Disconnected, ConnectionError, TimeoutError, asyncio.CancelledError):
            pass  # asyncio would report a cancelled connection as an error
        finally:
            del self._connections[task]
            with suppress(Exception):
                writer.transport.abort() if self.ending else writer.close()

    def serving(self, task: asyncio.Task[None], now: bool) -> None:
        self._connections[task] = now

    @property
    def full(self) -> bool:
        return len(self._connections) > self.limits.connections


class _Connection:
    def __init__(
        self,
        server: HTTPServer,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        task: asyncio.Task[None],
    ):
        self.server, self.limits, self.reader, self.writer, self.task = server, server.limits, reader, writer, task
        self.http = h11.Connection(h11.SERVER, max_incomplete_event_size=server.limits.head_bytes)

    async def run(self) -> None:
        first = True
        while True:
            try:
                request = await self._request(first)
            except Refused as error:
                await self._refuse(error)
                return
            if request is None:
                return
            first = False
            self.server.serving(self.task, True)
            await self._serve(request)
            self.server.serving(self.task, False)
            if self.http.our_state is not h11.DONE or self.http.their_state is not h11.DONE or self.server.ending:
                return
            self.http.start_next_cycle()

    async def _request(self, first: bool) -> HTTPRequest | None:
        """The next request; None at the end of the connection. Raises Refused."""
        if self.server.full:
            raise Refused(503, "too many connections")
        limits = self.limits
        if not self.http.trailing_data[0]:
            try:
                data = await asyncio.wait_for(
                    self.reader.read(CHUNK), limits.read_seconds if first else limits.idle_seconds
                )
            except TimeoutError:
                return None
            self.http.receive_data(data)
            if not data:
                return None
        try:
            return await asyncio.wait_for(self._arriving(), limits.read_seconds)
        except TimeoutError as error:
            raise Refused(408, f"the request did not arrive within {limits.read_seconds:g} s") from error
        except h11.RemoteProtocolError as error:
            raise Refused(error.error_status_hint or 400, f"not an HTTP request: {error}") from error

    async def _arriving(self) -> HTTPRequest | None:
        head: h11.Request | None = None
        body = bytearray()
        while True:
            event = self.http.next_event()
            if event is h11.NEED_DATA:
                if self.http.they_are_waiting_for_100_continue:
                    await self._send(h11.InformationalResponse(status_code=100, headers=[], reason=b"Continue"))
                self.http.receive_data(await self.reader.read(CHUNK))
            elif isinstance(event, h11.Request):
                head = event
                length = next((value for name, value in event.headers if name == b"content-length"), b"0")
                self._check_size(int(length))
            elif isinstance(event, h11.Data):
                self._check_size(len(body) + len(event.data))
                body += event.data
            elif isinstance(event, h11.EndOfMessage):
                assert head is not None
                headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in head.headers}
                path = head.target.decode("latin-1").partition("?")[0]
                return HTTPRequest(head.method.decode("latin-1"), path, headers, bytes(body))
            else:  # the client has closed the connection
                return None

    def _check_size(self, size: int) -> None:
        if size > self.limits.body_bytes:
            raise Refused(413, f"the body is larger than {self.limits.body_bytes / 2**20:g} MB")

    async def _serve(self, request: HTTPRequest) -> None:
        """Answer a request; its work is cancelled if the client disconnects."""
        work = asyncio.ensure_future(self._answer(request))
        ahead = asyncio.ensure_future(self.reader.read(CHUNK))
        try:
            await asyncio.wait([work, ahead], return_when=asyncio.FIRST_COMPLETED)
            if not work.done() and not ahead.result():
                raise Disconnected
            await work
        finally:
            for task in (work, ahead):
                task.cancel()
            await asyncio.gather(work, ahead, return_exceptions=True)
        if not ahead.cancelled():  # the next request, pipelined; further ones wait in the socket
            self.http.receive_data(ahead.result())

    async def _answer(self, request: HTTPRequest) -> None:
        try:
            response = await self.server.handler(request)
        except Exception:
            log.exception("a request failed")
            response = HTTPResponse(500, error_body("the server failed", "server_error"))
        await self._respond(response, with_body=request.method != "HEAD")

    async def _respond(self, response: HTTPResponse, with_body: bool) -> None:
        headers = {"Content-Type": response.content_type, "Cache-Control": "no-store"} | response.headers
        if self.server.ending:
            headers["Connection"] = "close"
        if response.stream is None:
            headers["Content-Length"] = str(len(response.body))
        else:
            headers["Transfer-Encoding"] = "chunked"
        await self._send(h11.Response(status_code=response.status, headers=list(headers.items())))
        if response.stream is None:
            await self._send(h11.Data(data=response.body if with_body else b""))
        else:
            async with aclosing(response.stream) as parts:
                async for part in parts:
                    await self._send(h11.Data(data=part))
        await self._send(h11.EndOfMessage())

    async def _refuse(self, error: Refused) -> None:
        if self.http.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            return
        kind = "server_error" if error.status >= 500 else "invalid_request_error"
        body = error_body(str(error), kind)
        headers = [("Content-Type", "application/json"), ("Content-Length", str(len(body))), ("Connection", "close")]
        await self._send(h11.Response(status_code=error.status, headers=headers))
        await self._send(h11.Data(data=body))
        await self._send(h11.EndOfMessage())
        await self._drain_input()

    async def _drain_input(self) -> None:
        """Keep reading for a moment: otherwise a client that is still sending would be reset before it has read the
        answer."""
        self.writer.write_eof()
        with suppress(TimeoutError, ConnectionError):
            async with asyncio.timeout(1):
                while await self.reader.read(CHUNK):
                    pass

    async def _send(self, event: Any) -> None:
        data = self.http.send(event)
        if not data:
            return
        self.writer.write(data)
        try:
            await asyncio.wait_for(self.writer.drain(), self.limits.write_seconds)
        except (TimeoutError, ConnectionError) as error:
            self.writer.transport.abort()
            raise Disconnected from error
