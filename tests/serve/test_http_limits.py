"""`lmrl serve` under load: how many at once, slow and rude clients, and the end."""

import asyncio
import gc
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from lmrl.serve.app import App, AppLimits
from lmrl.serve.http import HTTPResponse, Limits
from tests.serve.clients import CHAT, KEY, TEXT, ask, bearer, chat, served_model


def test_64_clients_at_once(tiny_folder):
    app = App(served_model(tiny_folder))

    async def client(connect, number):
        connection, statuses = await connect(), []
        for turn in range(3):
            fields = chat(f"{number}.{turn}", seed=number, stream=bool(number % 2))
            answer = await connection.post(CHAT, fields)
            assert not number % 2 or answer.events[-1]["choices"][0]["finish_reason"]
            statuses.append(answer.status)
        connection.close()
        return statuses

    async def work(connect):
        before = len(asyncio.all_tasks())
        found = await asyncio.gather(*[client(connect, number) for number in range(64)])
        await asyncio.sleep(0.1)
        return found, len(asyncio.all_tasks()) - before

    found, left = ask(app, work)
    assert found == [[200] * 3] * 64 and left <= 0
    assert app.running == 0 and app.failures == 0 and not app.served.engine.busy


def test_too_many_completions_at_a_time(tiny_folder):
    app = App(served_model(tiny_folder), limits=AppLimits(concurrent=2))

    async def work(connect):
        first, second, third = [await connect() for _ in range(3)]
        asked = chat(n=2, max_tokens=150)
        first.send("POST", CHAT, json.dumps(asked).encode())
        while not app.running:
            await asyncio.sleep(0.001)
        return await second.post(CHAT, chat()), await third.post(CHAT, chat(n=3)), await first.answer()

    full, never, served = ask(app, work)
    assert full.status == 429 and full.headers["retry-after"] == "1"
    assert never.status == 400 and served.status == 200


def test_an_oversized_body_is_refused(tiny_folder):
    async def work(connect):
        declared, chunked, fine = [await connect() for _ in range(3)]
        declared.send("POST", CHAT, b"", {"Content-Length": "100000"})
        chunked.send("POST", CHAT, b"", {"Content-Length": None, "Transfer-Encoding": "chunked"})
        for _ in range(12):
            chunked.writer.write(b"800\r\n" + b" " * 2048 + b"\r\n")
        return await declared.answer(), await chunked.answer(), await fine.post(CHAT, chat())

    declared, chunked, fine = ask(App(served_model(tiny_folder, ["a"])), work, Limits(body_bytes=20_000))
    assert (declared.status, chunked.status, fine.status) == (413, 413, 200)
    assert declared.headers["connection"] == "close"


def test_a_slow_client_is_dropped(tiny_folder):
    async def work(connect):
        head, body, silent = [await connect() for _ in range(3)]
        head.writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nHost: ")
        body.send("POST", CHAT, b"{", {"Content-Length": "50"})
        late = await head.answer(), await body.answer()
        assert await silent.reader.read() == b""
        return late

    head, body = ask(App(served_model(tiny_folder, [])), work, Limits(read_seconds=0.3))
    assert (head.status, body.status) == (408, 408)


def test_a_client_that_reads_nothing_is_dropped(tiny_folder):
    served = served_model(tiny_folder, ["a" * 200] * 64)
    app = App(served)

    async def work(connect):
        client = await connect()
        client.writer.transport.pause_reading()
        fields = {"prompt": ["x"] * 64, "logprobs": 1, "return_token_ids": True, "stream": True}
        for _ in range(200):
            client.send("POST", TEXT, json.dumps(fields).encode())
            served.engine.texts += ["a" * 200] * 64
        counts = [-2, -1]
        deadline = time.monotonic() + 60
        while (counts[-1] != counts[-2] or app.running) and time.monotonic() < deadline:
            await asyncio.sleep(0.5)
            counts.append(app.requests)
        return counts[-1], app.running

    answered, running = ask(app, work, Limits(write_seconds=0.2))
    assert 1 <= answered < 200 and running == 0


