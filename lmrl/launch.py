"""One run in several processes on this machine: start them, watch them, and report a single error if one fails.

Accelerate's features (DeepSpeed, FSDP) are set in an accelerate configuration file, which is turned into the
environment that `accelerate launch` would set. To launch on several machines, use `accelerate launch` or `torchrun`.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmrl.errors import COLLAPSED, RecipeError

if TYPE_CHECKING:
    from lmrl.training.interrupt import Interrupt

ERRORS = "LMRL_ERRORS"
"""Environment variable: the folder in which a process writes its error, for the launcher to show."""
ENDED_AS_TOLD = {128 + signal.SIGTERM, 128 + signal.SIGINT, 128 + signal.SIGHUP, -signal.SIGTERM}
"""Exit codes of processes that were told to end."""
POLL_SECONDS, LAST_WORDS_SECONDS, GRACE_SECONDS = 0.1, 5.0, 10.0
"""Seconds between two checks of the processes; for the others to report errors after one has failed; and to end when
asked."""


def launch(arguments: Sequence[str], processes: int | None, config: Path | None) -> int:
    """Run `lmrl ARGUMENTS` in several processes; returns the exit code. Prints one line if they failed.

    config: an accelerate configuration file. processes: None for the number in it.
    """
    from lmrl.training.interrupt import Interrupt  # imports torch, which `lmrl --help` does without

    environment, count = accelerate_environment(processes, config)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    threads = max((os.cpu_count() or 1) // count, 1)
    with tempfile.TemporaryDirectory(prefix="lmrl-launch-") as errors:
        shared = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "WORLD_SIZE": str(count),
            "LOCAL_WORLD_SIZE": str(count),
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
            ERRORS: errors,
        }
        with Interrupt() as interrupt:
            running = [
                subprocess.Popen(
                    [sys.executable, "-m", "lmrl", *arguments],
                    env=environment | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                    start_new_session=True,  # Ctrl-C reaches them through the launcher, once
                )
                for rank in range(count)
            ]
            return _watch(running, Path(errors), interrupt)


def accelerate_environment(processes: int | None, config: Path | None) -> tuple[dict[str, str], int]:
    """The environment of the processes, as `accelerate launch` would set it, and their number."""
    from lmrl.accelerators import has_memory

    environment = dict(os.environ)
    if config is not None:
        environment, processes = _configured(processes, config)
    # On a CPU accelerate must be told so, but not with DeepSpeed: it would then use plain processes instead.
    if not has_memory() and environment.get("ACCELERATE_USE_DEEPSPEED") != "true":
        environment["ACCELERATE_USE_CPU"] = "true"
    return environment, processes or 1


def _configured(processes: int | None, config: Path) -> tuple[dict[str, str], int]:
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
    from yaml import YAMLError

    given = ["--config_file", str(config), "--main_process_port", "0"]
    given += ["--num_processes", str(processes)] if processes else []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            args = launch_command_parser().parse_args([*given, "lmrl"])
            args, defaults, from_config = _validate_launch_command(args)
        except (ValueError, KeyError, TypeError, AttributeError, OSError, YAMLError) as error:
            raise RecipeError(f"--accelerate: {config}: {' '.join(str(error).split())}") from error
        if (args.num_machines or 1) > 1:
            raise RecipeError(
                f"--accelerate: {config}: --processes starts processes on this machine only; for several machines use accelerate launch"
            )
        if not args.use_deepspeed:
            return prepare_multi_gpu_env(args), args.num_processes
        fields = [*defaults.deepspeed_config, *(["mixed_precision"] if from_config else [])]
        args.deepspeed_fields_from_accelerate_config = ",".join(fields)
        return prepare_deepspeed_cmd_env(args)[1], args.num_processes


def _watch(running: list[subprocess.Popen[bytes]], errors: Path, interrupt: Interrupt) -> int:
    """Wait for the processes; end them all if one fails, or if the launcher is told to end."""
    told: int | None = None
    fine = {0, COLLAPSED}
    while any(process.poll() is None for process in running) and not _failed(running, fine):
        time.sleep(POLL_SECONDS)
        if interrupt.number is not None and told is None:  # each saves a checkpoint first, however long that takes
            told = interrupt.number
            fine |= ENDED_AS_TOLD
            for process in running:
                process.send_signal(signal.SIGTERM)
    _wait_for_last_words(running)
    failed = _failed(running, fine)
    _end(running)
    if failed:
        return _report(failed, running, errors)
    if told is not None:
        return 128 + told
    return COLLAPSED if any(process.returncode == COLLAPSED for process in running) else 0


def _failed(running: list[subprocess.Popen[bytes]], fine: set[int]) -> list[int]:
    """Ranks of the processes that ended with another exit code than those that are `fine`."""
    return [rank for rank, process in enumerate(running) if process.poll() not in (None, *fine)]


def _wait_for_last_words(running: list[subprocess.Popen[bytes]]) -> None:
    """After one has failed, give the others time to fail by themselves."""
    until = time.monotonic() + LAST_WORDS_SECONDS
    while time.monotonic() < until and any(process.poll() is None for process in running):
        time.sleep(POLL_SECONDS)


def _end(running: list[subprocess.Popen[bytes]]) -> None:
    until = time.monotonic() + GRACE_SECONDS
    for process in running:
        process.terminate()
    for process in running:
        try:
            process.wait(max(until - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _report(failed: list[int], running: list[subprocess.Popen[bytes]], errors: Path) -> int:
    """Print the failure that explains the others, and return its exit code."""
    found = [_failure(rank, running, errors) for rank in failed]
    cause = min(found, key=lambda one: (one["order"], one["time"]))
    print(cause["text"], file=sys.stderr)
    return int(cause["code"])


def _failure(rank: int, running: list[subprocess.Popen[bytes]], errors: Path) -> dict[str, Any]:
    """The end of a process. A silent death explains more than an error, and an lmrl error more than a library's, which
    may only say that another process is gone."""
    code = running[rank].returncode
    left = errors / f"{rank}.json"
    if left.exists():
        found: dict[str, Any] = json.loads(left.read_text())
        return found
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    text = f"lmrl: process {rank} of {len(running)} {how}, so the run has stopped; continue from its last checkpoint with --resume"
    return {"order": 0, "time": 0.0, "code": 1, "text": text}


def leave_error(text: str, code: int, own: bool) -> bool:
    """Write an error for the launcher; False if there is no launcher, so it must be shown here. own: True for an lmrl
    error."""
    folder = os.environ.get(ERRORS)
    if folder is None:
        return False
    entry = {"order": 1 if own else 2, "time": time.time(), "code": code, "text": text}
    scratch = Path(folder) / f".{os.environ['RANK']}"
    scratch.write_text(json.dumps(entry))
    scratch.rename(Path(folder) / f"{os.environ['RANK']}.json")
    return True
