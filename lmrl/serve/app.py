"""The routes of the server: access, limits and answers."""

from __future__ import annotations

import asyncio
import hmac
import json
import secrets
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from lmrl.engines.base import Completion, Key, Sampling
from lmrl.errors import LmrlError, ModelError
from lmrl.secrets import LOOPBACK, redact
from lmrl.serve.answers import Choice, Writer, sse
from lmrl.serve.http import HTTPRequest, HTTPResponse, error_body
from lmrl.serve.model import ServedPolicy, TextStream
from lmrl.serve.requests import CONTEXT_FULL, Ask, BadRequest, read_ask
from lmrl.serve.sessions import Said, Session

SESSIONS = "/session/"


@dataclass(frozen=True)
class AppLimits:
    """concurrent: maximum completions sampled at a time; further requests are refused with 429. seconds: time limit of
    an answer."""

    concurrent: int = 256
    seconds: float = 600


class App:
    """Answers requests to a policy. keys: accepted API keys (none: no key is needed). Sessions have their own paths and
    keys.

    public: False for a server bound to this machine without keys; web pages must then not reach it by DNS rebinding.
    open: False if only sessions are served.
    """

    def __init__(
        self,
        served: ServedPolicy,
        keys: Sequence[str] = (),
        limits: AppLimits = AppLimits(),
        public: bool = True,
        open: bool = True,
    ):
        self.served, self.keys, self.limits, self.public, self.open = served, list(keys), limits, public, open
        self.sessions: dict[str, Session] = {}
        self.running = 0
        """Number of completions being sampled."""
        self.requests = self.failures = 0
        self.broken: Exception | None = None
        """The error with which the engine failed, if it has."""
        self.nonce = secrets.token_hex(8)

    async def __call__(self, request: HTTPRequest) -> HTTPResponse:
        try:
            return await self._route(request)
        except BadRequest as error:
            kind = "invalid_request_error" if error.status < 500 else "server_error"
            headers = {"Retry-After": "1"} if error.status in (429, 503) else {}
            return HTTPResponse(error.status, error_body(str(error), kind, error.code, error.param), headers)
        except ModelError as error:
            return HTTPResponse(400, error_body(str(error)))
        except LmrlError as error:
            self.failures += 1
            return HTTPResponse(500, error_body(redact(str(error)), "server_error"))

    async def _route(self, request: HTTPRequest) -> HTTPResponse:
        self._check_origin(request)
        path, session = request.path.rstrip("/"), None
        if path == "/health":
            return self._json({"status": "ok", "model": self.served.name, "running": self.running})
        if path.startswith(SESSIONS):
            name, _, rest = path.removeprefix(SESSIONS).partition("/")
            session, path = self._session(name, request), f"/{rest}"
        else:
            self._check_key(request)
        models = [self._model()]
        routes = {"/v1/models": "GET", "/v1/chat/completions": "POST", "/v1/completions": "POST"}
        routes[f"/v1/models/{self.served.name}"] = "GET"
        if path not in routes:
            raise BadRequest(f"there is no {path}; the routes are {', '.join(routes)} and /health", status=404)
        if request.method != routes[path]:
            raise BadRequest(f"{path} takes {routes[path]}", status=405)
        if path == "/v1/models":
            return self._json({"object": "list", "data": models})
        if request.method == "GET":
            return self._json(models[0])
        return await self._complete(request, path == "/v1/chat/completions", session)

    def _model(self) -> dict[str, Any]:
        return {
            "id": self.served.name,
            "object": "model",
            "created": 0,
            "owned_by": "lmrl",
            "max_model_len": self.served.policy.max_length,
            "version": self.served.engine.syncs,
        }

    def _json(self, content: dict[str, Any]) -> HTTPResponse:
        return HTTPResponse(200, json.dumps(content).encode())

    # ------------------------------------------------------------------------------------------------------ access
    def _check_origin(self, request: HTTPRequest) -> None:
        """Refuse web pages access to a server without keys on this machine, including by a hostname that resolves to
        it."""
        if self.public or self.keys:
            return
        host = request.headers.get("host", "")
        name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
        if name not in LOOPBACK:
            raise BadRequest(f"the host '{name:.60}' is not served; set a key to serve other names", status=403)

    def _check_key(self, request: HTTPRequest) -> None:
        if not self.open:
            raise BadRequest(f"only {SESSIONS}ID/v1 is served", status=404)
        if self.keys and not any([_same(_bearer(request), key) for key in self.keys]):
            raise BadRequest("the key is missing or wrong", code="invalid_api_key", status=401)

    def _session(self, name: str, request: HTTPRequest) -> Session:
        given = _bearer(request)
        owners = [one for one in self.sessions.values() if _same(given, one.key)]
        if not owners:
            raise BadRequest(
                "the key is missing or wrong, or its session has ended", code="invalid_api_key", status=401
            )
        if owners[0].id != name:
            raise BadRequest("the key belongs to another session", code="wrong_session", status=403)
        return owners[0]

    # ------------------------------------------------------------------------------------------------------ completions
    async def _complete(self, request: HTTPRequest, chat: bool, session: Session | None) -> HTTPResponse:
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise BadRequest("the Content-Type must be application/json", status=415)
        try:
            payload = json.loads(request.body)
            json.dumps(payload, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise BadRequest(
                "the body holds a lone surrogate (half of a character's \\u escapes): send whole text"
            ) from error
        except (ValueError, RecursionError) as error:
            raise BadRequest(f"the body is not JSON: {error}") from error
        defaults = session.sampling if session is not None else self.served.sampling
        ask = read_ask(payload, chat, defaults, self.limits.concurrent)
        if session is None and ask.model not in (None, self.served.name):
            raise BadRequest(
                f"the model '{ask.model:.60}' is not served; '{self.served.name}' is", "model", "model_not_found", 404
            )
        if ask.completions > self.limits.concurrent:
            raise BadRequest(f"{ask.completions} completions are more than the {self.limits.concurrent} at a time", "n")
        if self.running + ask.completions > self.limits.concurrent:
            raise BadRequest("too many completions at a time; retry later", code="rate_limit_exceeded", status=429)
        jobs = self._jobs(ask, session)
        if ask.stream:
            return HTTPResponse(200, stream=self._stream(ask, jobs), content_type="text/event-stream")
        with self._running(ask):
            choices = await _all([job.run() for job in jobs])
        return self._json(Writer(ask, self.served.name).whole(choices))

    @contextmanager
    def _running(self, ask: Ask) -> Iterator[None]:
        """Count the completions of a request while they are being sampled."""
        self.running += ask.completions
        try:
            yield
        finally:
            self.running -= ask.completions

    def _jobs(self, ask: Ask, session: Session | None) -> list[_Job]:
        """The completions that a request asks for. All checks of the request are made here."""
        if session is not None:
            session.begin(ask.completions)
        jobs = []
        for which in range(1 if ask.is_chat else len(ask.prompts)):
            earlier = None
            if session is not None:
                tokens, earlier = session.prompt(ask, which)
            elif ask.messages is not None:
                tokens = self.served.dialogue(ask.messages, ask.tools)
            else:
                tokens = self.served.text(ask.prompts[which])
            own = ask.sampling if session is None else session.sampling_of(ask)
            sampling = self.served.fit(own, ask.limited and session is None, len(tokens))
            for number in range(ask.n):
                if session is not None:
                    key: Key = session.stream_key(tokens)
                elif ask.seed is not None:
                    key = (ask.seed, "serve", which, number)
                else:
                    key = (self.nonce, self.requests, which, number)
                jobs.append(_Job(self, ask, which, tokens, sampling, key, session, earlier))
        self.requests += 1
        return jobs

    async def _stream(self, ask: Ask, jobs: list[_Job]) -> AsyncGenerator[bytes, None]:
        writer, queue = Writer(ask, self.served.name), asyncio.Queue[tuple[int, str | Choice | BaseException]]()
        choices: dict[int, Choice] = {}
        tasks: list[asyncio.Task[None]] = []
        with self._running(ask):
            try:
                for index, job in enumerate(jobs):
                    if ask.is_chat:
                        yield writer.opening(index)
                    tasks.append(asyncio.ensure_future(job.stream(index, queue)))
                while len(choices) < len(jobs):
                    index, item = await queue.get()
                    if isinstance(item, BaseException):
                        raise item
                    if isinstance(item, str):
                        yield writer.part(index, item)
                    else:
                        choices[index] = item
                        yield writer.closing(index, item)
                if ask.usage_in_stream:
                    yield writer.totals([choices[index] for index in range(len(jobs))])
                yield sse(b"[DONE]")
            except (LmrlError, BadRequest) as error:  # the status has been sent
                self.failures += 1
                yield b"data: " + error_body(redact(str(error)), "server_error") + b"\n\n"
            finally:
                for task in tasks:
                    task.cancel()


@dataclass
class _Job:
    """One completion of a request."""

    app: App
    ask: Ask
    which: int
    tokens: list[int]
    sampling: Sampling
    key: Key
    session: Session | None
    earlier: Said | None

    async def run(self, heard: Any = None) -> Choice:
        served = self.app.served
        try:
            async with asyncio.timeout(self.app.limits.seconds):
                done: Completion = await served.complete(self.tokens, self.sampling, self.key, heard)
        except TimeoutError as error:
            raise BadRequest(f"no answer within {self.app.limits.seconds:g} s", code="timeout", status=504) from error
        except ModelError as error:  # concerns only this request: its tokens do not fit
            raise BadRequest(str(error), code=CONTEXT_FULL) from error
        except Exception as error:
            self.app.broken = self.app.broken or error
            raise
        choice = served.choice(self.ask, self.tokens, done, self.sampling, self.key)
        if self.session is not None:
            self.session.record(self.ask, self.which, choice, done, self.earlier)
        return choice

    async def stream(self, index: int, queue: asyncio.Queue[tuple[int, str | Choice | BaseException]]) -> None:
        """Put the text into the queue as it is sampled, then the choice. With tools, text may turn out to be a call, so
        it is sent whole."""
        text = TextStream(self.app.served, self.sampling.stop)

        unfinished = set() if self.session is None else self.session.unfinished

        def heard(token: int) -> None:
            if part := text.add(token):
                unfinished.add(text)
                queue.put_nowait((index, part))

        try:
            choice = await self.run(None if self.ask.tools else heard)
        except asyncio.CancelledError:
            raise
        except BaseException as error:
            queue.put_nowait((index, error))
            return
        unfinished.discard(text)
        if rest := text.finish(choice.text):
            queue.put_nowait((index, rest))
        queue.put_nowait((index, choice))


async def _all(calls: Sequence[Any]) -> list[Any]:
    """The results of coroutines; if one fails, or the caller is cancelled, all others are cancelled."""
    tasks = [asyncio.ensure_future(call) for call in calls]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        with suppress(asyncio.CancelledError):
            await asyncio.gather(*tasks, return_exceptions=True)


def _bearer(request: HTTPRequest) -> str:
    kind, _, key = request.headers.get("authorization", "").partition(" ")
    return key.strip() if kind.lower() == "bearer" else ""


def _same(given: str, key: str) -> bool:
    return hmac.compare_digest(given.encode(), key.encode())
