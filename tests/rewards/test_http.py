"""A scorer over HTTP, on this machine, and what can go wrong."""

import json
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from lmrl.errors import RecipeError, RewardError, RunError
from lmrl.recipe import Reward
from lmrl.rewards import http
from lmrl.rewards.load import load_rewards
from lmrl.rewards.rewards import RewardFunction, score
from lmrl.rewards.serve import RewardServer


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(http, "FIRST_PAUSE", 0.01)


@contextmanager
def running(server):
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def lengths(prompts, completions, bonus=None, **columns):
    return [None if "none" in text else len(text) + (bonus or [0] * 9)[row] for row, text in enumerate(completions)]


@pytest.fixture
def served():
    function = RewardFunction("lengths", "here:lengths", 1.0, lambda **columns: lengths(**columns))
    with running(RewardServer(function, port=0)) as url:
        yield url


def remote(url, **settings):
    return load_rewards([Reward(url=url, **settings)])[0]


def ask(function, rows, **columns):
    return score(function, {"prompts": ["p"] * len(rows), "completions": rows, **columns})


def test_scores_and_columns_travel(served):
    function = remote(served, options={"batch_size": 2, "concurrency": 3})
    found = ask(function, ["a", "bb", "none", "dddd", "e"], bonus=[0, 10, 0, 0, 20])
    assert found.values == [1.0, 12.0, None, 4.0, 21.0]
    assert found.causes[2] == f"{served} could not score it: here:lengths returned None"
    assert function.label == "url"


def test_health(served):
    import urllib.request

    assert json.loads(urllib.request.urlopen(f"{served}/health").read()) == {"reward": "here:lengths"}


@pytest.mark.parametrize(
    ("payload", "words"),
    [
        (b"nonsense", "answered 400"),
        (b'{"prompts": ["a"], "completions": []}', "answered 400"),
        (b"[]", "answered 400"),
        (b'{"prompts": ["a"], "completions": ["b"], "columns": {"x": 3}}', "answered 400"),
    ],
)
def test_invalid_requests(served, payload, words, monkeypatch):
    client = http.Client(served)
    monkeypatch.setattr(http.json, "dumps", lambda *_: payload.decode())
    with pytest.raises(RewardError, match=words):
        client.post({})


def test_a_token_is_required(monkeypatch):
    function = RewardFunction("lengths", "here:lengths", 1.0, lambda **columns: lengths(**columns))
    with running(RewardServer(function, port=0, token="secret")) as url:
        with pytest.raises(RewardError, match="answered 401"):
            ask(remote(url), ["a"])
        monkeypatch.setenv("SCORER_TOKEN", "secret")
        assert ask(remote(url, options={"token_env": "SCORER_TOKEN"}), ["a"]).values == [1.0]
    monkeypatch.delenv("SCORER_TOKEN")
    with pytest.raises(RecipeError, match="SCORER_TOKEN is not set"):
        remote(url, options={"token_env": "SCORER_TOKEN"})


def test_only_this_machine_without_a_token(served):
    function = RewardFunction("r", "r", 1.0, lambda **_: [])
    with pytest.raises(RunError, match="--token-env"):
        RewardServer(function, host="0.0.0.0", port=0)
    with pytest.raises(RunError, match="choose another --port"):
        RewardServer(function, port=int(served.rpartition(":")[2]))


def test_a_request_that_is_too_large():
    function = RewardFunction("lengths", "here:lengths", 1.0, lambda **columns: lengths(**columns))
    with running(RewardServer(function, port=0, max_mb=0.001)) as url:
        found = None
        try:
            found = ask(remote(url, retries=0), ["a" * 5000])
        except RewardError as error:
            assert "answered 413" in str(error)
        assert found is None or found.values == [None]  # the connection may be gone before the answer is read


def test_a_mistake_in_the_served_function_is_reported():
    function = RewardFunction("short", "here:short", 1.0, lambda **_: [])
    with running(RewardServer(function, port=0)) as url:
        with pytest.raises(RewardError, match="answered 422 .*returned 0 values for 1 row:"):
            ask(remote(url), ["a"])


