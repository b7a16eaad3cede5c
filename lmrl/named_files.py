"""The files of data and code that a recipe or a suite names, and what is in them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

BLOCK = 1 << 20


def file_hash(file: Path) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        while block := stream.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def file_in(text: str) -> tuple[Path, str] | None:
    """The file that an absolute name stands for, and what follows it: `:NAME` in FILE.py:NAME. None: it names no file."""
    if not text.startswith("/"):
        return None
    file, colon, attribute = text.rpartition(":")
    if colon and file.endswith(".py") and Path(file).is_file():
        return Path(file), colon + attribute
    return (Path(text), "") if Path(text).is_file() else None


def contents(data: Any) -> dict[str, str]:
    """Hashes of the files that plain data names, by name."""
    found = filter(None, map(file_in, _texts(data)))
    return {str(file): file_hash(file) for file in sorted({file for file, _ in found})}


def changed(before: dict[str, str]) -> list[str]:
    """The files whose content is no longer that of these hashes; those that are gone do not count."""
    return [name for name, old in before.items() if Path(name).is_file() and file_hash(Path(name)) != old]


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    inner: Iterable[Any] = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for one in inner:
        yield from _texts(one)
