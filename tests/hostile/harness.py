"""Cases of bad input: a command as a user types it, and the single line of the error."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

Prepare = Callable[["Place"], None]


class Place:
    """The folder that a case runs in, and where its ready-made models and runs come from."""

    def __init__(self, folder: Path, assets: dict[str, Path]):
        self.folder, self.assets = folder, assets

    def __truediv__(self, name: str) -> Path:
        return self.folder / name


def copied(*names: str) -> Prepare:
    """Ready-made folders: `model`, `run` (finished, with checkpoints of steps 2 and 4), `lora`, `judge` (a reward model)."""
    return lambda place: [shutil.copytree(place.assets[name], place / name) for name in names] and None


def written(name: str, content: str | bytes | list | dict) -> Prepare:
    """A file: text, bytes, or rows as JSON lines."""

    def write(place: Place) -> None:
        path = place / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, list):
            path.write_text("".join(json.dumps(row) + "\n" for row in content))
        elif isinstance(content, dict):
            path.write_text(json.dumps(content))
        else:
            path.write_bytes(content.encode() if isinstance(content, str) else content)

    return write


def zipped(name: str, text: str) -> Prepare:
    return lambda place: (place / name).write_bytes(gzip.compress(text.encode())) and None


def folder(name: str) -> Prepare:
    return lambda place: (place / name).mkdir(parents=True)


def removed(*patterns: str) -> Prepare:
    def remove(place: Place) -> None:
        found = [path for pattern in patterns for path in place.folder.glob(pattern)]
        assert found, patterns
        for path in found:
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    return remove


def cut(name: str, share: float = 0.5) -> Prepare:
    """A file that a copy or a full disk has cut off."""

    def shorten(place: Place) -> None:
        content = (place / name).read_bytes()
        (place / name).write_bytes(content[: int(len(content) * share)])

    return shorten


def edited(name: str, **values: object) -> Prepare:
    """A JSON file with some keys changed."""

    def edit(place: Place) -> None:
        (place / name).write_text(json.dumps(json.loads((place / name).read_text()) | values))

    return edit


def checksums(place: Place) -> dict[str, str]:
    """Of every file under the case's folder."""
    files = [path for path in place.folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    return {str(path.relative_to(place.folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def check_line(result: tuple[int, str, str], message: str, code: int = 2) -> None:
    """One clear line on stderr and the exit code; beside it only where the run was going to be, notes on its data, and the causes of
    failed episodes with the command that plays one again."""
    found, out, err = result
    assert found == code, (found, out, err)
    assert err.startswith("lmrl: ") and err.count("\n") == 1 and "Traceback" not in err, err
    assert re.search(message, err), err
    assert len(err) < 1000, err
    beside = r"run folder: |note: | +\d+ x |play one again: lmrl replay "
    assert all(re.match(beside, line) for line in out.splitlines()), out
