"""Files that appear whole, by one rename, or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SCRATCH = ".writing-"
"""What the names of unfinished files and folders begin with."""


def scratch_path(target: Path) -> Path:
    """Where a file or folder is written before it is renamed to `target`."""
    return target.with_name(SCRATCH + target.name)


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A path to write, which becomes `target` at the end, or is deleted after an error."""
    scratch = scratch_path(target)
    try:
        yield scratch
    except BaseException:  # of a full disk, whose space it would keep
        scratch.unlink(missing_ok=True)
        raise
    scratch.rename(target)


def write_atomically(path: Path, text: str) -> None:
    """Write a text file, and sync it to disk."""
    with replacing(path) as scratch, open(scratch, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
