"""Rewards for code, by running it.

Code runs in a separate process with limits on time, memory and file size, an empty environment, a temporary folder, and, on Linux with
user namespaces, no network. This stops accidents, not attackers: the process runs as the same user, can read what that user can
read, and has network access if there are no user namespaces. Run unreviewed code in a container.
"""

from __future__ import annotations

import re
import resource
import shutil
import subprocess
import sys
import tempfile
from functools import cache

from lmrl.reward_models._text import text_of

FENCE = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)```", re.DOTALL)


def passes(completions: list, tests: list, seconds: float = 5.0, memory_mb: int = 512, **_) -> list[float | None]:
    """Share of the row's `tests` that a completion passes; None for a row without tests.

    tests: statements such as `assert add(1, 2) == 3`, as a list or one per line; each runs after the code in a separate
    process. The code is the content of the last fence (```), otherwise the whole completion. `seconds` and `memory_mb` are
    limits per test.
    """
    rewards: list[float | None] = []
    for completion, given in zip(completions, tests, strict=True):
        cases = [line for line in given.splitlines() if line.strip()] if isinstance(given, str) else given
        if not cases:
            rewards.append(None)
            continue
        code = code_in(text_of(completion))
        rewards.append(sum(run(f"{code}\n{case}\n", seconds, memory_mb) for case in cases) / len(cases))
    return rewards


def completes(
    completions: list,
    before: list,
    after: list,
    seconds: float = 3.0,
    memory_mb: int = 512,
    fence: bool = False,
    **_,
) -> list[float]:
    """1 if the row's `before`, a completion and the row's `after` run as one program without an error, else 0.

    fence: if a completion has a fence (```), only its content counts. The limits are those of `passes`.
    """
    rewards = []
    for completion, start, end in zip(completions, before, after, strict=True):
        text = text_of(completion)
        rewards.append(float(run(f"{start}{code_in(text) if fence else text}\n{end}\n", seconds, memory_mb)))
    return rewards


def code_in(text: str) -> str:
    """Content of the last fence of a completion, otherwise the whole completion."""
    found = FENCE.findall(text)
    return found[-1] if found else text


def run(code: str, seconds: float, memory_mb: int) -> bool:
    """True if Python code runs to its end without an error, within the limits."""

    def limit() -> None:
        size = memory_mb << 20
        resource.setrlimit(resource.RLIMIT_AS, (size, size))
        resource.setrlimit(resource.RLIMIT_CPU, (int(seconds) + 1, int(seconds) + 1))
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    # The exit code FINISHED shows that the code reached its end and did not just exit with 0.
    with tempfile.TemporaryDirectory() as folder:
        command = [*_isolated(), sys.executable, "-I", "-c", _RUNNER]
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={},
            preexec_fn=limit,
            start_new_session=True,
        )
        try:
            process.communicate(code.encode("utf-8", "replace"), timeout=seconds)
        except subprocess.TimeoutExpired:
            pass
        finally:
            _kill_group(process)
        return process.returncode == FINISHED


FINISHED = 42
_RUNNER = f"""
import os, sys
code = sys.stdin.buffer.read().decode()
leave = os._exit
exec(compile(code, "completion", "exec"), {{"__name__": "__main__"}})
leave({FINISHED})
"""


def _kill_group(process: subprocess.Popen) -> None:
    import os
    import signal

    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


@cache
def _isolated() -> tuple[str, ...]:
    """Command prefix that removes network access; empty if the system does not allow it."""
    if shutil.which("unshare") is None:
        return ()
    command = ("unshare", "--user", "--map-root-user", "--net")
    tried = subprocess.run([*command, "true"], capture_output=True)
    return command if tried.returncode == 0 else ()
