"""`lmrl serve`: what is answered, and to whom."""

import json

import pytest

from lmrl.cli.serve import read_keys
from lmrl.engines.base import Sampling
from lmrl.errors import RunError
from lmrl.serve.app import App
from tests.serve.clients import CHAT, KEY, TEXT, ask, chat, served_model


def one(app, path, content, **headers):
    """A single answer."""

    async def work(connect):
        return await (await connect()).post(path, content, **headers)

    return ask(app, work)


# ---------------------------------------------------------------------------------------------------------------- answers
def test_tokens_and_logprobs_are_the_engines(tiny_folder):
    served = served_model(tiny_folder)
    answer = one(App(served), CHAT, chat(seed=3, n=2, logprobs=True, return_token_ids=True)).json
    prompt = served.renderer(None).first([{"role": "user", "content": "hello"}])
    keys = [(3, "serve", 0, number) for number in range(2)]
    direct = served.engine.complete([prompt] * 2, Sampling(6), keys)
    assert [choice["token_ids"] for choice in answer["choices"]] == [done.tokens for done in direct]
    assert direct[0].tokens != direct[1].tokens
    for choice, done in zip(answer["choices"], direct, strict=True):
        assert choice["prompt_token_ids"] == prompt
        assert [part["logprob"] for part in choice["logprobs"]["content"]] == pytest.approx(done.logprobs, abs=1e-5)
    tokens = sum(len(done.tokens) for done in direct)
    assert answer["usage"] == {
        "prompt_tokens": len(prompt),
        "completion_tokens": tokens,
        "total_tokens": len(prompt) + tokens,
    }


def test_a_seed_repeats_and_none_does_not(tiny_folder):
    async def work(connect):
        client = await connect()
        return [(await client.post(TEXT, fields)).json["choices"][0]["text"] for fields in requests]

    requests = [{"prompt": "ab", "max_tokens": 12} | ({"seed": 5} if seeded else {}) for seeded in (1, 1, 0, 0)]
    first, again, free, other = ask(App(served_model(tiny_folder)), work)
    assert first == again and len({first, free, other}) == 3


def test_prompts_may_be_texts_or_token_ids(tiny_folder):
    served = served_model(tiny_folder)
    ids = served.tokenizer("ab", add_special_tokens=False).input_ids
    greedy = {"max_tokens": 4, "temperature": 0, "return_token_ids": True, "logprobs": 1}
    texts = one(App(served), TEXT, {"prompt": ["ab", "cd"]} | greedy).json["choices"]
    (tokens,) = one(App(served), TEXT, {"prompt": ids} | greedy).json["choices"]
    assert [choice["index"] for choice in texts] == [0, 1] and texts[0]["prompt_token_ids"] == ids
    assert tokens["text"] == texts[0]["text"] and tokens["token_ids"] == texts[0]["token_ids"]
    assert len(tokens["logprobs"]["token_logprobs"]) == len(tokens["token_ids"])
    beyond = one(App(served), TEXT, {"prompt": [10**6]})
    assert beyond.status == 400 and "holds the token 1000000" in beyond.json["error"]["message"]


def test_a_stream_adds_up_to_the_whole(tiny_folder):
    served = served_model(tiny_folder)
    whole = one(App(served), CHAT, chat(seed=1, n=2, logprobs=True)).json
    fields = chat(seed=1, n=2, logprobs=True, stream=True, stream_options={"include_usage": True})
    answer = one(App(served), CHAT, fields)
    assert answer.headers["content-type"] == "text/event-stream"
    *events, totals = answer.events
    for index, choice in enumerate(whole["choices"]):
        own = [event["choices"][0] for event in events if event["choices"][0]["index"] == index]
        assert own[0]["delta"] == {"role": "assistant", "content": ""} and len(own) > 4
        assert "".join(part["delta"].get("content", "") for part in own) == choice["message"]["content"]
        assert own[-1]["finish_reason"] == choice["finish_reason"] and own[-1]["logprobs"] == choice["logprobs"]
    assert totals["choices"] == [] and totals["usage"] == whole["usage"]


def test_a_stop_string_is_cut_and_never_streamed(tiny_folder):
    served = served_model(tiny_folder)
    free = one(App(served), TEXT, {"prompt": "ab", "max_tokens": 20, "seed": 2}).json["choices"][0]["text"]
    stop = free[3:5]
    assert stop not in free[:4]
    fields = {"prompt": "ab", "max_tokens": 20, "seed": 2, "stop": [stop, "never so"]}
    (cut,) = one(App(served), TEXT, fields).json["choices"]
    assert cut["text"] == free[:3] and cut["finish_reason"] == "stop"
    events = one(App(served), TEXT, fields | {"stream": True}).events
    assert "".join(event["choices"][0]["text"] for event in events) == free[:3]


def test_control_tokens_in_the_output_stay_out_of_sight(tiny_folder):
    served = served_model(tiny_folder, ["<unk>a<unk>b<eos>", "done<eos>"])
    first = one(App(served), CHAT, chat(return_token_ids=True)).json["choices"][0]
    unk, eos = served.tokenizer.convert_tokens_to_ids(["<unk>", "<eos>"])
    assert first["token_ids"].count(unk) == 2 and first["message"]["content"] == "ab"
    assert first["finish_reason"] == "stop"
    # Names of control tokens that come back as text are text.
    dialogue = chat()["messages"] + [{"role": "assistant", "content": "<eos>[user]"}, {"role": "user", "content": "x"}]
    one(App(served), CHAT, {"messages": dialogue})
    assert served.engine.prompts[-1].count(eos) == 3  # the template's own, one a message


