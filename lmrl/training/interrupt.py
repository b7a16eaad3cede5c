"""SIGTERM, SIGHUP and Ctrl-C: finish what must not be interrupted, save, then stop."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any

from lmrl.plugins.foreign import runs_here, waited_for, watch

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Interrupted(BaseException):
    """Raised at a safe point after a signal. Carries the signal's number."""

    def __init__(self, number: int):
        self.number = number
        super().__init__(signal.Signals(number).name)


class Interrupt:
    """Catches the first signal; a second one has its usual effect at once.

    `check()` raises Interrupted only where `safe` is set: while a rollout runs, when nothing has changed since the last
    finished step. In a background thread it always does, because episodes there can be played again.

    A signal that arrives while a reward or an environment runs is acknowledged, and ends the call if that is safe.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self.safe = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Interrupt:
        watch()
        if threading.current_thread() is threading.main_thread():
            for number in STOPPING:
                if number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN:  # nohup
                    continue
                self._previous[number] = signal.signal(number, self._catch)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _catch(self, number: int, _: FrameType | None) -> None:
        self.number = number
        for caught, handler in self._previous.items():
            signal.signal(caught, handler)
        if call := waited_for():
            ends = "ending it" if self.safe else "waiting for it; the same signal again ends the run at once"
            os.write(2, f"lmrl: {signal.Signals(number).name} in the middle of {call}: {ends}\n".encode())
            if self.safe and runs_here():  # elsewhere, the code that waits for the call runs `check`
                raise Interrupted(number)

    def check(self) -> None:
        in_background = threading.current_thread() is not threading.main_thread()
        if self.number is not None and (self.safe or in_background):
            raise Interrupted(self.number)
