"""A mutated case, run by the command line in this process, and judged."""

from __future__ import annotations

import contextlib
import io
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fuzz_mutations import Case, encoded
from fuzz_recipes import REWARD, SMALL

MAX_SECONDS = 60
MAX_MEMORY = 6 << 30
"""Address space beyond what the process has at the start of a case."""
LONGEST_LINE = 2000
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")


@dataclass
class Outcome:
    """How a case ended: `fine`, `refused` (2), `failed` (another of lmrl's errors), or a defect and what it is."""

    name: str
    defect: str | None = None


class TookTooLong(BaseException):
    pass


def run_case(case: Case, model: Path, scratch: Path) -> Outcome:
    """Run a case in this process, in a folder below scratch."""
    import lmrl.cli  # here, so that --help answers at once

    home = scratch / "home"
    shutil.rmtree(home, ignore_errors=True)
    here, temporary = home / "here", home / "tmp"
    for folder in (here, temporary):
        folder.mkdir(parents=True)
    (here / "model").symlink_to(model)
    (here / "recipe.yaml").write_bytes(encoded(case.recipe))
    (here / "rows.jsonl").write_bytes(case.rows)
    (here / "reward.py").write_text(REWARD)
    before = tree(home)
    command, *options = case.command.split()
    arguments = [command, "recipe.yaml", *case.overrides, *options]
    if case.command == "train":
        arguments += [*SMALL, "--output", "run"]
    code, trace, out, err, took = call(lmrl.cli.main, arguments, here, temporary)
    text = f"{out}\n{err}"
    made = sorted(name for name in tree(home) - before if not (case.command == "train" and name.startswith("here/run")))
    lines = [line for line in err.splitlines() if line.startswith("lmrl: ")]
    if trace:
        return Outcome("defect", trace)
    if took > MAX_SECONDS:
        return Outcome("defect", f"took {took:.0f} s")
    if code not in (0, 1, 2, 3):
        return Outcome("defect", f"exit code {code}: {err[-300:]}")
    if code in (1, 2) and not lines and "Usage:" not in err:
        return Outcome("defect", f"exit code {code} without a line: {err[-300:]!r}")
    if "Traceback" in err:
        return Outcome("defect", err[-2000:])
    if long := [line for line in lines if len(line) > LONGEST_LINE]:
        return Outcome("defect", f"a line of {len(long[0])} characters: {long[0][:300]}")
    if found := CONTROL.search(text):
        return Outcome(
            "defect", f"control character {found[0]!r} in {text[max(found.start() - 100, 0) : found.end()]!r}"
        )
    if made:
        return Outcome("defect", f"left behind: {made[:5]}")
    return Outcome({0: "fine", 2: "refused", 3: "failed", 1: "failed"}[code])


def call(main: Any, arguments: list[str], here: Path, temporary: Path) -> tuple[int, str | None, str, str, float]:
    """Call the command line: exit code, a traceback where there is one, both streams, and seconds."""
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True)
    err = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="backslashreplace", write_through=True)
    was = Path.cwd(), sys.argv, os.environ.get("HOME"), tempfile.tempdir, resource.getrlimit(resource.RLIMIT_AS)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    code, trace, began = 0, None, time.monotonic()

    def late(*_: Any) -> None:
        raise TookTooLong

    previous = signal.signal(signal.SIGALRM, late)
    try:
        os.chdir(here)
        sys.argv, os.environ["HOME"], tempfile.tempdir = ["lmrl", *arguments], str(here), str(temporary)
        resource.setrlimit(resource.RLIMIT_AS, (size + MAX_MEMORY, was[4][1]))
        signal.alarm(MAX_SECONDS + 1)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        places = traceback.extract_tb(error.__traceback__)
        where = [f"{Path(one.filename).name}:{one.lineno}" for one in places if "/lmrl/" in one.filename][-4:]
        trace = f"{type(error).__name__}: {str(error)[:300]} at {' > '.join(where)}"
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
        resource.setrlimit(resource.RLIMIT_AS, was[4])
        os.chdir(was[0])
        sys.argv, tempfile.tempdir = was[1], was[3]
        if was[2] is not None:
            os.environ["HOME"] = was[2]
    streams = [stream.buffer.getvalue().decode(errors="replace") for stream in (out, err)]
    return code, trace, *streams, time.monotonic() - began


def tree(folder: Path) -> set[str]:
    """Names of all files and folders, of the folder above as well: a path may lead there."""
    found = {
        str(Path(root, name).relative_to(folder)) for root, dirs, names in os.walk(folder) for name in [*dirs, *names]
    }
    return found | {f"../{path.name}" for path in folder.parent.iterdir()}
