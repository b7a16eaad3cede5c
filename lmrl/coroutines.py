"""Running coroutines from synchronous code, and blocking work from coroutines."""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")
POLL = 0.1
"""Seconds between two checks whether to keep waiting."""


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine to its end in a new event loop, and cancel the tasks that it leaves running.

    A SystemExit in a task of the user's goes to whoever awaits that task; by itself it would end the loop.
    Also works inside a running event loop, as in a notebook: that loop is blocked meanwhile.
    """
    outer = asyncio._get_running_loop()
    task = asyncio.current_task(outer) if outer else None
    if outer is not None:
        if task is not None:
            asyncio.tasks._leave_task(outer, task)
        asyncio._set_running_loop(None)
    loop = asyncio.new_event_loop()
    try:
        main = loop.create_task(coroutine)
        while True:
            try:
                return loop.run_until_complete(main)
            except SystemExit:
                if main.done():
                    raise
    finally:
        try:
            _cancel_all(loop)
        finally:
            loop.close()
            if outer is not None:
                asyncio._set_running_loop(outer)
                if task is not None:
                    asyncio.tasks._enter_task(outer, task)


def _cancel_all(loop: asyncio.AbstractEventLoop) -> None:
    tasks = asyncio.all_tasks(loop)
    for task in tasks:
        task.cancel()
    if tasks:
        loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))


async def in_thread(work: Callable[[], T]) -> T:
    """The result of blocking work, which runs in a daemon thread: if nobody waits for it any more, it does not keep the
    process alive."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def body() -> None:
        result, error = None, None
        try:
            result = work()
        except BaseException as caught:
            error = caught
        post(loop, settle, future, result, error)

    threading.Thread(target=body, daemon=True).start()
    return await future


def is_async(call: Callable[..., Any]) -> bool:
    """True for an `async def`, and for an object whose `__call__` is one."""
    return inspect.iscoroutinefunction(call) or inspect.iscoroutinefunction(getattr(call, "__call__", None))  # noqa: B004


async def call_user(call: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    """The result of a function of the user's: an async one runs in this loop, a plain one in a thread. An awaitable that
    a plain one returns, as around an async function, is awaited in this loop."""
    task = asyncio.current_task()
    assert task is not None
    try:
        result = call(*arguments, **named) if is_async(call) else await in_thread(lambda: call(*arguments, **named))
        return await result if inspect.isawaitable(result) else result
    except asyncio.CancelledError as error:
        if task.cancelling():
            raise
        raise RuntimeError("raised CancelledError") from error  # of a task of its own: nobody has cancelled this one


def post(loop: asyncio.AbstractEventLoop, call: Callable[..., None], *arguments: Any) -> None:
    """Schedule a call in a loop from another thread; does nothing if the loop is closed."""
    try:
        loop.call_soon_threadsafe(call, *arguments)
    except RuntimeError:
        if not loop.is_closed():
            raise


def settle(future: asyncio.Future[Any], result: Any, error: BaseException | None) -> None:
    """Give a future what a thread returned or raised, unless nobody waits for it any more."""
    if future.done():
        return
    if isinstance(error, StopIteration | asyncio.CancelledError):  # which would be taken for the future's own
        error = RuntimeError(f"raised {type(error).__name__}")
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)


async def watched(awaitable: Awaitable[T], check: Callable[[], None]) -> T:
    """Wait, and call `check` regularly; if it raises, the awaitable is cancelled."""
    task = asyncio.ensure_future(awaitable)
    try:
        while not (await asyncio.wait([task], timeout=POLL))[0]:
            check()
        return task.result()
    finally:
        task.cancel()
        del task  # it holds the error, whose traceback holds this frame
