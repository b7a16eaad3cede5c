"""Sessions: who may ask in one, and how its calls become segments."""

import json

import pytest

from lmrl.agents.play import problem
from lmrl.agents.programs import Outcome
from lmrl.engines.base import Sampling
from lmrl.serve.app import App
from lmrl.serve.sessions import Session
from lmrl.trajectories.trajectory import CONTEXT, Trajectory
from tests.serve.clients import ask, bearer, chat, served_model

ADD = {"type": "function", "function": {"name": "add", "parameters": {"properties": {"a": {}, "b": {}}}}}


def opened(served, count=1, **settings):
    app = App(served, open=False)
    sessions = [Session(served, Sampling(20), (0, number), **settings) for number in range(count)]
    app.sessions = {session.id: session for session in sessions}
    return app, *sessions


def path(session, route="chat/completions"):
    return f"/session/{session.id}/v1/{route}"


def say(app, session, *dialogues, **fields):
    """The messages that answer these dialogues, one after the other."""

    async def work(connect):
        client = await connect()
        found = []
        for dialogue in dialogues:
            messages = dialogue(found) if callable(dialogue) else dialogue
            answer = await client.post(path(session), {"messages": messages} | fields, session.key)
            assert answer.status == 200, answer.body
            found.append(answer.json["choices"][0]["message"])
        return found

    return ask(app, work)


def written(session):
    trajectory = Trajectory([], "", "")
    session.write(trajectory)
    return trajectory


def user(text):
    return {"role": "user", "content": text}


def test_keys_open_their_own_session_alone(tiny_folder):
    app, mine, other = opened(served_model(tiny_folder, ["a"] * 9), 2)

    async def work(connect):
        client = await connect()
        keys = [mine.key, other.key, "sk-lmrl-forged", None]
        answers = [await client.post(path(mine), chat(), key) for key in keys]
        models = await client.get(path(mine, "models"), mine.key)
        outside = await client.post("/v1/chat/completions", chat(), mine.key)
        app.sessions.pop(mine.id)
        return [*answers, models, outside, await client.post(path(mine), chat(), mine.key)]

    answers = ask(app, work)
    assert [answer.status for answer in answers] == [200, 403, 401, 401, 200, 404, 401]
    assert answers[1].json["error"]["code"] == "wrong_session"
    assert len(mine.calls) == 1 and not other.calls


def test_a_session_ends_with_its_limit(tiny_folder):
    app, session = opened(served_model(tiny_folder, ["a"] * 9), most=2)

    async def work(connect):
        client = await connect()
        first = await client.post(path(session), chat(n=2), session.key)
        second = await client.post(path(session), chat(), session.key)
        session.close()
        return first, second, await client.post(path(session), chat(), session.key)

    first, second, ended = ask(app, work)
    assert (first.status, second.status, ended.status) == (200, 400, 410)
    assert second.json["error"]["code"] == "max_calls" and ended.json["error"]["code"] == "session_ended"
    assert [sorted({*one.turns} - {CONTEXT}) for one in written(session).segments] == [[0], [1]]


def test_a_stream_that_was_left_fails_the_episode(tiny_folder):
    app, session = opened(served_model(tiny_folder))
    session.sampling = Sampling(200)

    async def work(connect):
        client = await connect()
        fields = {"messages": [user("hello")], "stream": True, "seed": 0}
        client.send("POST", path(session), json.dumps(fields).encode(), bearer(session.key))
        await client.reader.readuntil(b'"content": "')  # the opening
        await client.reader.readuntil(b'"content": "')
        left = problem(session, Outcome(1.0), False)
        await client.reader.readuntil(b"[DONE]")
        return left, problem(session, Outcome(1.0), False)

    left, read = ask(app, work)
    assert left is not None and left.startswith("left a streamed answer before its end") and read is None


def test_the_recipe_decides_the_sampling(tiny_folder):
    served = served_model(tiny_folder)
    app, session = opened(served)
    asked = []
    complete = served.complete

    async def noted(tokens, sampling, key, heard=None):
        asked.append(sampling)
        return await complete(tokens, sampling, key, heard)

    served.complete = noted
    say(app, session, [user("x")], temperature=0, top_p=0.5, max_tokens=1000, stop="stop")
    assert asked == [Sampling(20, stop=("stop",))]


def test_sampled_tokens_are_kept_as_they_were(tiny_folder):
    # An answer whose text would be tokenised otherwise: it holds a control token, and ends in white space.
    served = served_model(tiny_folder, ["a<unk>b <eos>", "next<eos>"])
    app, session = opened(served)
    first = [user("x")]
    say(app, session, first, lambda said: [*first, said[0], user("y")])
    (segment,) = written(session).segments
    text = served.tokenizer.decode(segment.tokens)
    assert text == "[user]x<eos>\n[assistant]a<unk>b <eos>\n[user]y<eos>\n[assistant]next<eos>"
    assert segment.tokens == served.engine.prompts[1] + served.tokenizer("next<eos>").input_ids
    assert [
        served.tokenizer.decode([one for one, turn in zip(segment.tokens, segment.turns, strict=True) if turn == n])
        for n in (0, 1)
    ] == ["a<unk>b <eos>", "next<eos>"]


