"""Keeping freed memory in the process.

glibc returns every large block to the kernel as soon as it is freed, and the next tensor of that size faults all its
pages in again, zeroed. Training frees and allocates the same blocks over and over, which on a CPU costs a good part of
the time.
"""

from __future__ import annotations

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGEST = 1 << 30


def keep_freed_memory() -> None:
    """Ask the C library to reuse freed blocks of up to 1 GiB. Does nothing without glibc."""
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, LARGEST)
        mallopt(M_TRIM_THRESHOLD, LARGEST)
