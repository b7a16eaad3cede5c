"""The `python` tool: runs a model's code in a separate process, within limits, and isolated from the system if
possible.

With `isolation: full` (the default) the code sees its own file system (the standard library, read-only, and an empty
folder in memory), no network and no other processes, through Linux namespaces and util-linux's `unshare`. A system
without namespaces is an error. `isolation: limits` only limits time, memory, files and processes. That is not a
sandbox: the code can then read and write what this user may, and use the network.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from lmrl.errors import PluginError
from lmrl.recipe.base import Section
from lmrl.tools.functions import ToolFailed

NOBODY = 65534
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib64", "/lib32")
STARTED = "lmrl-started\n"
"""Written to stderr just before the code runs."""
PROGRAMS = ("unshare", "mount", "umount", "pivot_root", "setpriv", "sh", "mkdir")


class Sandbox(Section):
    """Limits of the `python` tool."""

    isolation: Literal["full", "limits"] = "full"
    """full: no network, no files and no processes but its own. limits: only the limits below."""
    seconds: float = Field(5, gt=0)
    """Seconds of CPU time; wall-clock time gets two more."""
    memory_mb: int = Field(512, ge=32)
    """Address space, in MB."""
    file_mb: int = Field(16, ge=1)
    """Size of each file, and with `full` of all files together."""
    processes: int = Field(1, ge=1)
    """Maximum processes, including the code's own; threads count. Not enforced for root with `limits`."""
    characters: int = Field(4000, ge=1)
    """Maximum output; code that writes more is killed."""


BOOT = r"""
import os, sys, resource
os.write(2, b"lmrl-started\n")
os.dup2(1, 2)
seconds, memory, size, processes = map(int, sys.argv[1:5])
source = sys.stdin.read()
for name, limit in (
    (resource.RLIMIT_CPU, seconds), (resource.RLIMIT_AS, memory), (resource.RLIMIT_FSIZE, size), (resource.RLIMIT_CORE, 0),
    (resource.RLIMIT_NOFILE, 64), (resource.RLIMIT_NPROC, processes), (resource.RLIMIT_MSGQUEUE, 0), (resource.RLIMIT_MEMLOCK, 65536),
):
    resource.setrlimit(name, (limit, limit))
import ast
sys.argv = ["code"]
space = {"__name__": "__main__"}
def run(source):
    tree = ast.parse(source, "code")
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "code", "exec"), space)
    if last is not None:
        value = eval(compile(ast.Expression(last.value), "code", "eval"), space)
        if value is not None:
            print(value if isinstance(value, str) else repr(value))
try:
    run(source)
except SystemExit:
    raise
except BaseException as error:
    sys.stdout.flush()
    frame, line = error.__traceback__, None
    while frame is not None:
        if frame.tb_frame.f_code.co_filename == "code":
            line = frame.tb_lineno
        frame = frame.tb_next
    print(f"{type(error).__name__}: {error}" + (f" (line {line})" if line else ""))
    sys.stdout.flush()
    sys.exit(1)
"""
MOUNTS = r"""
set -e
root=$1; size=$2; shift 2
mount --make-rprivate /
mount -t tmpfs -o "size=${size}m,mode=755,nr_inodes=4096" tmpfs "$root"
while [ "$1" != -- ]; do
    if [ -L "$1" ]; then
        ln -s "$(readlink "$1")" "$root$1"
    else
        mkdir -p "$root$1"
        mount --bind "$1" "$root$1"
        mount -o remount,bind,ro,nosuid,nodev "$root$1"
    fi
    shift
done
shift
mkdir -p "$root/proc" "$root/dev" "$root/work" "$root/tmp" "$root/old" "$root/etc"
mount -t proc -o nosuid,nodev,noexec proc "$root/proc"
for device in null zero urandom; do
    : > "$root/dev/$device"
    mount --bind "/dev/$device" "$root/dev/$device"
done
[ -e /etc/ld.so.cache ] && { : > "$root/etc/ld.so.cache"; mount --bind /etc/ld.so.cache "$root/etc/ld.so.cache"; }
mount -t tmpfs -o "size=${size}m,mode=777,nosuid,nodev,nr_inodes=4096" tmpfs "$root/work"
cd "$root"
pivot_root . old
cd /work
umount -l /old
mount -o remount,ro,nosuid,nodev,size=64k /
exec "$@"
"""
DROP = r"""
echo 0 > /proc/sys/user/max_user_namespaces
exec setpriv --bounding-set=-all --inh-caps=-all --ambient-caps=-all --no-new-privs "$@"
"""


