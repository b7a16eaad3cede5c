"""Runs in processes of their own that cost no import: a server with everything imported forks for each of them.

Importing torch and transformers takes longer than most runs that tests start. What is forked is a process like any other: it can be
killed, has its own environment and folder, and ends as an interpreter does.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

IMPORTS = [
    "lmrl.cli",
    "lmrl.training",
    "lmrl.evaluation",
    "accelerate",
    "peft",
    "datasets",
    "transformers.models.llama.modeling_llama",
]
"""Modules that the server holds ready."""
SERVER = r"""
import atexit, importlib, json, os, select, signal, sys, threading, traceback
for name in sys.argv[1:]:
    importlib.import_module(name)

def child(job):
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    for place, (path, flags) in enumerate([(os.devnull, os.O_RDONLY), *((job[one], os.O_WRONLY | os.O_APPEND) for one in ("out", "err"))]):
        os.dup2(os.open(path, flags), place)
    os.environ.clear()
    os.environ.update(job["env"])
    os.chdir(job["cwd"])
    sys.argv, sys.path[0], status = job["argv"], job["cwd"], 0
    try:
        exec(compile(job["code"], "<test>", "exec"), {"__name__": "__main__"})
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if not isinstance(end.code, int | None):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        status = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(status)

def say(**what):
    os.write(1, (json.dumps(what) + "\n").encode())

running, rest = set(), b""
say(ready=True)
while True:
    if select.select([0], [], [], 0.02 if running else None)[0]:
        part = os.read(0, 1 << 16)
        if not part:
            os._exit(0)
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            job = json.loads(line)
            pid = os.fork()
            if pid == 0:
                child(job)
            running.add(pid)
            say(job=job["job"], pid=pid)
    for pid in list(running):
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            running.discard(pid)
            say(ended=pid, status=os.waitstatus_to_exitcode(status))
"""
COMMAND = "import sys; sys.argv[0] = 'lmrl'; from lmrl.cli import main; main()"
"""What `lmrl` runs."""


class Server:
    """The process that forks; one for each worker of the test run, started when it is first needed."""

    def __init__(self) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER, *IMPORTS], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self.changed = threading.Condition()
        self.pids: dict[int, int] = {}
        self.statuses: dict[int, int] = {}
        self.jobs = 0
        assert json.loads(self.process.stdout.readline()) == {"ready": True}
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        for line in self.process.stdout:
            told = json.loads(line)
            with self.changed:
                if "job" in told:
                    self.pids[told["job"]] = told["pid"]
                else:
                    self.statuses[told["ended"]] = told["status"]
                self.changed.notify_all()

    def start(self, **job: object) -> int:
        """Fork; returns the process's id."""
        with self.changed:
            self.jobs += 1
            number = self.jobs
            self.process.stdin.write((json.dumps(job | {"job": number}) + "\n").encode())
            self.process.stdin.flush()
            assert self.changed.wait_for(lambda: number in self.pids, 60)
            pid = self.pids[number]
            self.statuses.pop(pid, None)  # of an older process of that number
        return pid


_server: Server | None = None


class Process:
    """As subprocess.Popen, for `lmrl ARGUMENTS` or other code in a forked process; output goes to files."""

    def __init__(
        self,
        arguments: list[str],
        code: str = COMMAND,
        env: dict[str, str] | None = None,
        cwd: str | Path | None = None,
    ):
        global _server
        _server = _server or Server()
        self.args, self.returncode = arguments, None
        self.files = [Path(tempfile.mkstemp(prefix="lmrl-test-")[1]) for _ in range(2)]
        self.pid = _server.start(
            argv=["lmrl", *map(str, arguments)],
            code=code,
            env=dict(os.environ if env is None else env),
            cwd=str(cwd or os.getcwd()),
            out=str(self.files[0]),
            err=str(self.files[1]),
        )

    def poll(self) -> int | None:
        with _server.changed:
            self.returncode = _server.statuses.get(self.pid)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        with _server.changed:
            if not _server.changed.wait_for(lambda: self.pid in _server.statuses, timeout):
                raise subprocess.TimeoutExpired(self.args, timeout)
            self.returncode = _server.statuses[self.pid]
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        try:
            self.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise
        texts = [file.read_text(errors="replace") for file in self.files]
        for file in self.files:
            file.unlink()
        return texts[0], texts[1]

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def run(arguments: list[str], timeout: float = 300, **options: object) -> subprocess.CompletedProcess:
    """As subprocess.run with the output as text: `lmrl ARGUMENTS`, or `code` with them as sys.argv."""
    process = Process(arguments, **options)
    out, err = process.communicate(timeout)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)
