"""Dispatching requests to several servers: a bounded number in flight, and none lost if a server dies."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from lmrl.engines.vllm_server.client import RequestFailed, ServerLost
from lmrl.engines.vllm_server.supervisor import ServerSupervisor
from lmrl.errors import EngineError, LmrlError

PATIENCE = 5.0
"""Seconds that threads have to end."""
TRIES = 4
"""How often a request may fail on live servers. Requests lost with a server do not count."""


@dataclass(eq=False)
class Job:
    """A request. ask: sends it to a supervisor's server; raises ServerLost if it must be sent again, to this server or
    another. done: called once, from another thread, with the answer or an error."""

    ask: Callable[[ServerSupervisor], Any]
    done: Callable[[Any, LmrlError | None], None]
    failures: int = 0


class Dispatcher:
    """Sends jobs to servers until it is closed. A server gets jobs only while it is in service.

    in_flight: maximum number of requests in flight per server. changed: notified when a server comes into service.
    """

    def __init__(self, supervisors: Sequence[ServerSupervisor], in_flight: int, changed: threading.Condition):
        self.supervisors, self.in_flight, self.changed = supervisors, in_flight, changed
        self.waiting: deque[Job] = deque()
        self.unanswered = 0
        self.over = False
        self.threads: list[threading.Thread] = []

    def put(self, job: Job) -> None:
        with self.changed:
            self.waiting.append(job)
            self.unanswered += 1
            wanted = min(self.in_flight, self.unanswered)
            self.changed.notify_all()
        if len(self.threads) < wanted * len(self.supervisors):
            for supervisor in self.supervisors:
                self.threads.append(threading.Thread(target=self._work, args=(supervisor,), daemon=True))
                self.threads[-1].start()

    def close(self) -> None:
        """Abort unanswered requests, and end the threads."""
        with self.changed:
            self.over = True
            broken_off = self.unanswered > 0
            self.changed.notify_all()
        deadline = time.monotonic() + PATIENCE
        while any(thread.is_alive() for thread in self.threads) and time.monotonic() < deadline:
            if broken_off:  # repeatedly: a request may have been about to be sent
                for supervisor in self.supervisors:
                    supervisor.client.hang_up()
            for thread in self.threads:
                thread.join(timeout=0.05)
                if broken_off and thread.is_alive():
                    break

    def _work(self, supervisor: ServerSupervisor) -> None:
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.over or (self.waiting and supervisor.in_service))
                if self.over:
                    return
                job = self.waiting.popleft()
            try:
                answer, error = job.ask(supervisor), None
            except ServerLost as lost:
                job.failures += isinstance(lost, RequestFailed)
                if job.failures == TRIES:
                    self._finish(job, None, EngineError(f"a request failed {TRIES} times, at last: {lost}"))
                else:
                    with self.changed:
                        self.waiting.appendleft(job)
                if not self.over:
                    supervisor.mark_lost(str(lost))
                continue
            except LmrlError as refused:
                answer, error = None, refused
            except Exception as unexpected:  # a bug here must not leave the caller waiting
                reason = f"{type(unexpected).__name__}: {unexpected}"
                answer, error = None, EngineError(f"a request could not be sent: {reason}")
            self._finish(job, answer, error)

    def _finish(self, job: Job, answer: Any, error: LmrlError | None) -> None:
        with self.changed:
            if self.over:
                return
            self.unanswered -= 1
        job.done(answer, error)
