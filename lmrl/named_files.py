"""The files of data and code that a recipe or a suite names, or objects in their place, and what is in them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from lmrl.plugins.objects import content_of, is_object


def file_hash(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def file_in(text: str) -> tuple[Path, str] | None:
    """The file that an absolute name stands for, and what follows it: `:NAME` in FILE.py:NAME. None: it names no file."""
    if not text.startswith("/"):
        return None
    file, colon, attribute = text.rpartition(":")
    if colon and file.endswith(".py") and Path(file).is_file():
        return Path(file), colon + attribute
    return (Path(text), "") if Path(text).is_file() else None


def contents(data: Any) -> dict[str, str]:
    """Hashes of the files and objects that plain data names, by name."""
    files = {str(named[0]) for text in _texts(data) if (named := file_in(text))}
    names = [*sorted(files), *dict.fromkeys(filter(is_object, _texts(data)))]
    return {name: found for name in names if (found := _content(name))}


def changed(before: dict[str, str]) -> list[str]:
    """The files and objects whose content is no longer that of these hashes; those that are gone do not count."""
    return [name for name, old in before.items() if _content(name) not in (None, old)]


def _content(name: str) -> str | None:
    if is_object(name):
        return content_of(name)
    return file_hash(Path(name)) if Path(name).is_file() else None


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    inner: Iterable[Any] = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for one in inner:
        yield from _texts(one)
