"""The memory of this process: its limits and its peak, from the operating system, and what it does with freed blocks."""

from __future__ import annotations

import ctypes
import os
import re
import resource
import sys
from pathlib import Path

STATUS = Path("/proc/self/status")
CONTAINER = Path("/sys/fs/cgroup")
"""Limits and use of a container, if this process runs in one."""
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGEST = 1 << 30


def physical_bytes() -> int:
    """The machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def container_limit() -> int | None:
    """The memory that a container has; None without one, or if it sets no limit."""
    try:
        limit = (CONTAINER / "memory.max").read_text().strip()
    except OSError:
        return None
    return None if limit == "max" else int(limit)


def limit_bytes() -> int:
    """The memory that this process may use at most."""
    return min(physical_bytes(), container_limit() or physical_bytes())


def peak_resident_mb() -> int:
    """Largest resident size of this process so far.

    Linux lets a new program inherit `ru_maxrss` from the process that started it, so a run started by a large process, such
    as a notebook, would report that one's size: `VmHWM` begins anew.
    """
    try:
        found = re.search(r"^VmHWM:\s+(\d+) kB$", STATUS.read_text(), re.MULTILINE)
    except OSError:
        found = None
    if found:
        return int(found[1]) >> 10
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit >> 20


def keep_freed_memory() -> None:
    """Ask the C library to reuse freed blocks of up to 1 GiB. Does nothing without glibc.

    glibc returns every large block to the kernel as soon as it is freed, and the next tensor of that size faults all
    its pages in again, zeroed. Training frees and allocates the same blocks over and over, which on a CPU costs a good
    part of the time.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, LARGEST)
        mallopt(M_TRIM_THRESHOLD, LARGEST)
