"""A small server that speaks as vLLM with lmrl's extension does, in a thread or as a process: `fake_server.py PORT`."""

from __future__ import annotations

import json
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class FakeServer:
    """Speaks as vLLM with lmrl's extension does. A completion repeats the prompt's first token; its log-probabilities say
    which seed it had. `on_generate` may misbehave: it is called with the number of the request, and may return a status.
    """

    def __init__(self, port: int = 0):
        self.version, self.stamp, self.loaded, self.paths = None, "default", [], []
        self.requests: list[dict] = []
        self.completed: list[str] = []
        """The weights that each completion came from."""
        self.on_generate = lambda number: None
        self.extension, self.logprobs, self.delay = True, "processed_logprobs", 0.0
        self.resets = iter(())
        """Whether the next resets of the prefix cache succeed; the others do."""
        self.now = self.most = 0
        self.lock = threading.Lock()
        self.connections: set = set()
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                fake.connections.add(self.connection)
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                status, answer = fake.answer(self.path, body)
                if status is None:  # hang up without a word
                    self.close_connection = True
                    return
                data = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: object) -> None: ...

        class Quiet(ThreadingHTTPServer):
            daemon_threads, request_queue_size = True, 64

            def handle_error(self, *_: object) -> None: ...  # clients hang up, which is part of the tests

        self.http = Quiet(("127.0.0.1", port), Handler)
        self.port = self.http.server_port
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()

    def answer(self, path: str, body: dict) -> tuple[int | None, dict]:
        self.paths.append(path)
        if path == "/collective_rpc":
            if not self.extension:
                return 500, {"error": {"message": "Worker failed with error ''W' object has no attribute 'lmrl'"}}
            return 200, {"results": [getattr(self, body["method"])(*body["args"])]}
        if path == "/update_weight_version":
            self.stamp = body["new_version"]
            return 200, {"success": True}
        if path.startswith("/reset_prefix_cache"):
            return 200, {"success": next(self.resets, True)}
        if path == "/inference/v1/generate":
            return self.generate(body)
        return 404, {"detail": "Not Found"}

    def lmrl_describe(self) -> dict:
        return {
            **{"version": self.version, "group": None, "device": "cpu", "gpu": None, "transfer": None},
            **{"logprobs": self.logprobs, "max_model_len": 64, "model_type": "llama", "vocabulary": 34},
        }

    def lmrl_load(self, path: str) -> dict:
        from safetensors.torch import load_file  # takes a while, which the process that is started does not need

        try:
            self.loaded.append(load_file(path))
        except Exception as error:
            return {"error": str(error)}
        self.version = None
        return {}

    def lmrl_name(self, version: str) -> dict:
        self.version = version
        return {}

    def generate(self, body: dict) -> tuple[int | None, dict]:
        with self.lock:
            self.requests.append(body)
            number = len(self.requests)
            self.now += 1
            self.most = max(self.most, self.now)
        try:
            time.sleep(self.delay)
            wrong = self.on_generate(number)
            if wrong is not None:
                return (None if wrong == "hang up" else wrong), {"error": {"message": "out of luck"}}
            options, first = body["sampling_params"], body["token_ids"][0]
            if "prompt_logprobs" in options:
                return 200, self.scored(body["token_ids"])
            tokens = [first] * min(options["max_tokens"], 3)
            content = [{"token_id": first, "logprob": -float(options["seed"] % 1000)}] * len(tokens)
            choice = {
                **{"token_ids": tokens, "finish_reason": "length", "logprobs": {"content": content}},
                "weight_versions": [{"version": self.stamp, "start": 0, "end": len(tokens)}],
            }
            self.completed.append(choice["weight_versions"][0]["version"])
            return 200, {"choices": [choice]}
        finally:
            with self.lock:
                self.now -= 1

    def scored(self, tokens: list[int]) -> dict:
        """The log-probability of a token is said to be minus the token."""
        scores = [None] + [{str(token): {"logprob": -float(token)}} for token in tokens[1:]]
        versions = [{"version": self.stamp, "start": 0, "end": 1}]
        return {"choices": [{"weight_versions": versions}], "prompt_logprobs": scores}


if __name__ == "__main__":
    server = FakeServer(int(sys.argv[1]))
    server.lmrl_load = lambda path: {}
    print("serving", flush=True)
    threading.Event().wait()
