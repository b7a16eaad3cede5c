"""A small HTTP server for a reward function (see http.py for the protocol)."""

from __future__ import annotations

import hmac
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from lmrl.errors import LmrlError, RunError
from lmrl.rewards.rewards import RewardFunction, score
from lmrl.secrets import LOOPBACK


class RewardServer(ThreadingHTTPServer):
    """Serves one reward. A function in this process serves one request at a time, workers as many as there are workers.

    token: required of requests; without one, only loopback addresses are allowed. max_mb: maximum size of a request.
    read_seconds: a client that sends nothing for this long is dropped. Raises RunError if the address cannot be used.
    """

    daemon_threads = True

    def __init__(
        self,
        function: RewardFunction,
        host: str = "127.0.0.1",
        port: int = 8765,
        token: str | None = None,
        max_mb: float = 16,
        read_seconds: float = 30,
    ):
        if host not in LOOPBACK and not token:
            raise RunError(f"--host {host}: others could reach this server; give it a token with --token-env NAME")
        self.function, self.token, self.max_bytes = function, token, int(max_mb * 2**20)
        self.read_seconds = read_seconds
        self.turns = threading.Semaphore(function.parallel)
        try:
            super().__init__((host, port), _Handler)
        except OSError as error:
            raise RunError(f"{host}:{port} cannot be served: {error.strerror}; choose another --port") from error


class _Handler(BaseHTTPRequestHandler):
    server: RewardServer
    protocol_version = "HTTP/1.1"  # connections stay open
    disable_nagle_algorithm = (
        True  # else the body of each further answer waits until the client acknowledges the headers
    )

    def setup(self) -> None:
        self.timeout = self.server.read_seconds  # type: ignore[misc]  # typeshed declares it for the class only
        super().setup()

    def do_GET(self) -> None:
        if self.path == "/health":
            self._answer(200, {"reward": self.server.function.origin})
        else:
            self._answer(404, {"error": "GET /health, or POST a batch"}, close=True)

    def do_POST(self) -> None:
        token = self.server.token
        if token and not hmac.compare_digest(
            self.headers.get("Authorization", "").encode(), f"Bearer {token}".encode()
        ):
            return self._answer(401, {"error": "a bearer token is required"}, close=True)
        try:
            size = int(self.headers.get("Content-Length", ""))
        except ValueError:
            return self._answer(411, {"error": "a Content-Length is required"}, close=True)
        if not 0 <= size <= self.server.max_bytes:
            return self._answer(413, {"error": f"more than {self.server.max_bytes / 2**20:g} MB"}, close=True)
        try:
            columns = _columns(json.loads(self.rfile.read(size)))
        except ValueError as error:
            return self._answer(400, {"error": str(error)})
        try:
            with self.server.turns:
                found = score(self.server.function, columns)
        except LmrlError as error:
            return self._answer(422, {"error": str(error)})
        self._answer(200, {"scores": found.values, "causes": found.causes})

    def _answer(self, code: int, content: dict[str, Any], close: bool = False) -> None:
        """close: end the connection, because the request's body has not been read."""
        data = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        if close:
            self.send_header("Connection", "close")  # sets close_connection as well
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


def _columns(payload: Any) -> dict[str, list[Any]]:
    """The columns of a request, checked. Raises ValueError."""
    if not isinstance(payload, dict):
        raise ValueError("expected an object with prompts and completions")
    columns = payload.get("columns") or {}
    if not isinstance(columns, dict):
        raise ValueError("'columns' must be an object of lists")
    columns = columns | {name: payload.get(name) for name in ("prompts", "completions")}
    sizes = {name: len(column) if isinstance(column, list) else None for name, column in columns.items()}
    if None in sizes.values() or len(set(sizes.values())) != 1 or not sizes["prompts"]:
        raise ValueError(f"prompts, completions and columns must be non-empty lists of the same length: {sizes}")
    return columns