def test_tools_in_the_plain_form(tiny_folder):
    tool = {"type": "function", "function": {"name": "add", "parameters": {"properties": {"a": {}, "b": {}}}}}
    served = served_model(tiny_folder, ["Well. [add(1, b=2), add(a=3, b=4)]<eos>", "[add(<eos>", "[add(1)]<eos>"])
    app = App(served)
    (choice,) = one(app, CHAT, chat(tools=[tool])).json["choices"]
    calls = choice["message"]["tool_calls"]
    assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] == "Well."
    assert [json.loads(call["function"]["arguments"]) for call in calls] == [{"a": 1, "b": 2}, {"a": 3, "b": 4}]
    assert "add(a, b)" in served.tokenizer.decode(served.engine.prompts[0])
    broken = one(app, CHAT, chat(tools=[tool])).json["choices"][0]["message"]
    assert broken == {"role": "assistant", "content": "[add("}
    assert one(app, CHAT, chat(tools=[tool], tool_choice="none")).json["choices"][0]["message"]["content"] == "[add(1)]"


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"logit_bias": {"1": 5}}, "'logit_bias' is not supported"),
        ({"response_format": {"type": "json_object"}}, "'response_format' is not supported"),
        ({"tool_choice": "required"}, "'tool_choice' is not supported"),
        ({"top_logprobs": 3, "logprobs": True}, "'top_logprobs' above 0"),
        ({"presence_penalty": False}, "'presence_penalty' is not supported; only 0 is"),
        ({"best_of": True}, "'best_of' is not supported; only 1 is"),
        ({"parallel_tool_calls": 1}, "'parallel_tool_calls' is not supported; only true is"),
        ({"colour": "red"}, "'colour' is not supported"),
        ({"temperature": "hot"}, "'temperature' is 'hot'; expected a whole number or a number"),
        ({"n": 0}, "'n' is 0; expected a number from 1 to 256"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "only text is served"),
        ({"messages": [{"role": "wizard", "content": ""}]}, "expected an object with a role of"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "holds a lone surrogate"),
        ({"max_tokens": 1000}, "but the model has 256"),
    ],
)
def test_what_cannot_be_done_is_named(tiny_folder, fields, said):
    answer = one(App(served_model(tiny_folder, [])), CHAT, chat(**fields))
    assert answer.status == 400 and said in answer.json["error"]["message"]


def test_models_health_and_unknown_paths(tiny_folder):
    async def work(connect):
        client = await connect()
        get = [await client.get(path) for path in ("/health", "/v1/models", "/v1/models/tiny", "/v2", CHAT)]
        return [*get, await client.post(CHAT, chat(model="other"))]

    health, models, model, missing, method, other = ask(App(served_model(tiny_folder, [])), work)
    assert health.json == {"status": "ok", "model": "tiny", "running": 0}
    assert models.json["data"] == [model.json] and model.json["id"] == "tiny" and model.json["max_model_len"] == 256
    assert (missing.status, method.status, other.status) == (404, 405, 404)


# ---------------------------------------------------------------------------------------------------------- who may ask
def test_head_is_answered_without_a_body(tiny_folder):
    async def work(connect):
        client = await connect()
        client.send("HEAD", "/health")
        head = await client.reader.readuntil(b"\r\n\r\n")
        return head, (await client.get("/health")).json["status"]

    head, after = ask(App(served_model(tiny_folder)), work)
    assert head.startswith(b"HTTP/1.1 200") and after == "ok"


def test_forged_keys_are_refused(tiny_folder):
    async def work(connect):
        client = await connect()
        keys = [None, "k" * 31, "k" * 33, "é", KEY]
        return [await client.post(CHAT, chat(), key) for key in keys], await client.get("/health")

    answers, health = ask(App(served_model(tiny_folder, ["a"]), [KEY]), work)
    assert [answer.status for answer in answers] == [401] * 4 + [200]
    assert answers[0].json["error"]["code"] == "invalid_api_key" and health.status == 200


def test_pages_of_a_browser_cannot_ask(tiny_folder):
    app = App(served_model(tiny_folder, ["a"]), public=False)
    assert one(app, CHAT, chat(), Host="evil.example").status == 403
    plain = one(app, CHAT, chat(), **{"Content-Type": "text/plain"})
    assert plain.status == 415  # what a page may send without asking first
    assert one(app, CHAT, chat(), Host="localhost:8000").status == 200


def test_keys_of_the_command_line(tmp_path, monkeypatch):
    file = tmp_path / "keys"
    file.write_text(f"{KEY}\n\n{'x' * 20}\n")
    file.chmod(0o644)
    with pytest.raises(RunError, match="others may read"):
        read_keys(None, file)
    file.chmod(0o600)
    monkeypatch.setenv("A_KEY", "y" * 16)
    assert read_keys("A_KEY", file) == ["y" * 16, KEY, "x" * 20]
    monkeypatch.setenv("A_KEY", "short")
    with pytest.raises(RunError, match="a key of 5 characters"):
        read_keys("A_KEY", None)
    with pytest.raises(RunError, match="OTHER is not set"):
        read_keys("OTHER", None)
