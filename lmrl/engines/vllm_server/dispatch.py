"""Dispatching requests to several servers: a bounded number in flight, and none lost if a server dies."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from lmrl.engines.vllm_server.client import RequestFailed, ServerLost
from lmrl.engines.vllm_server.supervisor import ServerSupervisor
from lmrl.errors import EngineError, LmrlError

TRIES = 4
"""How often a request may fail on live servers. Requests lost with a server do not count."""


def dispatch(
    count: int,
    supervisors: Sequence[ServerSupervisor],
    in_flight: int,
    ask: Callable[[ServerSupervisor, int], Any],
    changed: threading.Condition,
    watch: Callable[[], None],
) -> list[Any]:
    """The answers to requests 0 to `count` - 1, in order. Every request is answered exactly once.

    ask: sends a request to a supervisor's server; raises ServerLost if it must be sent again, to this server or
    another. in_flight: maximum number of requests in flight per server; a server gets requests only while it is in
    service. watch: called several times a second; raises to abandon everything.
    """
    waiting = deque(range(count))
    found: dict[int, Any] = {}
    failures = [0] * count
    errors: list[LmrlError] = []
    over = False

    def work(supervisor: ServerSupervisor) -> None:
        while True:
            with changed:
                changed.wait_for(lambda: over or (waiting and supervisor.in_service))
                if over:
                    return
                index = waiting.popleft()
            try:
                answer = ask(supervisor, index)
            except ServerLost as lost:
                with changed:
                    waiting.appendleft(index)
                    failures[index] += isinstance(lost, RequestFailed)
                    if failures[index] == TRIES:
                        errors.append(EngineError(f"a request failed {TRIES} times, at last: {lost}"))
                if not over:
                    supervisor.mark_lost(str(lost))
            except LmrlError as error:
                with changed:
                    errors.append(error)
                    changed.notify_all()
                return
            except Exception as error:  # a bug here must not leave the caller waiting
                with changed:
                    errors.append(EngineError(f"a request could not be sent: {type(error).__name__}: {error}"))
                    changed.notify_all()
                return
            else:
                with changed:
                    found[index] = answer
                    if len(found) == count:
                        changed.notify_all()

    threads = [
        threading.Thread(target=work, args=(supervisor,), daemon=True)
        for supervisor in supervisors
        for _ in range(min(in_flight, count))
    ]
    try:
        for thread in threads:
            thread.start()
        while True:
            with changed:
                changed.wait_for(lambda: errors or len(found) == count, timeout=0.1)
                if errors:
                    raise errors[0]
                if len(found) == count:
                    return [found[index] for index in range(count)]
            watch()
    finally:
        with changed:
            over = True
            changed.notify_all()
        if len(found) < count:
            for supervisor in supervisors:
                supervisor.client.hang_up()
        for thread in threads:
            if thread.ident is not None:
                thread.join(timeout=5)
