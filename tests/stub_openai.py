"""A server of this machine that answers as OpenAI's API does."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = Callable[[str, dict[str, Any], int], Any]


class Stub:
    """What was asked, in order: path, headers and body of each request."""

    def __init__(self) -> None:
        self.url, self.seen = "", []
        self.lock = threading.Lock()


def chat_answer(text: str, **fields: Any) -> dict[str, Any]:
    usage = {"prompt_tokens": 10, "completion_tokens": 5}
    choice = {"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    return {"choices": [choice | fields], "usage": usage}


@contextmanager
def stub_openai(reply: Reply, models: tuple[str, ...] = ("m",)) -> Iterator[Stub]:
    """reply: from path, body and number of a request to JSON, or to (code, headers, JSON)."""
    stub = Stub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.answer(200, {}, {"data": [{"id": name} for name in models]})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with stub.lock:
                number = len(stub.seen)
                stub.seen.append((self.path, dict(self.headers), body))
            found = reply(self.path, body, number)
            self.answer(*(found if isinstance(found, tuple) else (200, {}, found)))

        def answer(self, code: int, headers: dict[str, str], content: Any) -> None:
            data = json.dumps(content).encode()
            self.send_response(code)
            for name, value in ({"Content-Length": str(len(data))} | headers).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    stub.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    try:
        yield stub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