def test_a_disconnect_in_mid_stream_ends_the_sampling(tiny_folder):
    app = App(served_model(tiny_folder))

    async def work(connect):
        client = await connect()
        client.send("POST", CHAT, json.dumps(chat(stream=True, max_tokens=200)).encode())
        await client.reader.readuntil(b'"content": "')
        assert app.running == 1
        client.close()
        passes = app.served.engine.batch.passes
        for _ in range(200):
            await asyncio.sleep(0.01)
            if not app.running and not app.served.engine.busy:
                return app.served.engine.batch.passes - passes
        return None

    passes = ask(app, work)
    assert passes is not None and passes < 150


def test_a_disconnect_is_no_logged_error(caplog):
    async def handler(request):
        try:
            await asyncio.sleep(60)
        finally:
            return HTTPResponse(200, b"x" * 2**24)  # noqa: B012 - what is left to send when the client has gone

    async def work(connect):
        client = await connect()
        client.send("GET", "/")
        await asyncio.sleep(0.05)
        client.writer.transport.abort()
        await asyncio.sleep(0.1)

    ask(handler, work)
    gc.collect()
    assert not caplog.records


def test_nonsense_is_no_request(tiny_folder):
    async def work(connect):
        client = await connect()
        client.writer.write(b"\x16\x03\x01 nonsense\r\n\r\n")
        first = await client.answer()
        client = await connect()
        client.send("POST", CHAT, b"{not json")
        return first, await client.answer()

    first, second = ask(App(served_model(tiny_folder, [])), work)
    assert first.status == 400 and second.status == 400 and "not JSON" in second.json["error"]["message"]


def test_requests_sent_ahead_are_answered_in_order(tiny_folder):
    async def work(connect):
        client = await connect()
        for text in ("one", "two", "three"):
            client.send("POST", TEXT, json.dumps({"prompt": text}).encode())
        return [(await client.answer()).json["choices"][0]["text"] for _ in range(3)]

    assert ask(App(served_model(tiny_folder, ["1", "2", "3"])), work) == ["1", "2", "3"]


def test_the_end_lets_requests_finish(tiny_folder):
    app = App(served_model(tiny_folder))

    async def work():
        from lmrl.serve.http import HTTPServer
        from tests.serve.clients import CHAT, Connection

        server = HTTPServer(app, Limits(grace_seconds=20))
        port = await server.start("127.0.0.1", 0)
        client = Connection(*await asyncio.open_connection("127.0.0.1", port))
        idle = Connection(*await asyncio.open_connection("127.0.0.1", port))
        client.send("POST", CHAT, json.dumps(chat(max_tokens=100)).encode())
        while not app.running:
            await asyncio.sleep(0.001)
        closing = asyncio.ensure_future(server.close())
        answer = await client.answer()
        await closing
        with pytest.raises(ConnectionError):
            await asyncio.open_connection("127.0.0.1", port)
        return answer, await idle.reader.read()

    answer, rest = asyncio.run(work())
    assert answer.status == 200 and answer.headers["connection"] == "close" and rest == b""


def test_the_verb(tiny_folder):
    arguments = ["serve", str(tiny_folder), "--port", "0", "--key-env", "A_KEY", "rollouts.temperature=0"]
    process = subprocess.Popen(
        [sys.executable, "-m", "lmrl", *arguments],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"A_KEY": KEY, "PYTHONPATH": os.getcwd()},
    )
    try:
        line = process.stdout.readline()
        port = int(line.split("/v1")[0].rsplit(":", 1)[1])
        import urllib3

        url = f"http://127.0.0.1:{port}{CHAT}"
        answers = [urllib3.request("POST", url, json=chat(), headers=bearer(key)) for key in (KEY, KEY, "x" * 32)]
        process.send_signal(signal.SIGTERM)
        began = time.monotonic()
        assert process.wait(20) == 0 and time.monotonic() - began < 15
        assert "served 2 requests" in process.stdout.read()
    finally:
        process.kill()
    assert [answer.status for answer in answers] == [200, 200, 401]
    first, second = (answer.json()["choices"][0]["message"]["content"] for answer in answers[:2])
    assert first == second and KEY not in line