def python_tool(settings: Any, key: str = "task.tools") -> Callable[[str], str]:
    """The `python` tool with these settings. Raises PluginError if the system cannot enforce them."""
    try:
        sandbox = Sandbox.model_validate(settings)
    except ValidationError as error:
        first = error.errors()[0]
        raise PluginError(f"{key}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    if sandbox.isolation == "full" and (reason := why_not_isolated()):
        raise PluginError(
            f"{key}: the python tool cannot be isolated from files and the network, because this system has no namespaces for it ({reason}); "
            "set isolation: limits if limits are enough"
        )

    def python(code: str) -> str:
        """Run Python code and return what it prints."""
        text, failed = _run(code, sandbox)
        if failed:
            raise ToolFailed(text)
        return text

    return python


@cache
def why_not_isolated() -> str | None:
    """Why code cannot be isolated on this system; None if it can."""
    missing = [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]
    if missing:
        return f"{missing[0]} is missing"
    output = run_python("print('apart')", Sandbox(seconds=20))
    return None if output.strip() == "apart" else " ".join(output.split())[:200]


def run_python(code: str, sandbox: Sandbox = Sandbox()) -> str:
    """Run code; return what it prints, with the value of its last expression, and then the error, if there was one."""
    return _run(code, sandbox)[0]


def _run(code: str, sandbox: Sandbox) -> tuple[str, bool]:
    """See `run_python`, and True if the code did not run to its end; its own exceptions are output."""
    with tempfile.TemporaryDirectory(prefix="lmrl-python-") as folder, tempfile.TemporaryFile() as said:
        limits = [
            max(int(sandbox.seconds + 0.999), 1),
            sandbox.memory_mb * 2**20,
            sandbox.file_mb * 2**20,
            sandbox.processes,
        ]
        python = [
            str(Path(getattr(sys, "_base_executable", sys.executable)).resolve()),
            "-I",
            "-S",
            "-B",
            "-c",
            BOOT,
            *map(str, limits),
        ]
        command = _isolated(python, folder, sandbox.file_mb) if sandbox.isolation == "full" else python
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=said,  # of the launcher; the code's own stderr goes to its output
            cwd=folder,
            env={"PATH": PATH, "LANG": "C.UTF-8", "PYTHONIOENCODING": "utf-8:replace", "HOME": "/"},
            start_new_session=True,
        )
        killed: list[str] = []

        def kill(reason: str) -> None:
            killed.append(reason)
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)

        timer = threading.Timer(sandbox.seconds + 2, kill, [f"timed out after {sandbox.seconds:g} s"])
        timer.start()
        writer = threading.Thread(target=_write_input, args=(process, code), daemon=True)
        writer.start()
        try:
            output = _read(process, sandbox.characters, kill)
            status = process.wait()
        finally:
            timer.cancel()
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        said.seek(0)
        before, started, after = said.read(2000).decode(errors="replace").partition(STARTED)
    error = killed[0] if killed else _failure(sandbox, status, before, bool(started), bool(after))
    lines = [output.rstrip("\n")] if output else []
    lines += [f"error: {error}"] if error else []
    return "\n".join(lines), error is not None


def _failure(sandbox: Sandbox, status: int, before: str, started: bool, more: bool) -> str | None:
    """The reason why code that was not killed here did not run to its end; None if it did.

    status: the exit code. before, more: what the launcher said before the code started, and whether it said more after.
    """
    if not started:
        return f"it did not start: {' '.join(before.split())}"
    if status < 0 or status > 128 or more:  # unshare's exit code if it cannot end by the signal itself
        return f"ended by a signal or its limits ({sandbox.seconds:g} s of computing, {sandbox.memory_mb} MB)"
    return f"exit code {status}" if status not in (0, 1) else None


def _isolated(python: list[str], root: str, file_mb: int) -> list[str]:
    """The command in new namespaces: no network, no files or processes but its own, no capabilities, as nobody."""
    prefix = str(Path(sys.base_prefix).resolve())
    seen = [path for path in SYSTEM if os.path.lexists(path)]
    if not any(prefix == path or prefix.startswith(f"{path}/") for path in seen):
        seen.append(prefix)
    last = ["sh", "-c", DROP, "sh", *python]
    root_user = os.geteuid() == 0
    if root_user:
        nobody = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
        last = [*nobody, "unshare", "--user", "--map-root-user", *last]
    own = [] if root_user else ["--user", "--map-root-user"]
    spaces = ["--mount", "--net", "--pid", "--ipc", "--uts", "--fork", "--kill-child"]
    return ["unshare", *own, *spaces, "sh", "-c", MOUNTS, "sh", root, str(file_mb), *seen, "--", *last]


def _write_input(process: subprocess.Popen[bytes], code: str) -> None:
    assert process.stdin is not None
    with suppress(OSError):
        process.stdin.write(code.encode(errors="replace"))
    with suppress(OSError):
        process.stdin.close()


def _read(process: subprocess.Popen[bytes], characters: int, kill: Callable[[str], None]) -> str:
    assert process.stdout is not None
    most, kept = characters * 4, bytearray()  # at most 4 bytes per character
    while part := os.read(process.stdout.fileno(), 65536):
        kept += part
        if len(kept) > most or len(kept.decode(errors="ignore")) > characters:
            kill(f"wrote more than {characters} characters")
            break
    process.stdout.close()
    return kept.decode(errors="replace")[:characters]
