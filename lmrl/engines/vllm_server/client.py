"""HTTP client of one vLLM server: completions, tokens in and tokens out, and control of its weights."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import threading
import urllib.parse
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lmrl.engines.base import Completion, Sampling
from lmrl.errors import EngineError, ModelError

CONNECT_TIMEOUT, PROBE_TIMEOUT = 10.0, 60.0
"""Seconds to connect to a server, and to get its status."""
COMPLETIONS = "/inference/v1/generate"
MODEL_NAME = "policy"
SERVE_OPTIONS = (
    "--enable-scale-out",
    "--logprobs-mode=processed_logprobs",
    "--generation-config=vllm",
    "--worker-extension-cls=lmrl.engines.vllm_worker.PolicyWorker",
)
"""Options that every server must be started with, besides VLLM_SERVER_DEV_MODE=1 in its environment."""


class ServerLost(Exception):
    """A server did not answer; another server, or the same one restarted, may."""


class RequestFailed(ServerLost):
    """A live server did not fulfil a request, or not in time."""


class RequestTimeout(RequestFailed):
    """A server did not answer in time."""


class RequestRefused(RequestFailed):
    """lmrl's server extension reported that it could not fulfil a request."""


@dataclass(frozen=True)
class Description:
    """A server's status. `version` is the name of its weights, None where its workers do not agree."""

    version: str | None
    group: str | None
    workers: int
    device: str
    gpus: tuple[str, ...]
    transfer: str | None
    max_model_len: int
    model_type: str
    vocabulary: int


