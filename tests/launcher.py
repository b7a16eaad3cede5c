"""Commands in processes that may be killed, without the seconds that imports take: a server that has imported lmrl forks them.

`Launcher().start("train", "recipe.yaml")` is a process in which `lmrl train recipe.yaml` runs. The server has one thread, so that
what is forked off it is as good as new.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
IMPORTS = ("accelerate", "transformers.models.llama.modeling_llama", "lmrl.cli", "lmrl.training")

Stop = tuple[str, int, int]
"""A function of lmrl.run, a number n, and a signal that the process sends itself after the n-th call of that function: `record` is a
line of metrics just written, `_fsync` the middle of writing a checkpoint, before the rename that makes it visible, `publish` just after."""


class Launcher:
    """A server of forked commands. imports: further modules that it holds ready."""

    def __init__(self, imports: Sequence[str] = ()):
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
        }
        self.server = subprocess.Popen(
            [sys.executable, str(Path(__file__)), *IMPORTS, *imports],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        atexit.register(self.close)

    def start(self, *arguments: str, stop: Stop | None = None, **environment: str) -> Launched:
        """Run `lmrl ARGUMENTS` in a process of its own and in this process's folder. environment: further variables."""
        return Launched(self, arguments, stop, environment)

    def run(self, *arguments: str, stop: Stop | None = None, **environment: str) -> subprocess.CompletedProcess:
        return self.start(*arguments, stop=stop, **environment).wait()

    def ask(self, request: dict[str, Any]) -> Any:
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        line = self.server.stdout.readline()
        if not line:
            raise RuntimeError("the server of forked commands has gone")
        return json.loads(line)

    def close(self) -> None:
        self.server.kill()
        self.server.wait()


class Launched:
    """A forked command. One at a time: the next starts after `wait`."""

    def __init__(self, launcher: Launcher, arguments: Sequence[str], stop: Stop | None, environment: dict[str, str]):
        self.launcher, self.arguments = launcher, list(arguments)
        self.folder = tempfile.TemporaryDirectory(prefix="lmrl-launched-")
        request = {"arguments": self.arguments, "stop": stop, "cwd": os.getcwd(), "streams": self.folder.name}
        request["environment"] = environment
        self.pid: int = launcher.ask(request)

    def kill(self) -> None:
        """SIGKILL; a process that has ended already is left as it is."""
        os.kill(
            self.pid, signal.SIGKILL
        )  # the server waits for it only when asked, so that its number is still its own

    def wait(self) -> subprocess.CompletedProcess:
        code = self.launcher.ask({"wait": self.pid})
        out, err = ((Path(self.folder.name) / name).read_text() for name in ("out", "err"))
        self.folder.cleanup()
        return subprocess.CompletedProcess(self.arguments, code, out, err)


@functools.cache
def launcher() -> Launcher:
    """The one that the tests of a process share."""
    return Launcher()


# ------------------------------------------------------------------------------------------------------------------- server
def serve() -> None:
    import importlib

    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what imports print is no reply
    for name in sys.argv[1:]:
        importlib.import_module(name)
    import torch

    torch.set_num_threads(1)
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            answer = os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1])
        else:
            answer = os.fork() or _child(**request)
        print(json.dumps(answer), file=replies, flush=True)


def _child(arguments: list[str], stop: Stop | None, cwd: str, streams: str, environment: dict[str, str]) -> None:
    """Run the command, and end the process."""
    code = 1
    try:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(Path(streams) / name, os.O_WRONLY | os.O_CREAT), number)
        os.chdir(cwd)
        os.environ.update(environment)
        if stop is not None:
            _stop_at(*stop)
        sys.argv = ["lmrl", *arguments]
        from lmrl.cli import main

        main()
        code = 0
    except SystemExit as left:
        code = left.code or 0
    except BaseException:
        traceback.print_exc()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _stop_at(where: str, count: int, number: int) -> None:
    import lmrl.run

    home = lmrl.run.Run if hasattr(lmrl.run.Run, where) else lmrl.run
    original, calls = getattr(home, where), 0

    def stopping(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        result = original(*args)
        if calls == count:
            os.kill(os.getpid(), number)
        return result

    setattr(home, where, stopping)


if __name__ == "__main__":
    serve()
