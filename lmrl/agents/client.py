"""The client that an agent is given: the `openai` package's if it is installed, else a small one with the same
interface.

    answer = await client.chat.completions.create(messages=[...], max_tokens=100)     # an agent that is `async def`
    answer = client.chat.completions.create(messages=[...], tools=[...])              # a plain function
    answer.choices[0].message.content

The small client has `chat.completions.create`, `completions.create` and `models.list`, without `stream`.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import urllib3

from lmrl.coroutines import in_thread
from lmrl.serve.http import HTTPRequest, HTTPResponse

Dispatch = Callable[[HTTPRequest], Awaitable[HTTPResponse]]
ABSENT = ("tool_calls", "logprobs", "usage", "refusal", "name", "tool_call_id", "code", "param")
"""Fields that may be missing in answers: they are then None, as in the `openai` package."""


class APIError(Exception):
    """The server refused a request. `status_code`, and OpenAI's `code`, give the reason."""

    def __init__(self, message: str, status_code: int, code: str | None = None):
        super().__init__(message)
        self.status_code, self.code = status_code, code


class Reply(dict[str, Any]):
    """An answer whose fields are both attributes and keys."""

    def __getattr__(self, name: str) -> Any:
        if name in self or name in ABSENT:
            return self.get(name)
        raise AttributeError(f"the answer has no '{name}'; it has {', '.join(self)}")

    def model_dump(self, **_: Any) -> dict[str, Any]:
        """The answer as plain data."""
        plain: dict[str, Any] = json.loads(json.dumps(self))
        return plain


class Client:
    """A client for synchronous code. base_url: up to and including /v1."""

    def __init__(self, base_url: str, api_key: str, timeout: float | None = 600):
        self.base_url, self.api_key, self.timeout = base_url.rstrip("/"), api_key, timeout
        self._pool = urllib3.PoolManager(num_pools=1, maxsize=16)
        self.chat = SimpleNamespace(completions=SimpleNamespace(create=self._call("POST", "/chat/completions")))
        self.completions = SimpleNamespace(create=self._call("POST", "/completions"))
        self.models = SimpleNamespace(list=self._call("GET", "/models"))

    def _call(self, method: str, path: str) -> Callable[..., Any]:
        return lambda **fields: self.request(method, path, fields)

    def request(self, method: str, path: str, fields: dict[str, Any]) -> Reply:
        """The answer to a request. Raises APIError."""
        answer = self._pool.request(
            method,
            self.base_url + path,
            body=_body(method, fields),
            headers={"Content-Type": "application/json", "Authorization": f"Bearer {self.api_key}"},
            timeout=urllib3.Timeout(total=self.timeout),
            retries=False,
        )
        return _reply(answer.status, answer.data)

    def close(self) -> None:
        self._pool.clear()


class AsyncClient(Client):
    """The same for coroutines. dispatch: the server itself if it is in this process, so that no socket is used."""

    def __init__(self, base_url: str, api_key: str, timeout: float | None = 600, dispatch: Dispatch | None = None):
        super().__init__(base_url, api_key, timeout)
        self._dispatch = dispatch

    def _call(self, method: str, path: str) -> Callable[..., Any]:
        async def call(**fields: Any) -> Reply:
            if self._dispatch is None:
                return await in_thread(lambda: self.request(method, path, fields))
            headers = {"content-type": "application/json", "authorization": f"Bearer {self.api_key}"}
            where = urlsplit(self.base_url).path + path
            body = _body(method, fields)
            answer = await self._dispatch(HTTPRequest(method, where, headers, body or b""))
            return _reply(answer.status, answer.body)

        return call


def client_for(
    is_async: bool, base_url: str, api_key: str, timeout: float | None, dispatch: Dispatch | None = None
) -> Any:
    """The client for an agent: the `openai` package's if it is installed."""
    if find_spec("openai") is not None:
        import openai

        cls = openai.AsyncOpenAI if is_async else openai.OpenAI
        return cls(base_url=base_url, api_key=api_key, timeout=timeout, max_retries=0)
    return AsyncClient(base_url, api_key, timeout, dispatch) if is_async else Client(base_url, api_key, timeout)


def _body(method: str, fields: dict[str, Any]) -> bytes | None:
    if fields.get("stream"):
        raise TypeError("stream: the small client has no streams; pip install openai")
    more = fields.pop("extra_body", None) or {}
    return json.dumps(fields | more).encode() if method == "POST" else None


def _reply(status: int, body: bytes) -> Reply:
    content = json.loads(body, object_pairs_hook=Reply)
    if status != 200:
        error = content["error"]
        raise APIError(error["message"], status, error["code"])
    reply: Reply = content
    return reply