class Client:
    """One server. Every request has its own connection, so that a lost one is never taken for a live one."""

    def __init__(self, url: str, timeout: float = 600):
        """timeout: seconds for a completion, and for loading weights."""
        self.url, self.timeout = url, timeout
        self._live: dict[http.client.HTTPConnection, str] = {}
        self._lock = threading.Lock()

    # ----------------------------------------------------------------------------------------------------- completions
    def complete(
        self, prompt: list[int], sampling: Sampling, seed: int, eos: set[int], version: str | None = None
    ) -> Completion:
        """Sample one completion. version: the weights it must come from.

        Raises ServerLost if the server does not return it, ModelError if it refuses the request.
        """
        request = request_of(prompt, sampling, seed, eos)
        return completion_of(self.post(COMPLETIONS, request), sampling, eos, version)

    def score(self, tokens: list[int], version: str | None = None) -> list[float]:
        """The log-probability of each token but the first. Raises as `complete` does."""
        parameters = {"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0}
        answer = self.post(COMPLETIONS, {"token_ids": tokens, "sampling_params": parameters})
        return scores_of(answer, tokens, version)

    def hang_up(self, completions_only: bool = True) -> None:
        """Abort the requests in flight; the server stops working on them."""
        with self._lock:
            live = [one for one, path in self._live.items() if path == COMPLETIONS or not completions_only]
        for connection in live:
            with contextlib.suppress(OSError, AttributeError):
                connection.sock.shutdown(socket.SHUT_RDWR)

    # --------------------------------------------------------------------------------------------------------- weights
    def describe(self) -> Description:
        """Ask for the server's status. Raises ServerLost if it does not answer, ModelError if lmrl cannot use it."""
        try:
            workers = self.call("lmrl_describe", timeout=min(PROBE_TIMEOUT, self.timeout))
        except RequestFailed as failure:
            if "has no attribute" not in str(failure):
                raise
            raise ModelError(f"{self.url} was started without lmrl's extension; {how_to_serve()}") from failure
        first = workers[0]
        if first["logprobs"] != "processed_logprobs":
            raise ModelError(
                f"{self.url} gives log-probabilities before temperature (logprobs mode {first['logprobs']}); "
                f"{how_to_serve()}"
            )
        versions = {worker["version"] for worker in workers}
        return Description(
            versions.pop() if len(versions) == 1 else None,
            first["group"],
            len(workers),
            first["device"],
            tuple(worker["gpu"] for worker in workers if worker["gpu"]),
            first["transfer"],
            first["max_model_len"],
            first["model_type"],
            first["vocabulary"],
        )

    def load(self, path: Path, version: str) -> None:
        """Have the server load weights from a file."""
        self.call("lmrl_load", str(path))
        self.name(version)

    def name(self, version: str, group: str | None = None) -> None:
        """Name newly loaded weights: completions then carry the name, and the prefix cache of the old ones is dropped.

        Only after that does the server report the new name, because requests may follow at once. group: the group in
        which the weights were broadcast.
        """
        self.post("/update_weight_version", {"new_version": version})
        answer = self.post("/reset_prefix_cache?reset_running_requests=true", {})
        if not answer.get("success"):
            raise RequestFailed(f"{self.url} did not drop its prefix cache after new weights came")
        self.call("lmrl_name", version, *([group] if group else []))

    def call(self, method: str, *args: str, timeout: float | None = None) -> list[dict[str, Any]]:
        """Call a method of the worker extension; the answers of all workers."""
        answers: list[dict[str, Any]] = self.post("/collective_rpc", {"method": method, "args": list(args)}, timeout)[
            "results"
        ]
        for answer in answers:
            if "error" in answer:
                raise RequestRefused(f"{self.url}: {method} failed: {answer['error']}")
        return answers

    # ------------------------------------------------------------------------------------------------------------ HTTP
    def post(self, path: str, body: Any, timeout: float | None = None) -> dict[str, Any]:
        """The JSON answer to a request."""
        parts = urllib.parse.urlsplit(self.url)
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        connection = kind(parts.hostname or "", parts.port, timeout=CONNECT_TIMEOUT)
        try:
            connection.connect()
            connection.sock.settimeout(timeout or self.timeout)
            with self._lock:
                self._live[connection] = path
            headers = {"Content-Type": "application/json", "Connection": "close"}
            connection.request("POST", parts.path + path, json.dumps(body), headers)
            response = connection.getresponse()
            data = response.read()
        except TimeoutError as error:
            raise RequestTimeout(f"{self.url} did not answer within {timeout or self.timeout:g} s") from error
        except (OSError, http.client.HTTPException) as error:
            raise ServerLost(f"{self.url} cannot be reached: {error or type(error).__name__}") from error
        finally:
            with self._lock:
                self._live.pop(connection, None)
            connection.close()
        return self._parsed(path, response.status, data)

    def _parsed(self, path: str, status: int, data: bytes) -> dict[str, Any]:
        if status == 200:
            try:
                return json.loads(data) if data else {}
            except ValueError as error:
                raise RequestFailed(f"{self.url} returned invalid JSON: {data[:60]!r}") from error
        said = said_by(data)
        if status in (403, 404):
            raise ModelError(f"{self.url}{path} answered {status} ({said}); {how_to_serve()}")
        if 400 <= status < 500 and status not in (408, 425, 429):
            raise ModelError(f"{self.url} refused a request with {status}: {said}")
        raise RequestFailed(f"{self.url} answered {status}: {said}")


def how_to_serve() -> str:
    """The command that starts a server fit for a run, for messages."""
    return f"start it with: VLLM_SERVER_DEV_MODE=1 vllm serve MODEL {' '.join(SERVE_OPTIONS)}"


def request_of(prompt: list[int], sampling: Sampling, seed: int, eos: set[int]) -> dict[str, Any]:
    """The request for one completion, as vLLM's /inference/v1/generate takes it."""
    return {
        "token_ids": prompt,
        "sampling_params": {
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "stop": list(sampling.stop),
            "stop_token_ids": sorted(eos),
            "skip_special_tokens": False,  # stop strings are looked for in the whole text
            "seed": seed,
            "logprobs": 0,  # of the chosen token alone
        },
    }


def completion_of(answer: dict[str, Any], sampling: Sampling, eos: set[int], version: str | None) -> Completion:
    """The completion in an answer. Raises RequestFailed if it was aborted or comes from other weights than
    `version`, EngineError if it is malformed."""
    try:
        choice = answer["choices"][0]
        tokens, reason = list(choice["token_ids"]), choice["finish_reason"]
        content = choice["logprobs"]["content"]
        logprobs = [float(one["logprob"]) for one in content]
        spans = versions_of(choice)
    except (KeyError, IndexError, TypeError) as error:
        raise EngineError(f"a server's answer does not have vLLM's format: {str(answer)[:200]}") from error
    if reason not in ("stop", "length") or not tokens or len(tokens) != len(logprobs):
        raise RequestFailed(f"a completion was aborted (finish reason {reason})")
    check_version(spans, version)
    if sampling.temperature == 0:
        logprobs = [0.0] * len(tokens)  # a greedy choice is certain
    end: Literal["eos", "stop", "length"] = "eos" if tokens[-1] in eos else "stop" if reason == "stop" else "length"
    return Completion(tokens, logprobs, end)


def scores_of(answer: dict[str, Any], tokens: list[int], version: str | None) -> list[float]:
    """The log-probability of each token but the first, in an answer. Raises as completion_of does."""
    try:
        found = answer["prompt_logprobs"]
        scores = [float(one[str(token)]["logprob"]) for token, one in zip(tokens[1:], found[1:], strict=True)]
        spans = versions_of(answer["choices"][0])
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise EngineError(
            f"a server answered without the log-probabilities of a prompt (prompt_logprobs): {str(answer)[:200]}"
        ) from error
    check_version(spans, version)
    return scores


def versions_of(choice: dict[str, Any]) -> set[str]:
    return {span["version"] for span in choice.get("weight_versions") or ()}


def check_version(spans: set[str], version: str | None) -> None:
    """Raise RequestFailed if a completion comes from other weights than `version` (None: any)."""
    if version is not None and spans != {version}:
        said = (
            f"came from the weights {', '.join(sorted(spans))}" if spans else "does not say which weights it came from"
        )
        raise RequestFailed(f"a completion {said} (expected: {version})")


def said_by(data: bytes) -> str:
    """The message of an error answer."""
    try:
        parsed = json.loads(data)
        error = parsed.get("error", parsed.get("detail", parsed))
        text = error.get("message", error) if isinstance(error, dict) else error
    except (ValueError, AttributeError):
        text = data[:300].decode(errors="replace")
    return " ".join(str(text).split())[:300]
