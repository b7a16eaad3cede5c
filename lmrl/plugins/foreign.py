"""Calls of user code in this process (rewards, environments): global settings that they change are restored."""

from __future__ import annotations

import mmap
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

FORKED = 70
"""Exit code of a second process that returns from such a call after a fork (EX_SOFTWARE)."""


GRACE = 60.0
"""Seconds after its limit in which a call can still be interrupted; then the process ends."""
REPEAT = 5.0
"""Seconds between two interrupts of a call that exceeds its limit: it may catch the first."""


class CallTimedOut(Exception):
    """A call took longer than its limit. Trying again would take as long."""

    temporary = False


class foreign:  # noqa: N801 - reads as a statement
    """`with foreign("reward f"):` around a call.

    torch's global settings (gradients on or off, default dtype, threads, deterministic kernels) and the working
    directory are restored afterwards: otherwise a reward that turns gradients off would silently stop the training. A call that forks returns
    in two processes; the new one is ended here, before it can write to the run.

    limit: seconds after which the call is interrupted by CallTimedOut; key: where the recipe sets it (None: it does not). This needs the main
    thread, and code that returns to Python now and then; otherwise `watch` ends the process, unless the call `may_hang`.
    """

    def __init__(
        self, what: str, limit: float | None = None, key: str | None = "task.call_timeout", may_hang: bool = False
    ):
        self.what, self.limit, self.may_hang = what, limit, may_hang
        self.where = f" ({key})" if key else ""
        self.alarm: tuple[Any, tuple[float, float]] | None = None
        self.over = False

    def __enter__(self) -> None:
        self.process, self.settings = os.getpid(), _settings()
        self.thread = threading.get_ident()
        self.began = time.monotonic()
        if not _running:
            _keep_directory()
        _running.append(self)
        _note()
        if self.limit is not None and threading.current_thread() is threading.main_thread():
            self.alarm = (
                signal.signal(signal.SIGALRM, self._late),
                signal.setitimer(signal.ITIMER_REAL, self.limit, REPEAT),
            )

    def _late(self, _: int, __: FrameType | None) -> None:
        if not self.over:
            raise CallTimedOut(f"timed out after {self.limit:g} s{self.where}")

    def _restore_alarm(self) -> None:
        if self.alarm is None:
            return
        handler, (seconds, interval) = self.alarm
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL if handler is None else handler)
        if seconds:  # another alarm, which has been pending meanwhile
            signal.setitimer(signal.ITIMER_REAL, max(seconds - (time.monotonic() - self.began), 0.001), interval)

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self.over = True
        finally:  # the alarm may fire in the line above, but not after it
            self._leave()

    def _leave(self) -> None:
        if self.alarm is not None:
            self._restore_alarm()
        expected = self in _running
        if expected:
            _running.remove(self)
        if os.getpid() == self.process:
            _note()
        else:
            text = (
                f"lmrl: {self.what} forked, and its second process ends here: start processes with subprocess instead\n"
            )
            os.write(2, text.encode())
            os._exit(FORKED)
        if not expected:  # abandoned: the program has gone on, and its settings are no longer those of before
            return
        if not _running:  # of nested and concurrent calls, the last
            _restore_directory()
        if self.settings is not None and self.settings != _settings():
            _restore(self.settings)


@contextmanager
def as_guest(device: torch.device) -> Iterator[None]:
    """Around training, which may be one call of a larger program, such as a notebook: gradients are on, whatever that
    program has set, and its torch settings and random generators are restored afterwards."""
    import numpy as np
    import torch

    settings, python, numpy = _settings(), random.getstate(), np.random.get_state()
    devices = [] if device.type == "cpu" else [device]
    try:
        with torch.random.fork_rng(devices, device_type=device.type), torch.inference_mode(False):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        if settings is not None:
            _restore(settings)


def waited_for() -> str | None:
    """The call that has been running longest, and for how long: `reward f (12 s)`; None: there is none."""
    call = next(iter(_running), None)
    return None if call is None else f"{call.what} ({time.monotonic() - call.began:.0f} s)"


def give_up_on(thread: int) -> None:
    """Stop waiting for the calls of an abandoned thread, which keeps running."""
    for call in [call for call in _running if call.thread == thread]:
        _running.remove(call)
    _note()


