"""Processes that run a reward function, so that a hang or a crash costs samples, not the run.

A worker loads the function itself and communicates over its own socket: columns and scores are sent as JSON, and what
the function prints goes to a file. It leads a process group; when it is killed, so is everything that it has started.
POSIX only.
"""

from __future__ import annotations

import atexit
import json
import os
import queue
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
from typing import Any

from lmrl.errors import PluginError, RewardError

START_SECONDS = 120.0
"""Seconds that a worker has to load its function."""
LOG_BYTES = 1 << 20
"""Maximum bytes of a worker's output that are kept between two batches."""
TAIL = 200


class Failure(Exception):
    """Why rows could not be scored. The message continues a sentence that starts with the function's name."""

    temporary = False


class TimedOut(Failure):
    pass


class WorkerLost(Failure):
    pass


class Raised(Failure):
    """The function raised an exception in its worker."""

    def __init__(self, message: str, temporary: bool):
        super().__init__(message)
        self.temporary = temporary


# --------------------------------------------------------------------------------------------------------------- messages
def send(channel: socket.socket, message: Any) -> None:
    data = json.dumps(message).encode()
    channel.sendall(struct.pack("<Q", len(data)) + data)


def packed(values: list[Any]) -> list[Any]:
    """A worker's values as JSON: a Failure in place of a value becomes an object."""
    return [
        {"failure": str(value), "temporary": value.temporary} if isinstance(value, Failure) else value
        for value in values
    ]


def unpacked(values: list[Any]) -> list[Any]:
    """The inverse of `packed`."""
    return [
        Raised(value["failure"], value["temporary"]) if isinstance(value, dict) and "failure" in value else value
        for value in values
    ]


def receive(channel: socket.socket) -> Any:
    """The next message. Raises EOFError if the other side has closed, TimeoutError after the channel's timeout."""
    size = struct.unpack("<Q", _read(channel, 8))[0]
    return json.loads(_read(channel, size))


def _read(channel: socket.socket, size: int) -> bytes:
    parts, missing = [], size
    while missing:
        part = channel.recv(min(missing, 1 << 20))
        if not part:
            raise EOFError
        parts.append(part)
        missing -= len(part)
    return b"".join(parts)


# ----------------------------------------------------------------------------------------------------------------- worker
class Worker:
    """One process. spec: the reward's section of a recipe; key: its place there, for messages."""

    def __init__(self, spec: dict[str, Any], key: str):
        self.log = tempfile.TemporaryFile("a+b")
        self.channel, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "lmrl.rewards.worker", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=self.log,
                stderr=self.log,
                start_new_session=True,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)},
            )
        self.channel.settimeout(START_SECONDS)
        self.key = key
        send(self.channel, {"spec": spec, "key": key})

    def ready(self) -> Worker:
        """Wait until the function is loaded. Raises PluginError if it cannot be."""
        try:
            answer = receive(self.channel)
        except (EOFError, OSError) as error:
            reason = "timed out" if isinstance(error, TimeoutError) else self.end()
            self.kill()
            raise PluginError(f"{self.key}: a worker could not load the function: {reason}") from error
        if "plugin_error" in answer:
            self.kill()
            raise PluginError(answer["plugin_error"])
        self.needs: list[str] = answer["needs"]
        return self

    def score(self, arguments: dict[str, list[Any]], timeout: float | None) -> list[float | None]:
        """Run the function on a batch. Raises RewardError or Failure; after TimedOut and WorkerLost the worker is
        unusable."""
        try:
            self.channel.settimeout(timeout)
            send(self.channel, arguments)
            answer = receive(self.channel)
        except TimeoutError as error:
            self.kill()
            raise TimedOut(f"timed out after {timeout:g} s") from error
        except (EOFError, OSError) as error:
            reason = self.end()
            self.kill()
            raise WorkerLost(f"lost its worker: {reason}") from error
        if os.fstat(self.log.fileno()).st_size > LOG_BYTES:
            os.ftruncate(self.log.fileno(), 0)
        if "mistake" in answer:
            raise RewardError(answer["mistake"])
        if "raised" in answer:
            raise Raised(f"raised {answer['raised']}", answer["temporary"])
        return unpacked(answer["values"])

    def end(self) -> str:
        """The process's exit, and the end of its output."""
        try:
            code = self.process.wait(5)
        except subprocess.TimeoutExpired:
            return "it closed its connection"
        how = f"exit code {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}"
        self.log.seek(max(self.log.seek(0, os.SEEK_END) - TAIL, 0))
        printed = " ".join(self.log.read().decode(errors="replace").split())
        return f"{how}; it printed: {printed}" if printed else how

    def kill(self) -> None:
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.wait()
        self.channel.close()
        self.log.close()


class Pool:
    """Workers for one reward. A worker that was lost is replaced before the next batch."""

    def __init__(self, spec: dict[str, Any], key: str, count: int, timeout: float | None):
        self.spec, self.key, self.timeout = spec, key, timeout
        self.workers: set[Worker] = set()
        self.idle: queue.Queue[Worker | None] = queue.Queue()
        try:
            for worker in [self._start() for _ in range(count)]:  # they load concurrently
                self.idle.put(worker.ready())
                self.needs = worker.needs
        except BaseException:
            self.close()
            raise

    def _start(self) -> Worker:
        worker = Worker(self.spec, self.key)
        self.workers.add(worker)
        return worker

    def __call__(self, **arguments: list[Any]) -> list[float | None]:
        """Score a batch in the next idle worker. Raises as Worker.score does."""
        try:
            json.dumps(arguments)
        except (TypeError, ValueError) as error:
            raise RewardError(
                f"{self.key}: a column cannot be sent to a worker process as JSON ({error}): leave out workers and timeout"
            ) from error
        worker = self.idle.get()
        try:
            worker = worker or self._start().ready()
            return worker.score(arguments, self.timeout)
        except (TimedOut, WorkerLost, PluginError):
            self.workers.discard(worker)
            worker = None
            raise
        finally:
            self.idle.put(worker)

    def close(self) -> None:
        for worker in self.workers:
            worker.kill()
        self.workers.clear()


_pools: dict[str, Pool] = {}
_lock = threading.Lock()


def pool_of(spec: dict[str, Any], key: str, count: int, timeout: float | None) -> Pool:
    """The workers of a reward, shared by all uses with the same settings (training and evaluation)."""
    name = json.dumps(spec, sort_keys=True)
    with _lock:
        if name not in _pools:
            _pools[name] = Pool(spec, key, count, timeout)
        return _pools[name]


@atexit.register
def close_pools() -> None:
    """End all workers."""
    with _lock:
        while _pools:
            _pools.popitem()[1].close()