# ------------------------------------------------------------------------------------------------ scorers that misbehave
@contextmanager
def answering(*answers):
    """A server that gives these answers in turn, the last for ever: (code, body, headers) or seconds to sleep."""
    left, seen = list(answers), []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            seen.append(time.monotonic())
            answer = left.pop(0) if len(left) > 1 else left[0]
            if isinstance(answer, float):
                time.sleep(answer)
                return
            code, body, headers = answer
            self.send_response(code)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    with running(ThreadingHTTPServer(("127.0.0.1", 0), Handler)) as url:
        yield url, seen


FINE = (200, b'{"scores": [1.5]}', {})


def test_a_busy_scorer_is_asked_again():
    with answering((503, b"busy", {}), (429, b"", {"Retry-After": "0.2"}), FINE) as (url, seen):
        assert ask(remote(url), ["a"]).values == [1.5]
        assert len(seen) == 3 and seen[2] - seen[1] >= 0.2


def test_a_scorer_that_stays_busy_costs_its_samples():
    with answering((503, b"no room", {})) as (url, seen):
        found = ask(remote(url, retries=1), ["a"])
        assert found.values == [None] and "answered 503 Service Unavailable: no room" in found.causes[0]
        assert len(seen) == 2


def test_a_scorer_that_hangs_or_is_not_there():
    with answering(3.0) as (url, _):
        found = ask(remote(url, timeout=0.2, retries=0), ["a"])
        assert found.values == [None] and "timed out after 0.2 s" in found.causes[0]
    found = ask(remote(url, retries=0), ["a"])
    assert found.values == [None] and "cannot be reached" in found.causes[0]


def test_connections_stay_open(monkeypatch):
    """40 batches go through no more connections than may post at a time; an error that leaves a body unread ends its own."""
    opened = []

    class Counting(RewardServer):
        def get_request(self):
            opened.append(1)
            return super().get_request()

    function = RewardFunction("lengths", "here:lengths", 1.0, lambda **columns: lengths(**columns))
    with running(Counting(function, port=0, max_mb=0.001)) as url:
        reward = remote(url, options={"batch_size": 1, "concurrency": 2})
        for _ in range(4):
            assert ask(reward, ["a"] * 10).values == [1.0] * 10
        assert len(opened) <= 2
        client = http.Client(url)
        with pytest.raises(RewardError, match="answered 413"):
            client.post({"prompts": ["a" * 2000]})
        assert client.post({"prompts": ["a"], "completions": ["bb"]})["scores"] == [2.0]


def test_a_connection_that_the_scorer_has_closed_is_replaced():
    function = RewardFunction("lengths", "here:lengths", 1.0, lambda **columns: lengths(**columns))
    with running(RewardServer(function, port=0, read_seconds=0.05)) as url:
        reward = remote(url, retries=0)
        assert ask(reward, ["a"]).values == [1.0]
        time.sleep(0.3)
        assert ask(reward, ["bb"]).values == [2.0]


def test_the_proxy_of_the_environment_is_used(monkeypatch):
    with answering(FINE) as (proxy, seen):
        monkeypatch.setenv("http_proxy", proxy.replace("http://", "http://me:secret@"))
        monkeypatch.setenv("no_proxy", "10.0.0.9")
        assert http.Client("http://scorer.invalid/x").post({}) == {"scores": [1.5]}
        assert len(seen) == 1
        assert type(http.Client("http://10.0.0.9:80/x").pool).__name__ == "PoolManager"


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ((200, b"<html>", {}), "invalid JSON"),
        ((200, b"[1]", {}), "expected an object"),
        ((200, b'{"scores": [1, 2]}', {}), "2 scores for 1 completion$"),
        ((200, b'{"score": 1}', {}), "no list of scores"),
        ((200, b'{"scores": ["good"]}', {}), "returned 'good'"),
        ((302, b"", {"Location": "http://127.0.0.1:1/"}), "answered 302"),
        ((404, b"no", {}), "answered 404"),
        ((200, b" " * 3000 + b'{"scores": [1]}', {}), "more than"),
    ],
)
def test_an_address_without_a_scorer_is_reported(answer, words):
    with answering(answer) as (url, _):
        with pytest.raises(RewardError, match=words):
            ask(remote(url, options={"max_mb": 0.002}), ["a"])


def test_half_an_answer_is_asked_for_again():
    with answering((200, b'{"scores": [1', {}), FINE) as (url, seen):
        assert ask(remote(url), ["a"]).values == [1.5] and len(seen) == 2


def test_an_address_has_a_scheme():
    with pytest.raises(Exception, match="'localhost:1' is not an address"):
        remote("localhost:1")