def runs_here() -> bool:
    """True if such a call is running in this thread."""
    return any(call.thread == threading.get_ident() for call in list(_running))


PATIENCE = 60.0
"""Seconds after which a call that has not returned is reported, and again each time the wait has doubled."""
_running: list[foreign] = []
_watcher: threading.Thread | None = None


def watch() -> None:
    """Start the thread that reports calls that do not return, once per process."""
    global _watcher
    if _watcher is None or not _watcher.is_alive():
        _watcher = threading.Thread(target=_name_slow_calls, daemon=True)
        _watcher.start()


def _name_slow_calls() -> None:
    told: foreign | None = None
    limit = PATIENCE
    while True:
        time.sleep(min(PATIENCE / 4, GRACE / 4, 5))
        for call in list(_running):
            if call.limit is not None and not call.may_hang and time.monotonic() - call.began > call.limit + GRACE:
                _give_up(call)
        first = next(iter(_running), None)
        if first is not told:
            told, limit = first, PATIENCE
        if first is not None and time.monotonic() - first.began > limit:
            ends = "`timeout` of a reward limits its calls"
            if first.limit is not None:
                ends = f"it has {first.limit:g} s{first.where}"
            print(
                f"lmrl: still waiting for {first.what} ({time.monotonic() - first.began:.0f} s); {ends}",
                file=sys.stderr,
            )
            limit *= 2


def _give_up(call: foreign) -> None:
    """End the process: a call exceeds its limit, and nothing in this process can stop it."""
    from lmrl.launch import leave_error

    text = (
        f"lmrl: {call.what} has not returned for {time.monotonic() - call.began:.0f} s and cannot be interrupted, so the run ends "
        "here: continue from its last checkpoint with --resume; a reward with `workers: 1` runs in a process that can be replaced"
    )
    if not leave_error(text, 1, own=True):
        os.write(2, f"{text}\n".encode())
    os._exit(1)


# --------------------------------------------------------------------------------------------------------------- last words
NOTE_BYTES = 256
_noted: tuple[Path, mmap.mmap] | None = None


def noted(path: Path) -> str | None:
    """The call in which a process ended without a word, by the note that it left."""
    return (path.read_bytes().rstrip(b"\0").decode(errors="replace") if path.exists() else "") or None


def keep_note(path: Path) -> str | None:
    """From now on, record the running call in this file, which survives the process.

    Returns the recorded call in which the previous process ended, if any. The file is mapped into memory, so a call
    costs no disk write.
    """
    global _noted
    drop_note()
    left = noted(path)
    path.write_bytes(bytes(NOTE_BYTES))
    with open(path, "r+b") as file:
        _noted = path, mmap.mmap(file.fileno(), NOTE_BYTES)
    return left


def drop_note() -> None:
    """Delete the note, because the process ends with its own message."""
    global _noted
    if _noted is not None:
        path, memory = _noted
        _noted = None
        memory.close()
        with suppress(OSError):  # it says nothing any more; the error that ends the run should be the one shown
            path.unlink()


def _note() -> None:
    if _noted is not None:
        call = next(iter(_running), None)
        text = call.what.encode(errors="replace")[:NOTE_BYTES] if call else b""
        _noted[1][:] = text.ljust(NOTE_BYTES, b"\0")


_directory: str | None = None
"""The working directory outside calls; None if it has been deleted."""


def _keep_directory() -> None:
    global _directory
    try:
        _directory = os.getcwd()
    except FileNotFoundError:
        _directory = None


def _restore_directory() -> None:
    if _directory is not None:
        os.chdir(_directory)


def _settings() -> tuple[Any, ...] | None:
    torch = sys.modules.get("torch")
    if torch is None or not hasattr(torch, "is_grad_enabled"):  # absent, or being imported
        return None
    return (
        torch.is_grad_enabled(),
        torch.get_default_dtype(),
        torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_float32_matmul_precision(),
    )


def _restore(settings: tuple[Any, ...]) -> None:
    import torch

    gradients, dtype, threads, deterministic, precision = settings
    torch.set_grad_enabled(gradients)
    torch.set_default_dtype(dtype)
    torch.use_deterministic_algorithms(deterministic)
    torch.set_float32_matmul_precision(precision)
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
