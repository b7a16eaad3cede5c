"""The python tool: what code can do in it, and twenty escapes that are blocked."""

import os
import time

import pytest

from lmrl.tools import sandbox
from lmrl.tools.functions import load_tools
from lmrl.tools.sandbox import Sandbox, run_python, why_not_isolated

apart = pytest.mark.skipif(why_not_isolated() is not None, reason=f"no namespaces here: {why_not_isolated()}")
KINDS = [pytest.param("full", marks=apart), "limits"]
REFUSED = "NotFound|NotPermitted|Permission|Read-only|No such|Operation not permitted|unreachable|error|Error"


@pytest.mark.parametrize("isolation", KINDS)
def test_output_value_and_errors(isolation):
    def run(code):
        return run_python(code, Sandbox(isolation=isolation))

    assert run("print('a')\n1 + 1") == "a\n2" and run("'text'") == "text" and run("x = 1") == ""
    assert run("import math, json, re\nmath.factorial(20)") == "2432902008176640000"
    assert run("print('before')\n\n1 / 0") == "before\nZeroDivisionError: division by zero (line 3)"
    assert run("1 +").startswith("SyntaxError") and run("import sys; sys.exit(3)") == "error: exit code 3"
    assert run("open('a', 'w').write('x'); open('a').read()") == "x"
    assert run("import numpy").startswith("ModuleNotFoundError")


@pytest.mark.parametrize("isolation", KINDS)
def test_limits(isolation):
    limits = Sandbox(isolation=isolation, seconds=1, memory_mb=128, file_mb=1, characters=100)
    began = time.monotonic()
    assert "error: " in run_python("while True: pass", limits)
    assert run_python("import time; time.sleep(60)", limits) == "error: timed out after 1 s"
    assert time.monotonic() - began < 15
    assert run_python("x = 'a' * 10**9", limits).startswith("MemoryError")
    assert "File too large" in run_python("open('a', 'w').write('x' * 10**7)", limits)
    flood = run_python("while True: print('x' * 1000)", limits)
    assert flood == "x" * 100 + "\nerror: wrote more than 100 characters"
    assert "SECRET" not in run_python("import os; print(dict(os.environ))", Sandbox(isolation=isolation))


# Each tries to get out, and prints ESCAPED where it does.
LIBC = "import ctypes, os; libc = ctypes.CDLL(None, use_errno=True)\n"
ESCAPES = {
    "read /etc/passwd": "open('/etc/passwd').read(); print('ESCAPED')",
    "read the repository": f"open({__file__!r}).read(); print('ESCAPED')",
    "read by a symlink": "import os; os.symlink('/etc/passwd', 'a'); open('a').read(); print('ESCAPED')",
    "read by /proc/1/root": "open('/proc/1/root/etc/passwd').read(); print('ESCAPED')",
    "read by the old root": "import os; print('ESCAPED' if os.listdir('/old') else 'empty')",
    "write the system": "open('/usr/lmrl-escaped', 'w'); print('ESCAPED')",
    "write outside": "open('/lmrl-escaped', 'w').write('x'); print('ESCAPED')",
    "remount": LIBC + "r = libc.mount(None, b'/usr', None, 0x1020, None); print('ESCAPED' if r == 0 else 'Error')",
    "mount": LIBC + "r = libc.mount(b't', b'/work', b'tmpfs', 0, None); print('ESCAPED' if r == 0 else 'Error')",
    "a user namespace": LIBC + "print('ESCAPED' if libc.unshare(0x10000000) == 0 else 'Error')",
    "chroot": "import os; os.mkdir('a'); os.chroot('a'); print('ESCAPED')",
    "a device": "import os, stat; os.mknod('a', 0o666 | stat.S_IFBLK, os.makedev(8, 0)); print('ESCAPED')",
    "fork bomb": "import os\nfor _ in range(50): os.fork()\nprint('ESCAPED')",
    "thread bomb": "import threading, time\nfor _ in range(50): threading.Thread(target=time.sleep, args=(1,)).start()\nprint('ESCAPED')",
    "a program": "import subprocess; subprocess.run(['id']); print('ESCAPED')",
    "connect": "import socket; socket.create_connection(('127.0.0.1', PORT), 2); print('ESCAPED')",
    "look up a name": "import socket; socket.getaddrinfo('example.com', 80); print('ESCAPED')",
    "an abstract socket": "import socket; s = socket.socket(socket.AF_UNIX); s.connect('\\0lmrl-escape'); print('ESCAPED')",
    "kill others": "import os; os.kill(VICTIM, 0); print('ESCAPED')",
    "kill all": "import os; os.kill(-1, 9); print('ESCAPED')",
    "see others": "import os; print('ESCAPED' if [p for p in os.listdir('/proc') if p.isdigit() and int(p) > 20] else 'Error')",
    "raise limits": "import resource; resource.setrlimit(resource.RLIMIT_AS, (-1, -1)); print('ESCAPED')",
    "become another": "import os; os.setuid(1); print('ESCAPED')",
    "mapped memory": "import mmap; mmap.mmap(-1, 10**10); print('ESCAPED')",
    "many files": "for n in range(200): open(str(n), 'w').write('x' * 10**6)\nprint('ESCAPED')",
    "kernel settings": "open('/proc/sys/kernel/hostname', 'w').write('x'); print('ESCAPED')",
    "trace": LIBC + "print('ESCAPED' if libc.ptrace(16, VICTIM, 0, 0) == 0 else 'Error')",
}


@apart
@pytest.mark.parametrize("name", ESCAPES)
def test_escapes_are_stopped(name):
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as unix:
        unix.bind("\0lmrl-escape")
        unix.listen()
        code = ESCAPES[name].replace("PORT", str(server.getsockname()[1])).replace("VICTIM", str(os.getpid()))
        output = run_python(code, Sandbox(seconds=3, file_mb=8))
    assert "ESCAPED" not in output and output and not os.path.exists("/usr/lmrl-escaped")
    assert "did not start" not in output


def test_limits_alone_are_no_sandbox():
    """What docs/agents.md says is not stopped."""
    assert "root" in run_python("open('/etc/passwd').read()", Sandbox(isolation="limits"))


def test_without_namespaces_it_is_refused(monkeypatch):
    monkeypatch.setattr(sandbox, "why_not_isolated", lambda: "unshare: Operation not permitted")
    with pytest.raises(sandbox.PluginError, match="task.tools.0: the python tool cannot be isolated"):
        load_tools(["python"])
    (tool,) = load_tools([{"python": {"isolation": "limits"}}])
    assert tool.name == "python" and tool.call("1 + 1") == "2"
