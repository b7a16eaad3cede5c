"""One client for every endpoint with OpenAI's API: vLLM and other servers, hosted models, judges.

    client = OpenAIClient("http://localhost:8000/v1", "my-model", requests_per_minute=600, cache="data/cache")
    answer = client.chat([{"role": "user", "content": "2 + 3 = ?"}], temperature=0)
    answer.text, answer.usage

Keys come only from environment variables. Transient failures (no connection, 408, 429, 5xx, invalid JSON) are retried
after pauses that double, or as Retry-After says; what still fails raises EndpointError.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from lmrl.errors import EndpointError, LmrlError, RecipeError
from lmrl.rewards.http import Client, RequestFailed
from lmrl.rewards.workers import Failure

OPENAI = "https://api.openai.com/v1"
OPENAI_KEY = "OPENAI_API_KEY"
Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Usage:
    """Tokens of a request and its answer, as the endpoint counts them."""

    prompt: int = 0
    completion: int = 0


@dataclass(frozen=True)
class Answer:
    """An answer: its text, why it ended (`stop`, `length`, ...), and further fields of the response."""

    text: str
    finish_reason: str | None = None
    message: dict[str, Any] = field(default_factory=dict)
    """The assistant's message of a chat, with its `tool_calls` if there are any."""
    usage: Usage = Usage()


@dataclass(frozen=True)
class Prices:
    """Dollars per million tokens."""

    prompt: float
    completion: float

    def of(self, usage: Usage) -> float:
        """Dollars that a request cost."""
        return (usage.prompt * self.prompt + usage.completion * self.completion) / 1e6


class Pace:
    """Rate limiter for the requests of all threads together: at most so many per minute; `hold` pauses them all."""

    def __init__(
        self,
        per_minute: float | None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ):
        if per_minute is not None and not per_minute > 0:
            raise RecipeError("requests_per_minute: expected a number above 0")
        self.interval = 60 / per_minute if per_minute else 0.0
        self.clock, self.sleep = clock, sleep
        self._next = 0.0
        self._lock = threading.Lock()

    def wait(self) -> None:
        """Wait for this request's turn."""
        with self._lock:
            now = self.clock()
            turn = max(self._next, now)
            self._next = turn + self.interval
        if turn > now:
            self.sleep(turn - now)

    def hold(self, seconds: float) -> None:
        """Let no further request start for this many seconds."""
        with self._lock:
            self._next = max(self._next, self.clock() + seconds)


class Budget:
    """Counts tokens and dollars of all requests. dollars: the limit, for which `prices` are needed (None: no limit)."""

    def __init__(self, prices: Prices | None = None, dollars: float | None = None):
        if dollars is not None and prices is None:
            raise RecipeError(
                "max_spend is in dollars, but the cost of a token is not known: set prices, PROMPT,COMPLETION"
            )
        self.prices, self.dollars = prices, dollars
        self.requests, self.usage = 0, Usage()
        self._lock = threading.Lock()

    @property
    def spent(self) -> float:
        """Dollars so far; 0 without prices."""
        return self.prices.of(self.usage) if self.prices else 0.0

    def check(self, name: str) -> None:
        """Raise EndpointError once the limit is reached. Running requests may still exceed it."""
        if self.dollars is not None and self.spent >= self.dollars:
            raise EndpointError(
                f"{name}: {self.requests} requests have cost ${self.spent:.2f} of max_spend=${self.dollars:g}"
            )

    def add(self, usage: Usage) -> None:
        with self._lock:
            self.requests += 1
            total = self.usage
            self.usage = Usage(total.prompt + usage.prompt, total.completion + usage.completion)


