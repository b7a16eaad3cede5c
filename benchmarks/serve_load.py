"""`lmrl serve` under load: clients that send requests without pause, some of which disconnect mid-stream. Errors, latency, and leaks.

    python benchmarks/serve_load.py --clients 64 --seconds 60 [--model FOLDER] [--json FILE] [rollouts.engine=vllm ...]

The server is a separate process. Each client draws from five kinds of requests: a chat, a stream that it reads to the end, one that it
abandons after the first piece, several choices of a completion, and a chat with a tool definition. Half of the requests are sent over a
connection that stays open, half over a new one each. An error is any status but 200, a broken connection, or an incomplete answer.
After a warm-up of a quarter of the time (which contains most of the allocator's growth) and again after the last client, when the server
has answered everything, its memory, open files and threads are read from /proc. Without `--model`, the model has 60 thousand random
weights, so that the server is measured, not the model.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}},
    },
}
KINDS = ("chat", "stream", "left", "choices", "tools")
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


@dataclass
class Tally:
    """The observations of all clients."""

    seconds: list[float] = field(default_factory=list)
    """Latency of each answer that was read to the end."""
    tokens: int = 0
    left: int = 0
    errors: list[str] = field(default_factory=list)


class Client:
    """A client of the server at a port, which sends requests until `ends`."""

    def __init__(self, port: int, number: int, tokens: int, tally: Tally):
        self.port, self.random, self.tokens, self.tally = port, random.Random(number), tokens, tally
        self.open: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def run(self, ends: float) -> None:
        while time.monotonic() < ends:
            kind, kept = self.random.choice(KINDS), self.random.random() < 0.5
            began = time.monotonic()
            try:
                await self._ask(kind, kept)
            except (OSError, asyncio.IncompleteReadError, ValueError, KeyError, IndexError, AssertionError) as error:
                self.tally.errors.append(f"{kind}: {type(error).__name__}: {error}")
                await self._close()
            else:
                if kind == "left":
                    self.tally.left += 1
                else:
                    self.tally.seconds.append(time.monotonic() - began)
        await self._close()

    async def _close(self) -> None:
        if self.open is not None:
            self.open[1].close()
            self.open = None

    async def _ask(self, kind: str, kept: bool) -> None:
        if self.open is None:
            self.open = await asyncio.open_connection("127.0.0.1", self.port)
        reader, writer = self.open
        words = "".join(self.random.choices("abcdefgh ", k=self.random.randint(5, 60)))
        content: dict[str, Any] = {"max_tokens": self.tokens, "messages": [{"role": "user", "content": words}]}
        if kind == "choices":
            content = {"max_tokens": self.tokens, "prompt": words, "n": 3}
        elif kind == "tools":
            content["tools"] = [TOOL]
        streams = kind in ("stream", "left")
        body = json.dumps(content | {"stream": streams}).encode()
        path = COMPLETIONS if kind == "choices" else CHAT
        writer.write(
            f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\nConnection: {'keep-alive' if kept else 'close'}\r\n\r\n".encode()
            + body
        )
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        if " 200 " not in head.partition("\r\n")[0]:
            raise ValueError(head.partition("\r\n")[0])
        if kind == "left":
            await reader.readline()
            await self._close()
            return
        if streams:
            answer = b""
            while size := int(await reader.readline(), 16):
                answer += (await reader.readexactly(size + 2))[:-2]
            await reader.readline()
            events = [line[6:] for line in answer.decode().split("\n\n") if line]
            assert events[-1] == "[DONE]" and len(events) > 1, "the stream has no end"
            assert json.loads(events[-2])["choices"][0]["finish_reason"], "the stream has no finish reason"
        else:
            size = int(re.search(r"content-length: (\d+)", head)[1])  # type: ignore[index]
            given = json.loads(await reader.readexactly(size))
            assert len(given["choices"]) == content.get("n", 1), "choices are missing"
            self.tally.tokens += given["usage"]["completion_tokens"]
        if not kept:
            await self._close()


def look(process: int) -> dict[str, float]:
    """Memory in MB, open files and threads of a process."""
    status = dict(re.findall(r"(\w+):\s+(\d+)", Path(f"/proc/{process}/status").read_text()))
    files = len(list(Path(f"/proc/{process}/fd").iterdir()))
    return {"memory_mb": int(status["VmRSS"]) / 1024, "files": files, "threads": int(status["Threads"])}


def tiny_model(folder: Path) -> None:
    from lmrl.policy.load import load_policy
    from lmrl.recipe import Model

    config = {"model_type": "llama", "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2,
              "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 512}  # fmt: skip
    policy = load_policy(Model(config=config), texts=lambda: ["\n" + "".join(chr(code) for code in range(32, 127))])
    policy.tokenizer.chat_template = (
        "{% for message in messages %}[{{ message.role }}]{{ message.content }}<eos>\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    policy.save(folder)


async def load(port: int, process: int, clients: int, seconds: float, tokens: int) -> tuple[Tally, dict[str, Any]]:
    tally, begins = Tally(), time.monotonic()
    asked = [Client(port, number, tokens, tally).run(begins + seconds) for number in range(clients)]
    running = [asyncio.ensure_future(one) for one in asked]
    await asyncio.sleep(seconds / 4)
    seen: dict[str, Any] = {"early": look(process)}
    await asyncio.gather(*running)
    seen["seconds"] = time.monotonic() - begins
    await asyncio.sleep(2)  # until sampling for disconnected clients has stopped
    return tally, seen | {"late": look(process)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--tokens", type=int, default=16, help="maximum tokens per answer")
    parser.add_argument("--model", help="run, checkpoint, folder or hub name")
    parser.add_argument("--json", type=Path)
    parser.add_argument("overrides", nargs="*", help="overrides of lmrl serve, for instance rollouts.engine=vllm")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="lmrl-load-") as folder:
        if given.model is None:
            tiny_model(Path(folder))
        command = [sys.executable, "-m", "lmrl", "serve", given.model or folder, "--port", "0", *given.overrides]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert server.stdout is not None
        try:
            port = int(server.stdout.readline().split("/v1")[0].rsplit(":", 1)[1])
            idle = look(server.pid)
            tally, seen = asyncio.run(load(port, server.pid, given.clients, given.seconds, given.tokens))
            server.terminate()
            status, said = server.wait(60), server.stdout.read().strip()
        finally:
            server.kill()
    ordered = sorted(tally.seconds) or [float("nan")]
    found = {
        "clients": given.clients,
        "seconds": round(seen["seconds"], 1),
        "answers": len(tally.seconds),
        "left": tally.left,
        "errors": len(tally.errors),
        "median_s": round(statistics.median(ordered), 3),
        "p99_s": round(ordered[int(0.99 * (len(ordered) - 1))], 3),
        **{
            f"{name}_{when}": round(value, 1)
            for when, read in (("idle", idle), ("early", seen["early"]), ("late", seen["late"]))
            for name, value in read.items()
        },
        "exit": status,
        "said": said,
    }
    print(json.dumps(found, indent=1))
    for line in sorted(set(tally.errors))[:20]:
        print(line, file=sys.stderr)
    if given.json:
        given.json.write_text(json.dumps(found) + "\n")
    sys.exit(bool(tally.errors))


if __name__ == "__main__":
    main()
