"""Threads that step environments concurrently, with a time limit for each step."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from lmrl.coroutines import post, settle
from lmrl.plugins.foreign import CallTimedOut, give_up_on

T = TypeVar("T")


class StepThreads:
    """At most `count` calls run at a time; the others wait, and waiting does not count against their limit.

    A thread cannot be stopped. One whose call exceeds its limit is abandoned: another takes its place, and the call's
    result is dropped. Threads are daemons, so they do not keep the process from ending.
    """

    def __init__(self, count: int):
        self.count = count
        self.idle: list[StepThread] = []
        self.lost = 0
        """Abandoned threads."""
        self._places = asyncio.Semaphore(count)
        self._loop: asyncio.AbstractEventLoop | None = None

    async def run(self, work: Callable[[], T], limit: float | None) -> T:
        """The result of a call. Raises what it raises, and CallTimedOut after `limit` seconds."""
        loop = asyncio.get_running_loop()
        if self._loop is not loop:
            self._loop, self._places = loop, asyncio.Semaphore(self.count)
        async with self._places:
            thread = self.idle.pop() if self.idle else StepThread()
            future: asyncio.Future[T] = loop.create_future()
            thread.inbox.put((work, future, loop))
            try:
                done, _ = await asyncio.wait([future], timeout=limit)
            except asyncio.CancelledError:
                self._leave(thread)
                raise
            if not done:
                self._leave(thread)
                raise CallTimedOut(f"timed out after {limit:g} s (task.call_timeout)")
            self.idle.append(thread)
            return future.result()

    def close(self) -> None:
        """End the idle threads; new ones start when there are new calls."""
        while self.idle:
            self.idle.pop().inbox.put(None)

    def _leave(self, thread: StepThread) -> None:
        self.lost += 1
        thread.inbox.put(None)  # ends the thread when its call returns
        assert thread.ident is not None  # it has been started
        give_up_on(thread.ident)


class StepThread(threading.Thread):
    """Runs one call after the other, as they come into `inbox`: (work, future, loop); None ends it."""

    def __init__(self) -> None:
        super().__init__(daemon=True, name="environment")
        self.inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.start()

    def run(self) -> None:
        while (item := self.inbox.get()) is not None:
            work, future, loop = item
            result, error = None, None
            try:
                result = work()
            except BaseException as caught:  # an environment may even raise SystemExit
                error = caught
            post(loop, settle, future, result, error)
            del item, work, future, result, error