class Cache:
    """Answers on disk, one JSON file each, by a hash of the request. Several processes may share a folder."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)

    def path(self, request: Mapping[str, Any]) -> Path:
        name = hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()
        return self.folder / name[:2] / f"{name}.json"

    def get(self, request: Mapping[str, Any]) -> dict[str, Any] | None:
        """The answer to a request; None if there is none, or if its file is torn."""
        try:
            found: dict[str, Any] = json.loads(self.path(request).read_text(encoding="utf-8"))["answer"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return found

    def put(self, request: Mapping[str, Any], answer: Mapping[str, Any]) -> None:
        path = self.path(request)
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
        scratch.write_text(json.dumps({"request": request, "answer": answer}, ensure_ascii=False), encoding="utf-8")
        scratch.rename(path)


class _Endpoint(Client):
    """A route of the API, whose requests share a rate limit."""

    def __init__(self, url: str, pace: Pace, **settings: Any):
        super().__init__(url, **settings)
        self.pace = pace

    def before_request(self) -> None:
        self.pace.wait()

    def busy(self, seconds: float) -> None:
        self.pace.hold(seconds)


class OpenAIClient:
    """Chat and completions by one model of one endpoint; safe to use from several threads.

    url: without `/chat/completions`. model: its name there (None: the only one that the endpoint serves). key_env: name
    of the environment variable with the key (None: OPENAI_API_KEY for OpenAI's own address, no key elsewhere). timeout:
    seconds per request. retries: further requests after a transient failure. connections: concurrent requests of
    `side_by_side` and `chat_async`. requests_per_minute: of all threads together. prices: dollars per million prompt
    tokens and per million completion tokens. max_spend: dollars after which no request is started. cache: a folder for
    answers; a request that was answered before costs nothing.
    """

    def __init__(
        self,
        url: str = OPENAI,
        model: str | None = None,
        *,
        key_env: str | None = None,
        timeout: float = 120,
        retries: int = 5,
        connections: int = 8,
        requests_per_minute: float | None = None,
        prices: tuple[float, float] | None = None,
        max_spend: float | None = None,
        cache: str | Path | None = None,
    ):
        self.url = url.rstrip("/")
        if key_env is None and urlsplit(self.url).hostname == urlsplit(OPENAI).hostname:
            key_env = OPENAI_KEY
        self.pace = Pace(requests_per_minute)
        settings = {"timeout": timeout, "retries": retries, "token_env": key_env, "connections": connections}
        self._routes = {
            route: _Endpoint(f"{self.url}/{route}", self.pace, **settings)
            for route in ("chat/completions", "completions")
        }
        self.name = self._routes["completions"].url.removesuffix("/completions")
        """The address for messages: without user, password and query."""
        self.budget = Budget(Prices(*prices) if prices else None, max_spend)
        self.cache = Cache(cache) if cache is not None else None
        self.connections = connections
        self._threads = ThreadPoolExecutor(connections, thread_name_prefix="openai")
        self.model = model or self._only_model()

    # ------------------------------------------------------------------------------------------------------- requests
    def chat(self, messages: Messages, *, draw: int = 0, **settings: Any) -> Answer:
        """The answer to a dialogue. settings: further fields of the request (`temperature`, `max_tokens`, `seed`,
        `tools`, ...).

        draw: number of a sample, so that the cache tells several samples of one request apart. Raises EndpointError.
        """
        return self._ask("chat/completions", {"messages": [dict(one) for one in messages], **settings}, draw)

    def complete(self, prompt: str, *, draw: int = 0, **settings: Any) -> Answer:
        """The continuation of a text; arguments as for `chat`."""
        return self._ask("completions", {"prompt": prompt, **settings}, draw)

    async def chat_async(self, messages: Messages, **settings: Any) -> Answer:
        """`chat` for coroutines."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, lambda: self.chat(messages, **settings))

    def models(self) -> list[str]:
        """Names of the models that the endpoint serves."""
        answer = self._exchange(lambda: self._routes["completions"].get(f"{self._root()}/models"))
        return [str(one["id"]) for one in answer.get("data") or () if isinstance(one, dict) and "id" in one]

    def side_by_side(self, call: Callable[..., Any], *columns: Sequence[Any]) -> Iterator[Any]:
        """Results of a function on rows of columns, in order, `connections` calls at a time."""
        return self._threads.map(call, *columns)

    def close(self) -> None:
        """Release the threads; running requests are finished."""
        self._threads.shutdown(cancel_futures=True)

    # ---------------------------------------------------------------------------------------------------------- inside
    def _ask(self, route: str, fields: dict[str, Any], draw: int) -> Answer:
        payload = {"model": self.model, **fields}
        request = {"url": f"{self.name}/{route}", "draw": draw, "payload": payload}
        if self.cache and (known := self.cache.get(request)) is not None:
            return _answer(known, self.name)
        self.budget.check(self.name)
        found = self._exchange(lambda: self._routes[route].post(payload))
        answer = _answer(found, self.name)
        self.budget.add(answer.usage)
        if self.cache:
            self.cache.put(request, found)
        return answer

    def _exchange(self, call: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        try:
            return call()
        except Failure as failure:
            raise EndpointError(f"{self.name} {failure}", temporary=True) from failure
        except LmrlError as error:
            raise EndpointError(str(error), of_one_request=isinstance(error, RequestFailed)) from error

    def _root(self) -> str:
        """The address that requests go to, without its user and password."""
        return self._routes["completions"].address.removesuffix("/completions")

    def _only_model(self) -> str:
        found = self.models()
        if len(found) != 1:
            served = ", ".join(found) or "none"
            raise EndpointError(f"{self.name}: name a model, {self.name}#MODEL; it serves {served}")
        return found[0]


def _answer(found: Mapping[str, Any], name: str) -> Answer:
    """An endpoint's JSON as an Answer. Raises EndpointError if it is not one."""
    try:
        choice = found["choices"][0]
        message = choice.get("message") or {}
        text = message.get("content") if message else choice["text"]
        if not isinstance(text, str | None):
            raise TypeError("not a text")
        usage = found.get("usage") or {}
        counted = Usage(int(usage.get("prompt_tokens") or 0), int(usage.get("completion_tokens") or 0))
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise EndpointError(f"{name} answered without a completion: {str(dict(found))[:80]}", temporary=True) from error
    return Answer(text or "", choice.get("finish_reason"), message, counted)