def test_a_template_that_shortens_history_changes_nothing(tiny_folder):
    served = served_model(tiny_folder, ["(thought) yes<eos>", "no<eos>"])
    served.tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{% if loop.last or m.role != 'assistant' %}{{ m.content }}"
        "{% else %}{{ m.content.split(')')[-1] }}{% endif %}<eos>\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    app, session = opened(served)
    first = [user("x")]
    say(app, session, first, lambda said: [*first, said[0], user("y")])
    (segment,) = written(session).segments
    assert served.tokenizer.decode(segment.tokens).startswith("[user]x<eos>\n[assistant](thought) yes<eos>\n[user]y")


@pytest.mark.parametrize(
    "change",
    [
        lambda first, said: [user("X"), said, user("y")],
        lambda first, said: [*first, {"role": "assistant", "content": "other"}, user("y")],
        lambda first, said: [{"role": "system", "content": "s"}, *first, said, user("y")],
    ],
)
def test_a_changed_history_is_no_continuation(tiny_folder, change):
    app, session = opened(served_model(tiny_folder, ["one<eos>", "two<eos>"]))
    first = [user("x")]
    say(app, session, first, lambda said: change(first, said[0]))
    one, two = written(session).segments
    assert {*one.turns} == {CONTEXT, 0} and {*two.turns} == {CONTEXT, 1}


def test_words_of_others_are_context(tiny_folder):
    served = served_model(tiny_folder, ["one<eos>", "two<eos>"])
    app, session = opened(served)
    first = [user("x")]
    foreign = {"role": "assistant", "content": "mine"}
    say(app, session, first, lambda said: [*first, said[0], user("y"), foreign, user("z")])
    (segment,) = written(session).segments  # the template writes the history as it was sampled
    acted = [token for token, turn in zip(segment.tokens, segment.turns, strict=True) if turn != CONTEXT]
    assert served.tokenizer.decode(acted) == "one<eos>two<eos>"
    assert "[assistant]mine<eos>" in served.tokenizer.decode(segment.tokens)


def test_calls_and_results_stay_in_one_segment(tiny_folder):
    served = served_model(tiny_folder, ["I add. [add(1, 2)]<eos>", "It is 3.<eos>"])
    app, session = opened(served)
    first = [user("1 + 2?")]

    def result(said):
        (call,) = said[0]["tool_calls"]
        assert json.loads(call["function"]["arguments"]) == {"a": 1, "b": 2}
        return [*first, said[0], {"role": "tool", "tool_call_id": call["id"], "content": "3"}]

    say(app, session, first, result, tools=[ADD])
    trajectory = written(session)
    (segment,) = trajectory.segments
    text = served.tokenizer.decode(segment.tokens)
    assert text.endswith("[assistant]I add. [add(1, 2)]<eos>\n[tool]3<eos>\n[assistant]It is 3.<eos>")
    call, answer = trajectory.turns
    assert call.message["tool_calls"][0]["function"]["arguments"] == {"a": 1, "b": 2}
    assert answer.observation == [{"role": "tool", "tool_call_id": call.message["tool_calls"][0]["id"], "content": "3"}]


def test_ids_of_calls_are_drawn_from_the_stream(tiny_folder):
    def ids():
        app, session = opened(served_model(tiny_folder, ["[add(1, 2), add(3, 4)]<eos>", "[add(1, 2)]<eos>"]))
        results = lambda said: [{"role": "tool", "content": "3"}] * len(said["tool_calls"])  # noqa: E731
        say(app, session, [user("?")], lambda said: [user("?"), said[0], *results(said[0])], tools=[ADD])
        return [call["id"] for turn in written(session).turns for call in turn.message["tool_calls"]]

    first = ids()
    assert ids() == first
    assert len(set(first)) == 3
    assert all(len(one) == 9 and one.isalnum() for one in first)  # Mistral's templates refuse others


def test_prompts_of_token_ids_join_by_tokens(tiny_folder):
    served = served_model(tiny_folder, ["ab", "cd", "ef"])
    app, session = opened(served)
    encode = lambda text: served.tokenizer(text, add_special_tokens=False).input_ids  # noqa: E731

    async def work(connect):
        client = await connect()
        for prompt in (
            encode("x"),
            encode("xab y"),
            encode("xab z"),
        ):
            answer = await client.post(path(session, "completions"), {"prompt": prompt}, session.key)
            assert answer.status == 200

    ask(app, work)
    one, two = written(session).segments
    assert served.tokenizer.decode(one.tokens) == "xab ycd" and sorted({*one.turns}) == [CONTEXT, 0, 1]
    assert served.tokenizer.decode(two.tokens) == "xab zef" and sorted({*two.turns}) == [CONTEXT, 2]


def test_random_streams_do_not_depend_on_the_order(tiny_folder):
    served = served_model(tiny_folder)

    def answers(order):
        app, session = opened(served)
        found = say(app, session, *[[user(text)] for text in order], max_tokens=8)
        return dict(zip(order, [one["content"] for one in found], strict=True))

    assert answers(["a", "b", "c"]) == answers(["c", "a", "b"])
