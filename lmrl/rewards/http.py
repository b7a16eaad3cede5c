"""Rewards behind HTTP: a scorer that speaks plain JSON.

The request is a POST of `{"prompts": [...], "completions": [...], "columns": {NAME: [...]}}`, the answer
`{"scores": [...]}` with a number or null for each completion, and maybe `{"causes": [...]}` with text where a score is
null. `lmrl reward serve` is such a scorer.
"""

from __future__ import annotations

import base64
import json
import os
import random
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import unquote, urlsplit, urlunsplit

from lmrl.errors import RecipeError, RewardError
from lmrl.rewards.workers import Failure
from lmrl.secrets import plain_url, remember

BUSY = {408, 425, 429, 500, 502, 503, 504}
"""Answers after which a request is tried again."""
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the token to another host."""

    def redirect_request(self, *_: Any) -> None:
        return None


class Client:
    """Posts JSON to one address, and tries again after failures that may pass.

    A user and password in the address go into a header. timeout: seconds a request. retries: further requests, after pauses that double (or as Retry-After says). token_env:
    name of the environment variable that holds a bearer token. max_mb: a longer answer is refused.
    """

    def __init__(
        self, url: str, timeout: float = 60, retries: int = 2, token_env: str | None = None, max_mb: float = 16
    ):
        if not url.startswith(("http://", "https://")):
            raise RecipeError(f"'{url}' is no address: expected http://... or https://...")
        self.address, self.headers = _with_password_in_header(url)
        self.url, self.timeout, self.retries, self.max_bytes = plain_url(url), timeout, retries, int(max_mb * 2**20)
        self.headers["Content-Type"] = "application/json"
        if token_env is not None:
            if not os.environ.get(token_env):
                raise RecipeError(f"token_env: the environment variable {token_env} is not set")
            remember(os.environ[token_env])
            self.headers["Authorization"] = f"Bearer {os.environ[token_env]}"
        self.opener = urllib.request.build_opener(_NoRedirects)

    def post(self, payload: Any) -> dict[str, Any]:
        """The answer to a request. Failure: none came, for reasons that may pass; RewardError: the address is no such scorer."""
        try:
            data = json.dumps(payload).encode()
        except (TypeError, ValueError) as error:
            raise RewardError(f"{self.url}: a column cannot be sent as JSON ({error})") from error
        for retry in range(self.retries + 1):
            wait = min(FIRST_PAUSE * 2**retry * random.uniform(0.5, 1.5), LONGEST_PAUSE)
            try:
                request = urllib.request.Request(self.address, data=data, headers=self.headers)
                with self.opener.open(request, timeout=self.timeout) as response:
                    return self._parsed(response.read(self.max_bytes + 1))
            except urllib.error.HTTPError as error:
                said = " ".join(error.read(300).decode(errors="replace").split())
                if error.code not in BUSY:
                    raise RewardError(f"{self.url} answered {error.code} {error.reason}: {said}") from error
                failure = Failure(f"answered {error.code} {error.reason}: {said}")
                wait = _seconds(error.headers.get("Retry-After")) or wait
            except (TimeoutError, ConnectionError, urllib.error.URLError, OSError) as error:
                reason = getattr(error, "reason", error)
                late = isinstance(reason, TimeoutError)
                failure = Failure(f"timed out after {self.timeout:g} s" if late else f"cannot be reached: {reason}")
            if retry < self.retries:
                time.sleep(min(wait, LONGEST_PAUSE))
        raise failure

    def _parsed(self, data: bytes) -> dict[str, Any]:
        if len(data) > self.max_bytes:
            raise RewardError(f"{self.url} answered with more than {self.max_bytes / 2**20:g} MB (max_mb)")
        try:
            answer = json.loads(data)
        except ValueError as error:
            raise RewardError(f"{self.url} answered with what is no JSON: {data[:60]!r}") from error
        if not isinstance(answer, dict):
            raise RewardError(f"{self.url} answered with a {type(answer).__name__}, expected an object")
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


def _seconds(text: str | None) -> float | None:
    try:
        return max(float(text), 0.0)
    except (TypeError, ValueError):
        return None


class Scorer:
    """A reward that asks a scorer over HTTP, `batch_size` completions a request, `concurrency` requests at a time."""

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
        self.client = Client(url, timeout, retries, token_env, max_mb)
        self.batch_size, self.concurrency = batch_size, concurrency

    def __call__(self, prompts: list, completions: list, **columns: Any) -> list[Any]:
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
            given = f"{len(scores)} scores" if isinstance(scores, list) else "no list of scores"
            raise RewardError(f"{self.client.url} answered with {given} for {count} completions")
        return [
            Failure(f"could not score it: {cause}") if score is None and cause else score
            for score, cause in zip(scores, causes, strict=True)
        ]
