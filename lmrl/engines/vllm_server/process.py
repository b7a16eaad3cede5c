"""A vLLM server as a process of the run: how it is started, and how it ends."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from lmrl.engines.vllm_server.client import MODEL_NAME, SERVE_OPTIONS
from lmrl.recipe.server import Server

LAUNCHER_VARIABLES = (
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK"),
    *("MASTER_ADDR", "MASTER_PORT"),
)
"""Set by torchrun for the ranks of the run; a server is not one of them."""

ERROR_LINE = re.compile(r"\w(Error|Exception): \S")
GRACE = 10.0
"""Seconds that a server gets to end by itself."""


class ServerProcess:
    """A server on the loopback interface, in its own process group, that ends with this process.

    model: folder with config and tokenizer; weights are sent later. gpus: the devices it may use, () on a CPU. log: the
    file its output is added to.
    """

    def __init__(self, options: Server, model: Path, max_model_len: int | None, gpus: tuple[str, ...], log: Path):
        self.port, self.log = free_port(), log
        self.command = serve_command(options, model, self.port, max_model_len, gpus)
        self.environment = serve_environment(os.environ, gpus)
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with open(self.log, "ab") as log:
            log.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} {' '.join(self.command)}\n".encode())
            self.process = subprocess.Popen(
                self.command,
                env=self.environment | {"LMRL_PARENT": str(os.getpid())},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def ended(self) -> bool:
        return self.process is not None and self.process.poll() is not None

    def ends_within(self, seconds: float) -> bool:
        """True if it has ended or is ending: a connection breaks a moment before the exit code is there."""
        if self.process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(seconds)
        return self.ended

    def kill(self) -> None:
        """End the server and its workers at once; these outlive a server that was killed."""
        if self.process is None:
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def stop(self) -> None:
        """End the server, with a little time to remove its shared memory."""
        if self.process is not None and not self.ended:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(GRACE)
        self.kill()

    def last_words(self) -> str:
        """A description of its end: exit code, the last error in its log (or its last line), and where the log is."""
        lines = [line.strip() for line in self.log.read_text(errors="replace").splitlines()[-200:] if line.strip()]
        # vLLM's processes report each other's end, "see root cause above", after the cause itself.
        errors = [line for line in lines if ERROR_LINE.search(line) and "root cause" not in line]
        said = (errors or lines or [""])[-1][:400]
        code = self.process.poll() if self.process else None
        ended = "is still running" if code is None else f"ended with {code}"
        return f"{ended}; its log {self.log} says: {said}"


def serve_command(
    options: Server, model: Path, port: int, max_model_len: int | None, gpus: tuple[str, ...]
) -> list[str]:
    command = [
        *(
            sys.executable,
            "-P",
            "-m",
            "lmrl.engines.vllm_launch",
        ),  # -P: import nothing from the current folder
        f"--model={model}",
        f"--served-model-name={MODEL_NAME}",
        "--host=127.0.0.1",
        f"--port={port}",
        "--load-format=dummy",
        f"--dtype={options.dtype}",
        f"--max-num-seqs={options.in_flight}",
        f"--kv-cache-memory-bytes={int(options.memory * 2**30)}",
        f"--tensor-parallel-size={options.tensor_parallel_size}",
        "--disable-uvicorn-access-log",
        *SERVE_OPTIONS,
    ]
    if max_model_len is not None:
        command.append(f"--max-model-len={max_model_len}")
    if gpus:
        # Only `memory` decides how much is taken: by default vLLM requires nine tenths of the GPU to be free.
        return [*command, "--gpu-memory-utilization=0.01", '--weight-transfer-config={"backend": "nccl"}']
    return [*command, "--enforce-eager"]  # compiling takes minutes on a CPU


def serve_environment(own: Mapping[str, str], gpus: tuple[str, ...]) -> dict[str, str]:
    environment = {name: value for name, value in own.items() if name not in LAUNCHER_VARIABLES}
    environment |= {"VLLM_SERVER_DEV_MODE": "1", "VLLM_NO_USAGE_STATS": "1"}
    if gpus:
        return environment | {"CUDA_VISIBLE_DEVICES": ",".join(gpus)}
    # One process less to start; and several servers, or a server and the run, must not be bound to the same cores.
    return environment | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}


def gpus_of(index: int, count: int, each: int, visible: list[str], ranks: int) -> tuple[str, ...]:
    """The GPUs of server `index` of `count`, `each` of them: those that no rank of the run uses, if there are enough.

    visible: the GPUs of this machine that the run may use, of which its ranks take the first ones.
    """
    free = visible[ranks:] if len(visible) - ranks >= count * each else visible
    return tuple(free[(index * each + number) % len(free)] for number in range(each)) if free else ()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
