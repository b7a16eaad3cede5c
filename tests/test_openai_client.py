"""The client of OpenAI's API against a server of this machine: answers, failures, pace, spending, cache."""

import asyncio

import pytest

from lmrl.errors import EndpointError, RecipeError
from lmrl.openai_client import Budget, OpenAIClient, Pace, Prices, Usage
from lmrl.rewards import http
from tests.stub_openai import chat_answer, stub_openai

HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(http, "FIRST_PAUSE", 0.01)


def echo(path, body, number):
    return chat_answer(body["messages"][-1]["content"][::-1])


def test_a_chat_sends_settings_and_key(monkeypatch):
    monkeypatch.setenv("SOME_KEY", "secret-value")
    with stub_openai(echo) as stub:
        answer = OpenAIClient(stub.url, "m", key_env="SOME_KEY").chat(HELLO, temperature=0.5, max_tokens=3)
    assert (answer.text, answer.finish_reason, answer.usage) == ("olleh", "stop", Usage(10, 5))
    path, headers, body = stub.seen[0]
    assert path == "/v1/chat/completions" and headers["Authorization"] == "Bearer secret-value"
    assert body == {"model": "m", "messages": HELLO, "temperature": 0.5, "max_tokens": 3}


def test_no_key_is_sent_to_other_addresses(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret-value")
    with stub_openai(echo) as stub:
        OpenAIClient(stub.url, "m").chat(HELLO)
    assert "Authorization" not in stub.seen[0][1]


def test_a_key_that_is_not_set_is_named(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(RecipeError, match="OPENAI_API_KEY is not set"):
        OpenAIClient(model="m")


def test_a_completion_continues_a_text():
    answer = {"choices": [{"text": "xy", "finish_reason": "length"}]}
    with stub_openai(lambda path, body, number: answer) as stub:
        completion = OpenAIClient(stub.url, "m").complete("p", top_k=1)
    assert completion.text == "xy" and completion.finish_reason == "length"
    assert stub.seen[0][2] == {"model": "m", "prompt": "p", "top_k": 1}


def test_the_only_model_is_taken():
    with stub_openai(echo, models=("one",)) as stub:
        assert OpenAIClient(stub.url).model == "one"
    with stub_openai(echo, models=("one", "two")) as stub:
        with pytest.raises(EndpointError, match="name a model, .*; it serves one, two"):
            OpenAIClient(stub.url)


@pytest.mark.parametrize("code", [429, 500, 503])
def test_transient_failures_are_retried(code):
    with stub_openai(lambda path, body, number: echo(path, body, 0) if number == 2 else (code, {}, {})) as stub:
        assert OpenAIClient(stub.url, "m").chat(HELLO).text == "olleh"
    assert len(stub.seen) == 3


def test_retries_end():
    with stub_openai(lambda *_: (503, {}, {"error": "full"})) as stub:
        with pytest.raises(EndpointError, match="answered 503.*full") as raised:
            OpenAIClient(stub.url, "m", retries=2).chat(HELLO)
    assert raised.value.temporary and len(stub.seen) == 3


def test_a_refusal_is_not_retried():
    with stub_openai(lambda *_: (401, {}, {"error": "bad key"})) as stub:
        with pytest.raises(EndpointError, match="answered 401.*bad key") as raised:
            OpenAIClient(stub.url, "m").chat(HELLO)
    assert not raised.value.temporary and len(stub.seen) == 1


def test_retry_after_holds_all_requests_back(monkeypatch):
    held = []
    monkeypatch.setattr(Pace, "hold", lambda self, seconds: held.append(seconds))
    reply = lambda path, body, number: echo(path, body, 0) if number else (429, {"Retry-After": "0.05"}, {})  # noqa: E731
    with stub_openai(reply) as stub:
        OpenAIClient(stub.url, "m").chat(HELLO)
    assert held == [0.05]


def test_the_pace_by_hand():
    now, slept = [100.0], []
    pace = Pace(30, clock=lambda: now[0], sleep=slept.append)
    for _ in range(3):
        pace.wait()
    assert slept == [2.0, 4.0]  # 60 s / 30, one after the other
    now[0] = 200.0
    pace.hold(7)
    pace.wait()
    assert slept[2:] == [7.0]


def test_what_is_spent_by_hand():
    budget = Budget(Prices(2.0, 10.0), dollars=0.01)
    budget.check("here")
    budget.add(Usage(1000, 800))  # 0.002 + 0.008
    assert budget.spent == pytest.approx(0.01)
    with pytest.raises(EndpointError, match=r"here: 1 requests have cost \$0.01 of max_spend=\$0.01"):
        budget.check("here")


def test_a_spending_limit_needs_prices():
    with pytest.raises(RecipeError, match="set prices"):
        OpenAIClient("http://127.0.0.1:1", "m", max_spend=1)


def test_the_spending_limit_stops_requests():
    with stub_openai(echo) as stub:  # 15 tokens an answer at a dollar a token
        client = OpenAIClient(stub.url, "m", prices=(1e6, 1e6), max_spend=20)
        found = [client.chat(HELLO), client.chat(HELLO)]
        with pytest.raises(EndpointError, match="max_spend"):
            client.chat(HELLO)
    assert len(stub.seen) == 2 and client.budget.spent == 30 and found[1].text == "olleh"


def test_the_cache_answers_what_was_asked_before(tmp_path):
    with stub_openai(lambda path, body, number: chat_answer(str(number))) as stub:
        first = OpenAIClient(stub.url, "m", cache=tmp_path)
        assert [first.chat(HELLO, draw=draw).text for draw in (0, 1, 0)] == ["0", "1", "0"]
        again = OpenAIClient(stub.url, "m", cache=tmp_path, prices=(1, 1), max_spend=0)
        answer = again.chat(HELLO, draw=1)
        assert answer.text == "1" and again.budget.requests == 0
        first.chat(HELLO, temperature=0)
    assert len(stub.seen) == 3
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".json"]


def test_failures_are_not_cached(tmp_path):
    with stub_openai(lambda path, body, number: echo(path, body, 0) if number else (400, {}, {})) as stub:
        client = OpenAIClient(stub.url, "m", cache=tmp_path)
        with pytest.raises(EndpointError):
            client.chat(HELLO)
        assert client.chat(HELLO).text == "olleh"


def test_chats_of_coroutines_run_side_by_side():
    async def ask(client):
        return await asyncio.gather(client.chat_async(HELLO), client.chat_async([{"role": "user", "content": "ab"}]))

    with stub_openai(echo) as stub:
        found = asyncio.run(ask(OpenAIClient(stub.url, "m")))
    assert [one.text for one in found] == ["olleh", "ba"]


@pytest.mark.parametrize("choices", [[], [{"text": ["a"]}], [{"message": {"content": 3}}]])
def test_an_answer_without_a_completion_is_an_error(choices):
    with stub_openai(lambda *_: {"choices": choices}) as stub:
        with pytest.raises(EndpointError, match="answered without a completion"):
            OpenAIClient(stub.url, "m").chat(HELLO)
