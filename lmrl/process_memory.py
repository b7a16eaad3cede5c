"""The memory of this process, from the operating system."""

from __future__ import annotations

import re
import resource
import sys
from pathlib import Path

STATUS = Path("/proc/self/status")


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
