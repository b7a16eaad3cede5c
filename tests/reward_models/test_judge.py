"""A judge at a local endpoint that answers like OpenAI's."""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from lmrl.reward_models.judge import Judge

from lmrl.errors import LmrlError, RewardError
from lmrl.recipe import Reward
from lmrl.rewards.load import load_rewards
from lmrl.rewards.rewards import score
from lmrl.rewards.workers import Failure
from tests.stub_openai import chat_answer, stub_openai


@contextmanager
def endpoint(reply):
    """reply: from the text of a request to the judge's text. Yields the address and the requests."""
    seen = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append((self.path, self.headers.get("Authorization"), request))
            content = reply(request["messages"][0]["content"])
            body = json.dumps({"choices": [{"message": {"content": content}}]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1", seen
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_scores_are_parsed_and_scaled(monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "secret")

    def reply(text):
        return "Score: 10" if "good {x}" in text else "well, 1" if "bad" in text else "99" if "odd" in text else "fine!"

    with endpoint(reply) as (url, seen):
        options = {"model": "m", "url": url, "token_env": "JUDGE_KEY", "concurrency": 2}
        judge = load_rewards([Reward(function="lmrl.reward_models.judge.Judge", options=options)])[0]
        found = score(judge, {"prompts": ["p"] * 4, "completions": ["good {x}", "bad", "odd", "silent"]})
    assert found.values == [1.0, 0.0, None, None]
    assert "got no score from 1 to 10 in the reply '99'" in found.causes[2]
    path, token, request = seen[0]
    assert (path, token) == ("/v1/chat/completions", "Bearer secret")
    assert request["model"] == "m" and request["temperature"] == 0.0


@pytest.mark.parametrize(
    ("reply", "value"),
    [
        ("8/10", 8),
        ("**7**/10.", 7),
        ("9.5 out of 10", 9.5),
        ("8 of 10", 8),
        ("Step 1/2 is fine.\nScore: 4", 4),
        ("10/10", 10),
        ("Score: 7. It misses 3 of 5 points.", 7),
        ("**Score:** 8\n\nTwo reasons: 1. It is short.", 8),
        ("The score is 4, for 2 mistakes", 4),
        ("2 mistakes, so 6", 6),
        ("8,5", 8.5),
    ],
)
def test_a_score_is_not_what_it_is_out_of(reply, value):
    assert Judge("m", url="http://127.0.0.1:9/v1").score_in(reply) == pytest.approx((value - 1) / 9)


@pytest.mark.parametrize(
    ("reply", "value"),
    [
        ("Better: A", 1.0),
        ("**Better: B**. A strong answer, though", 0.0),
        ("The better answer is B", 0.0),
        ("Answer A.", 1.0),
        ("B beats A", None),
    ],
)
def test_a_letter_is_the_verdict_or_there_is_none(reply, value):
    with stub_openai(lambda *_: chat_answer(reply)) as stub:
        (found,) = Judge("m", url=stub.url).prefers(["p"], ["a"], ["b"])
    assert isinstance(found, Failure) if value is None else found == value


@pytest.mark.parametrize("bad", [(400, {}, {"error": "content filter"}), [1, 2]])
def test_a_refused_request_costs_its_sample(bad):
    with stub_openai(lambda path, body, number: bad if "worst" in str(body) else chat_answer("10")) as stub:
        good, lost = Judge("m", url=stub.url)(["p", "p"], ["good", "worst"])
    assert good == 1.0 and isinstance(lost, Failure) and "got no reply: http" in str(lost)


def test_a_wrong_key_ends_the_run():
    with stub_openai(lambda *_: (401, {}, {"error": "no such key"})) as stub:
        with pytest.raises(RewardError, match="answered 401.*no such key"):
            Judge("m", url=stub.url)(["p"], ["c"])


def test_a_reply_that_was_cut_has_no_score():
    cut = lambda path, body, number: chat_answer("Of 3 criteria", finish_reason="length")  # noqa: E731
    with stub_openai(cut) as stub:
        judge = Judge("m", url=stub.url)
        for (found,) in (judge(["p"], ["c"]), judge.prefers(["p"], ["a"], ["b"])):
            assert isinstance(found, Failure) and "was cut at max_tokens=64: 'Of 3 criteria'" in str(found)


def test_a_rubric_of_ones_own_sees_columns():
    with endpoint(lambda text: "7") as (url, seen):
        judge = Judge("m", url, rubric="{prompt}|{completion}|{answer}", low=0, high=7)
        assert judge(["q"], ["a"], answer=["b"]) == [1.0]
    assert seen[0][2]["messages"][0]["content"] == "q|a|b"


def test_pairs_are_judged_in_both_orders():
    def fair(text):
        a, b = (text.partition(f"[Answer {letter}]\n")[2].partition("\n\n")[0].strip() for letter in "AB")
        return f"Better: {'A' if a == 'good' else 'B'}"

    with endpoint(fair) as (url, seen):
        assert Judge("m", url).compare(["p", "p"], ["good", "bad"], ["bad", "good"]) == [1.0, 0.0]
        assert len(seen) == 4
    with endpoint(lambda text: "A") as (url, _):  # whoever comes first
        assert Judge("m", url).compare(["p"], ["good"], ["bad"]) == [0.5]
    with endpoint(lambda text: "both") as (url, _):
        [found] = Judge("m", url).compare(["p"], ["good"], ["bad"])
        assert isinstance(found, Failure)


def test_a_judge_without_its_key_is_reported(monkeypatch):
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    options = {"model": "m", "token_env": "JUDGE_KEY"}
    with pytest.raises(LmrlError, match="JUDGE_KEY is not set"):
        load_rewards([Reward(function="lmrl.reward_models.judge.Judge", options=options)])
