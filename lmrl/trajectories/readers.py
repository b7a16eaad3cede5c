"""Readers of rows: by index, and in order.

Plain JSONL and tables stay on disk, so they may be larger than memory.
"""

from __future__ import annotations

import gzip
import io
import json
from array import array
from bisect import bisect_right
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from lmrl.errors import DataError

NOT_UTF8 = "not valid UTF-8 text: convert the file, for instance with `iconv -f WINDOWS-1252 -t UTF-8`"
Row = dict[str, Any]
SCAN_ROWS = 256
"""Rows of a table that a scan holds in memory at a time."""


class Malformed(ValueError):
    """A mistake in a row; the reader of the file adds its place."""


class Rows:
    """Rows of one or several files by index. DataError names file and line (or row) of a row that cannot be read."""

    unit = "row"

    def __len__(self) -> int:
        raise NotImplementedError

    def place(self, index: int) -> tuple[str, int]:
        """The row's file, and its number there, from 1."""
        raise NotImplementedError

    def text(self, index: int) -> str:
        """A row's text in the file, for reports."""
        return json.dumps(self[index], ensure_ascii=False, default=str)

    def where(self, index: int) -> str:
        file, number = self.place(index)
        return f"{file}, {self.unit} {number}"

    def __getitem__(self, index: int) -> Row:
        try:
            return self._read(index)
        except Malformed as error:
            raise DataError(f"{self.where(index)}: {error}") from error

    def __iter__(self) -> Iterator[Row]:
        return (self[index] for index in range(len(self)))

    def scan(self) -> Iterator[Row | Malformed]:
        """All rows in order; a Malformed in place of each that cannot be read."""
        for index in range(len(self)):
            try:
                yield self._read(index)
            except Malformed as error:
                yield error

    def _read(self, index: int) -> Row:
        raise NotImplementedError


class Renamed(Rows):
    """Rows whose fields have other names in their file. columns: the file's name for each field."""

    def __init__(self, rows: Rows, columns: dict[str, str]):
        self.rows, self.columns, self.unit = rows, columns, rows.unit

    def __len__(self) -> int:
        return len(self.rows)

    def place(self, index: int) -> tuple[str, int]:
        return self.rows.place(index)

    def text(self, index: int) -> str:
        return self.rows.text(index)

    def scan(self) -> Iterator[Row | Malformed]:
        for row in self.rows.scan():
            try:
                yield row if isinstance(row, Malformed) else self._renamed(row)
            except Malformed as error:
                yield error

    def _read(self, index: int) -> Row:
        return self._renamed(self.rows._read(index))

    def _renamed(self, row: Row) -> Row:
        missing = [column for column in self.columns.values() if column not in row]
        if missing:
            raise Malformed(f"has no column '{missing[0]}', which `columns` names (columns: {', '.join(row)})")
        taken = set(self.columns.values())
        rest = {name: value for name, value in row.items() if name not in taken and name not in self.columns}
        return {field: row[column] for field, column in self.columns.items()} | rest


class JsonLines(Rows):
    """One JSON object per line. Keeps the offset of each line; a gzipped file is unpacked into memory."""

    unit = "line"

    def __init__(self, path: Path):
        self.path = path
        try:
            self._file: BinaryIO = io.BytesIO(gzip.open(path).read()) if path.suffix == ".gz" else open(path, "rb")  # noqa: SIM115
        except (OSError, EOFError) as error:
            raise DataError(f"{path}: cannot be read: {error}") from error
        starts, numbers, position = array("q"), array("q"), 0
        for number, line in enumerate(self._file, start=1):
            if line.strip():
                starts.append(position)
                numbers.append(number)
            position += len(line)
        self._starts, self._numbers = np.array(starts, dtype=np.int64), np.array(numbers, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._starts)

    def place(self, index: int) -> tuple[str, int]:
        return str(self.path), int(self._numbers[index])

    def text(self, index: int) -> str:
        return self._line(index).decode(errors="replace").strip()

    def _line(self, index: int) -> bytes:
        self._file.seek(int(self._starts[index]))
        return self._file.readline()

    def _read(self, index: int) -> Row:
        row = parsed(self._line(index), "one object per line")
        if not isinstance(row, dict):
            raise Malformed(f"holds a {type(row).__name__}; expected one object per line")
        return row


def parsed(text: bytes, expected: str) -> Any:
    """The value of a JSON text. Raises Malformed."""
    try:
        line = text.decode("utf-8-sig")  # some editors begin a file with a byte-order mark
        value = json.loads(line)
        if "\\u" in line:
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = ascii(error.object[error.start])[1:-1]
        raise Malformed(
            f"holds the lone surrogate {half}, which is not valid text: write the whole surrogate pair"
        ) from error
    except UnicodeDecodeError as error:
        raise Malformed(f"{NOT_UTF8} ({error.reason})") from error
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else getattr(error, "msg", error)
        raise Malformed(f"not valid JSON: {reason}; expected {expected}") from error
    return value


class Table(Rows):
    """Rows of a `datasets.Dataset`, which maps its file into memory. files: (name, rows) of the files it was made
    from."""

    def __init__(self, dataset: Any, files: list[tuple[str, int]]):
        self._dataset = dataset
        self._names = [name for name, _ in files]
        self._ends = list(accumulate(rows for _, rows in files))

    def __len__(self) -> int:
        return len(self._dataset)

    def place(self, index: int) -> tuple[str, int]:
        file = bisect_right(self._ends, index)
        return self._names[file], index + 1 - (self._ends[file - 1] if file else 0)

    def scan(self) -> Iterator[Row]:
        for columns in self._dataset.iter(batch_size=SCAN_ROWS):
            for values in zip(*columns.values(), strict=True):
                yield dict(zip(columns, values, strict=True))

    def _read(self, index: int) -> Row:
        row: Row = self._dataset[int(index)]
        return row


class Given(Rows):
    """Rows that are in memory: a list of mappings."""

    def __init__(self, name: str, rows: list[Row]):
        self.name, self.rows = name, rows

    def __len__(self) -> int:
        return len(self.rows)

    def place(self, index: int) -> tuple[str, int]:
        return self.name, index + 1

    def _read(self, index: int) -> Row:
        return dict(self.rows[index])
