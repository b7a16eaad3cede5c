"""Rewards over HTTP: a scorer with a plain JSON protocol.

The request is a POST of `{"prompts": [...], "completions": [...], "columns": {NAME: [...]}}`, the answer `{"scores":
[...]}` with a number or null for each completion, and optionally `{"causes": [...]}` with text where a score is null.
`lmrl reward serve` is such a scorer.
"""

from __future__ import annotations

import base64
import json
import os
import random
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import unquote, urlsplit, urlunsplit

import urllib3

from lmrl.errors import RecipeError, RewardError, counted
from lmrl.rewards.workers import Failure
from lmrl.secrets import plain_url, remember

BUSY = {408, 425, 429, 500, 502, 503, 504}
"""Status codes after which a request is retried."""
REFUSED = {400, 413, 422}
"""Status codes that concern a single request: what it holds, or its length."""
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0


class RequestFailed(RewardError):
    """The address refused a request for what it holds, or answered it uselessly: others may do."""


class Client:
    """Posts JSON to one address over connections that stay open, and retries after transient failures.

    A user and password in the address are sent in a header. timeout: seconds per request. connections: maximum requests
    at a time. retries: further requests, after pauses that double (or as Retry-After says); an answer that is no JSON
    counts as transient. token_env: name of the environment variable that holds a bearer token. max_mb: a longer answer
    is refused.
    """

    def __init__(
        self,
        url: str,
        timeout: float = 60,
        retries: int = 2,
        token_env: str | None = None,
        max_mb: float = 16,
        connections: int = 1,
    ):
        if not url.startswith(("http://", "https://")):
            raise RecipeError(f"'{url}' is not an address: expected http://... or https://...")
        self.address, self.headers = _with_password_in_header(url)
        self.url, self.timeout, self.retries, self.max_bytes = plain_url(url), timeout, retries, int(max_mb * 2**20)
        self.headers["Content-Type"] = "application/json"
        if token_env is not None:
            if not os.environ.get(token_env):
                raise RecipeError(f"token_env: the environment variable {token_env} is not set")
            remember(os.environ[token_env])
            self.headers["Authorization"] = f"Bearer {os.environ[token_env]}"
        self.pool = _pool(self.address, connections)

    def post(self, payload: Any) -> dict[str, Any]:
        """The answer to a request. Raises Failure for a transient failure, RewardError if the address is not such a
        scorer."""
        try:
            data = json.dumps(payload).encode()
        except (TypeError, ValueError) as error:
            raise RewardError(f"{self.url}: a column cannot be sent as JSON ({error})") from error
        return self._exchanged("POST", self.address, data)

    def get(self, address: str) -> dict[str, Any]:
        """The answer to a GET of an address of the same host; fails as `post` does."""
        return self._exchanged("GET", address, None)

    def before_request(self) -> None:
        """Called before each request, including retries; may wait."""

    def busy(self, seconds: float) -> None:
        """Called when the server asks for a pause of this many seconds (429, Retry-After)."""

    def _exchanged(self, method: str, address: str, data: bytes | None) -> dict[str, Any]:
        failure: Failure | RequestFailed
        for retry in range(self.retries + 1):
            self.before_request()
            wait = min(FIRST_PAUSE * 2**retry * random.uniform(0.5, 1.5), LONGEST_PAUSE)
            try:
                code, reason, answer_headers, body = self._request(method, address, data)
            except (urllib3.exceptions.HTTPError, OSError) as error:
                failure = Failure(
                    f"timed out after {self.timeout:g} s" if _late(error) else f"cannot be reached: {_root(error)}"
                )
            else:
                said = " ".join(body[:300].decode(errors="replace").split())
                if 200 <= code < 300:
                    try:
                        return self._parsed(body)
                    except ValueError:  # half an answer, or a page of a proxy
                        failure = RequestFailed(f"{self.url} returned invalid JSON: {body[:60]!r}")
                elif code not in BUSY:
                    raise (RequestFailed if code in REFUSED else RewardError)(
                        f"{self.url} answered {code} {reason}: {said}"
                    )
                else:
                    failure = Failure(f"answered {code} {reason}: {said}")
                asked = _seconds(answer_headers.get("Retry-After"))
                wait = asked or wait
                if code == 429 or asked:
                    self.busy(min(wait, LONGEST_PAUSE))
            if retry < self.retries:
                time.sleep(min(wait, LONGEST_PAUSE))
        raise failure

    def _request(self, method: str, address: str, data: bytes | None) -> tuple[int, str, Any, bytes]:
        """One request's code, reason, headers and body, of which little more than max_bytes is read."""
        response = self.pool.request(
            method,
            address,
            body=data,
            headers=self.headers,
            timeout=self.timeout,
            retries=False,  # retries have their own pauses here, and a redirect would send the token to another host
            redirect=False,
            preload_content=False,
        )
        body = b""
        try:
            while len(body) <= self.max_bytes and (part := response.read(self.max_bytes + 1 - len(body))):
                body += part
            if len(body) > self.max_bytes:
                response.close()  # closes the connection too: the rest of the answer is still on it
            return response.status, response.reason or "", response.headers, body
        finally:
            response.release_conn()

    def _parsed(self, data: bytes) -> dict[str, Any]:
        """The answer's object. Raises ValueError for invalid JSON, RequestFailed for anything else that is not one."""
        if len(data) > self.max_bytes:
            raise RequestFailed(f"{self.url} answered with more than {self.max_bytes / 2**20:g} MB (max_mb)")
        answer = json.loads(data)
        if not isinstance(answer, dict):
            raise RequestFailed(f"{self.url} answered with a {type(answer).__name__}, expected an object")
        return answer


