"""A server in the test's own event loop, and what asks it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from lmrl.engines.base import Completion, Engine, Sampling
from lmrl.engines.hf import HFEngine
from lmrl.policy.load import open_policy
from lmrl.serve.app import App
from lmrl.serve.endpoint import endpoint
from lmrl.serve.http import Limits
from lmrl.serve.model import ServedPolicy

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
KEY = "k" * 32


class Scripted(Engine):
    """Answers with given texts, one after the other; special tokens in them are control tokens."""

    def __init__(self, policy, texts):
        super().__init__(policy)
        self.texts, self.prompts = list(texts), []

    def sample(self, prompts, sampling, keys):
        self.prompts += prompts
        found = []
        for _ in prompts:
            ids = self.policy.tokenizer(self.texts.pop(0), add_special_tokens=False).input_ids
            reason = "eos" if ids[-1] in self.policy.eos_ids else "length"
            found.append(Completion(ids, [-0.5] * len(ids), reason))
        return found


def served_model(folder, texts=None, max_new_tokens=20):
    policy = open_policy(str(folder))
    engine = HFEngine(policy) if texts is None else Scripted(policy, texts)
    return ServedPolicy(policy, engine, Sampling(max_new_tokens), "tiny")


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def events(self) -> list[Any]:
        lines = [line[6:] for line in self.body.decode().split("\n\n") if line]
        assert lines[-1] == "[DONE]"
        return [json.loads(line) for line in lines[:-1]]


class Connection:
    def __init__(self, reader, writer):
        self.reader, self.writer = reader, writer

    def send(self, method, path, body=b"", headers={}):
        given = {"Host": "127.0.0.1", "Content-Type": "application/json", "Content-Length": str(len(body))} | headers
        head = "".join(f"{name}: {value}\r\n" for name, value in given.items() if value is not None)
        self.writer.write(f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode() + body)

    async def answer(self) -> Answer:
        head = (await self.reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        status = int(head[0].split()[1])
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in head[1:] if line)}
        if headers.get("transfer-encoding") == "chunked":
            body = b""
            while size := int(await self.reader.readline(), 16):
                body += (await self.reader.readexactly(size + 2))[:-2]
            await self.reader.readline()
        else:
            body = await self.reader.readexactly(int(headers["content-length"]))
        return Answer(status, headers, body)

    async def post(self, path, content, key=None, **headers) -> Answer:
        self.send("POST", path, json.dumps(content).encode(), bearer(key) | headers)
        return await self.answer()

    async def get(self, path, key=None, **headers) -> Answer:
        self.send("GET", path, b"", bearer(key) | headers)
        return await self.answer()

    def close(self):
        self.writer.close()


def bearer(key):
    return {"Authorization": f"Bearer {key}"} if key else {}


@asynccontextmanager
async def serving(app: App, limits: Limits = Limits()):
    """Inside, a function connects to the app."""
    open_ones = []
    async with endpoint(app, limits) as port:

        async def connect() -> Connection:
            connection = Connection(*await asyncio.open_connection("127.0.0.1", port))
            open_ones.append(connection)
            return connection

        connect.port = port
        yield connect
        for connection in open_ones:
            connection.close()
        await asyncio.sleep(0)


def ask(app: App, work: Callable[[Any], Coroutine[Any, Any, Any]], limits: Limits = Limits()) -> Any:
    """The result of work(connect) beside the served app."""

    async def both():
        async with asyncio.timeout(60), serving(app, limits) as connect:
            return await work(connect)

    return asyncio.run(both())


def chat(text="hello", **fields):
    return {"messages": [{"role": "user", "content": text}], "max_tokens": 6} | fields
