"""The command line: one file per command, imported when it is called."""

from __future__ import annotations

import atexit
import errno
import faulthandler
import os
import signal
import sys
import traceback
from io import TextIOWrapper
from typing import Annotated

import typer

from lmrl.cli.commands import PLAIN, Commands
from lmrl.cli.usage import UsageError, report_usage
from lmrl.errors import LmrlError
from lmrl.visible import visible

app = typer.Typer(
    name="lmrl",
    help="Fine-tune language models with reinforcement learning, online and from logged data.",
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    **PLAIN,
)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib import metadata

        print(f"lmrl {metadata.version('lmrl')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit", callback=_version, is_eager=True)
    ] = False,
) -> None:
    pass


def main() -> None:
    """Entry point: a mistake of the user's is one line and exit code 2; `--debug` shows the traceback."""
    if "_LMRL_COMPLETE" in os.environ:  # a shell asks what may come next
        from typer.completion import completion_init  # type: ignore[attr-defined]  # which typer's own modules import

        completion_init()
    debug = "--debug" in sys.argv
    faulthandler.enable(2)  # a crash in native code says in which call
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # a log file should show a run as it progresses
        if sys.stdout.errors == "strict":  # a "±", or a model's text, must not end a run where it has no encoding
            sys.stdout.reconfigure(errors="backslashreplace")
    try:
        arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
        sys.exit(app(args=arguments, prog_name="lmrl", standalone_mode=False))
    except UsageError as error:
        sys.exit(report_usage(error))
    except typer.Abort:
        sys.exit(128 + signal.SIGINT)
    except LmrlError as error:
        if debug:
            raise
        text = f"lmrl: {one_line(str(error))}"
        _abandon()
        if not _leave_error(text, error.exit_code, own=True):
            print(text, file=sys.stderr)
        sys.exit(error.exit_code)
    except BaseException as error:
        number = getattr(error, "number", None)  # training.interrupt.Interrupted, without importing torch to name it
        if type(error).__name__ == "Interrupted" and number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            sys.exit(128 + number)
        _abandon()
        if not debug and (full := _disk_full(error)):
            text = f"lmrl: {full}, then repeat the command, for a run with --resume: its checkpoints are whole"
            if not _leave_error(text, 1, own=True):
                print(text, file=sys.stderr)
            sys.exit(1)
        if not debug and isinstance(error, OSError) and error.filename and error.errno in UNUSABLE:
            text = f"lmrl: {one_line(f'{error.filename}: cannot be used: {error.strerror}')}"
            if not _leave_error(text, 2, own=True):
                print(text, file=sys.stderr)
            sys.exit(2)
        if isinstance(error, Exception) and _leave_error(traceback.format_exc(), 1, own=False):
            sys.exit(1)
        raise


LONGEST_LINE = 1500
UNUSABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG)
"""Errors of a file or folder that was named wrongly, or that the user may not use."""

DISK_LIMITS = {
    errno.ENOSPC: ("no space is left on the disk", "free some space"),
    errno.EDQUOT: ("no space is left on the disk", "free some space"),
    errno.EFBIG: ("a file would be larger than its limit", "raise that (ulimit -f)"),
}
"""By the error's number: what is exhausted, and the fix."""


def one_line(text: str) -> str:
    """A message in one line that is safe to show; of a long one, which quotes the user's own data, the middle is left out."""
    from lmrl.secrets import redact  # only a failure needs it

    text = visible(redact(" ".join(text.split())))
    if len(text) <= LONGEST_LINE:
        return text
    half = LONGEST_LINE // 2
    return f"{text[:half]} [... {len(text) - 2 * half} characters ...] {text[-half:]}"


def _leave_error(text: str, code: int, own: bool) -> bool:
    from lmrl.launch import leave_error  # only a failure needs it

    return leave_error(text, code, own)


def _disk_full(error: BaseException | None) -> str | None:
    """The limit of the disk that caused the error, and the fix; None if none did."""
    while error is not None:
        for number, (fact, fix) in DISK_LIMITS.items():
            if os.strerror(number) in str(error):  # not by class: safetensors and Arrow have errors of their own
                name = getattr(error, "filename", None)
                return f"{fact}{f' for {name}' if name else ''}: {fix}"
        error = error.__cause__ or error.__context__
    return None


def _abandon() -> None:
    """Skip the shutdown of the process group: after an error it could wait for ranks that never answer."""
    if "lmrl.distributed" in sys.modules:
        atexit.unregister(sys.modules["lmrl.distributed"].shutdown)
