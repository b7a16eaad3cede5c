"""`lmrl ARGUMENTS` in a forked process that can be told where to stop."""

from __future__ import annotations

import os
import subprocess

from tests import forking

Stop = tuple[str, int, int]
"""A function of lmrl.run, a number n, and a signal that the process sends itself after the n-th call of that function: `record` is a
line of metrics just written, `_fsync` the middle of writing a checkpoint, before the rename that makes it visible, `publish` just after."""
STOPPING = """
import os, lmrl.run
home = lmrl.run.Run if hasattr(lmrl.run.Run, {where!r}) else lmrl.run
original, calls = getattr(home, {where!r}), 0
def stop(*args):
    global calls
    calls += 1
    result = original(*args)
    if calls == {count}:
        os.kill(os.getpid(), {number})
    return result
setattr(home, {where!r}, stop)
"""


def start(*arguments: str, stop: Stop | None = None, **environment: str) -> forking.Process:
    """Start it, in this process's folder. environment: further variables."""
    code = STOPPING.format(where=stop[0], count=stop[1], number=int(stop[2])) if stop else ""
    own = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    return forking.Process(list(arguments), code=code + forking.COMMAND, env=own)


def launch(*arguments: str, stop: Stop | None = None, **environment: str) -> subprocess.CompletedProcess:
    """Run it to its end, however that comes."""
    process = start(*arguments, stop=stop, **environment)
    out, err = process.communicate(300)
    return subprocess.CompletedProcess(list(arguments), process.returncode, out, err)
