"""A server in the running event loop, from its first request to its end."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from lmrl.errors import counted
from lmrl.serve.app import App
from lmrl.serve.http import HTTPServer, Limits


@asynccontextmanager
async def endpoint(app: App, limits: Limits) -> AsyncIterator[int]:
    """Serve the app on this machine inside the block; yields the port. At the end, running requests get `grace_seconds`."""
    server = HTTPServer(app, limits)
    try:
        yield await server.start("127.0.0.1", 0)
    finally:
        await server.close()


async def serve_until_signalled(app: App, host: str, port: int, limits: Limits) -> None:
    """Serve until SIGINT or SIGTERM; a second signal ends the server at once."""
    loop, ending = asyncio.get_running_loop(), asyncio.Event()
    server = HTTPServer(app, limits)
    port = await server.start(host, port)
    shown = f"[{host}]" if ":" in host else host
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, ending.set)
    print(f"{app.served.name} at http://{shown}:{port}/v1 (Ctrl-C ends it)", flush=True)
    await ending.wait()
    ending.clear()
    if app.running:
        print(f"ending: {limits.grace_seconds:g} s for {counted(app.running, 'completion')} to finish", flush=True)
    closing = asyncio.ensure_future(server.close())
    again = asyncio.ensure_future(ending.wait())
    await asyncio.wait([closing, again], return_when=asyncio.FIRST_COMPLETED)
    again.cancel()
    if not closing.done():
        await server.close(0)
        closing.cancel()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.remove_signal_handler(number)
    failed = f", {app.failures} of them failed" if app.failures else ""
    print(f"served {counted(app.requests, 'request')}{failed}")
