"""Calls of other people's code in this process (rewards, environments): what they change in it is put back."""

from __future__ import annotations

import os
import sys
import threading
import time
from types import TracebackType
from typing import Any

FORKED = 70
"""Exit code of a process that came back from such a call beside this one (EX_SOFTWARE)."""


class foreign:  # noqa: N801 - reads as a statement
    """`with foreign("reward f"):` around a call.

    Settings of torch that hold for the whole process (gradients on or off, default type, threads, deterministic kernels)
    are afterwards what they were: a reward that turns gradients off would else end the learning, without an error. A
    call that forks comes back in two processes; the new one ends here, before it writes to the run.
    """

    def __init__(self, what: str):
        self.what = what

    def __enter__(self) -> None:
        self.process, self.settings = os.getpid(), _settings()
        self.began = time.monotonic()
        _running.append(self)

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        _running.remove(self)
        if os.getpid() != self.process:
            text = (
                f"lmrl: {self.what} forked, and its second process ends here: start processes by subprocess instead\n"
            )
            os.write(2, text.encode())
            os._exit(FORKED)
        if self.settings is not None and self.settings != _settings():
            _restore(self.settings)


def waited_for() -> str | None:
    """The call that has been running longest, and for how long: `reward f (12 s)`; None: there is none."""
    call = next(iter(_running), None)
    return None if call is None else f"{call.what} ({time.monotonic() - call.began:.0f} s)"


PATIENCE = 60.0
"""Seconds after which a call that has not come back is named, and again after twice as many."""
_running: list[foreign] = []
_watcher: threading.Thread | None = None


def watch() -> None:
    """Start what names calls that do not come back, once in each process."""
    global _watcher
    if _watcher is None or not _watcher.is_alive():
        _watcher = threading.Thread(target=_name_slow_calls, daemon=True)
        _watcher.start()


def _name_slow_calls() -> None:
    told: foreign | None = None
    limit = PATIENCE
    while True:
        time.sleep(min(PATIENCE / 4, 5))
        call = next(iter(_running), None)
        if call is not told:
            told, limit = call, PATIENCE
        if call is not None and time.monotonic() - call.began > limit:
            print(
                f"lmrl: still waiting for {call.what} ({time.monotonic() - call.began:.0f} s); "
                "`timeout` of a reward limits its calls",
                file=sys.stderr,
            )
            limit *= 2


def _settings() -> tuple[Any, ...] | None:
    torch = sys.modules.get("torch")
    if torch is None or not hasattr(torch, "is_grad_enabled"):  # absent, or being imported
        return None
    return (
        torch.is_grad_enabled(),
        torch.get_default_dtype(),
        torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(),
    )


def _restore(settings: tuple[Any, ...]) -> None:
    import torch

    gradients, dtype, threads, deterministic = settings
    torch.set_grad_enabled(gradients)
    torch.set_default_dtype(dtype)
    torch.use_deterministic_algorithms(deterministic)
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
