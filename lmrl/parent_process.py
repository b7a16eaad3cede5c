"""Processes that end with the one that started them, however that ended: also by `kill -9`."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable


def when_parent_ends(parent: int, act: Callable[[], None]) -> None:
    """Call `act`, in a thread, once `parent` is no longer this process's parent."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        act()

    threading.Thread(target=watch, daemon=True).start()