def _with_password_in_header(url: str) -> tuple[str, dict[str, str]]:
    """An address without its user and password, and the header that carries them."""
    parts = urlsplit(url)
    login, _, host = parts.netloc.rpartition("@")
    if not login:
        return url, {}
    remember(unquote(login.partition(":")[2]))
    secret = base64.b64encode(unquote(login).encode()).decode()
    remember(secret)
    return urlunsplit(parts._replace(netloc=host)), {"Authorization": f"Basic {secret}"}


def _pool(url: str, connections: int) -> urllib3.PoolManager:
    """Connections to the host of an address, through the proxy that the environment names for it (http_proxy,
    no_proxy)."""
    settings: dict[str, Any] = {"num_pools": 1, "maxsize": connections, "block": True}
    host, proxy = urlsplit(url).hostname or "", urllib.request.getproxies().get(urlsplit(url).scheme)
    if proxy is None or urllib.request.proxy_bypass(host):
        return urllib3.PoolManager(**settings)
    login = urlsplit(proxy)
    known = unquote(f"{login.username}:{login.password or ''}") if login.username else None
    remember(unquote(login.password or ""))
    return urllib3.ProxyManager(proxy, proxy_headers=urllib3.make_headers(proxy_basic_auth=known), **settings)


def _late(error: BaseException) -> bool:
    refused = isinstance(error, urllib3.exceptions.NewConnectionError)  # urllib3 counts it among the timeouts
    return isinstance(error, urllib3.exceptions.TimeoutError) and not refused


def _root(error: BaseException) -> BaseException:
    """The operating system's message, without urllib3's wrapping."""
    while error.__cause__ is not None or (error.__context__ is not None and not error.__suppress_context__):
        error = error.__cause__ or error.__context__ or error
    return error


def _seconds(text: str | None) -> float | None:
    try:
        return None if text is None else max(float(text), 0.0)
    except ValueError:
        return None


class Scorer:
    """A reward that calls a scorer over HTTP, with `batch_size` completions per request and `concurrency` requests at a
    time."""

    def __init__(
        self,
        url: str,
        timeout: float = 60,
        retries: int = 2,
        batch_size: int = 32,
        concurrency: int = 4,
        token_env: str | None = None,
        max_mb: float = 16,
    ):
        self.client = Client(url, timeout, retries, token_env, max_mb, connections=concurrency)
        self.batch_size, self.concurrency = batch_size, concurrency

    def __call__(self, prompts: list[Any], completions: list[Any], **columns: Any) -> list[Any]:
        """A number, None or a Failure for each completion."""
        columns.pop("completion_ids", None)

        def ask(first: int) -> list[Any]:
            part = slice(first, first + self.batch_size)
            payload = {
                "prompts": prompts[part],
                "completions": completions[part],
                "columns": {name: column[part] for name, column in columns.items()},
            }
            count = len(payload["prompts"])
            try:
                return self._scores(self.client.post(payload), count)
            except Failure as failure:
                return [failure] * count

        with ThreadPoolExecutor(self.concurrency) as threads:
            return [one for part in threads.map(ask, range(0, len(prompts), self.batch_size)) for one in part]

    def _scores(self, answer: dict[str, Any], count: int) -> list[Any]:
        scores, causes = answer.get("scores"), answer.get("causes") or [None] * count
        if not isinstance(scores, list) or len(scores) != count or len(causes) != count:
            given = counted(len(scores), "score") if isinstance(scores, list) else "no list of scores"
            raise RewardError(f"{self.client.url} answered with {given} for {counted(count, 'completion')}")
        return [
            Failure(f"could not score it: {cause}") if score is None and cause else score
            for score, cause in zip(scores, causes, strict=True)
        ]
