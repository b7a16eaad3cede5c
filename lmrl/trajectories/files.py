"""Reading rows: JSONL (plain or gzipped), Parquet, CSV, or a dataset on the hub."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

from lmrl.errors import DataError


def read_rows(path: str, split: str = "train", limit: int | None = None) -> list[dict[str, Any]]:
    """All rows as dicts. A malformed line names file and line; `split` applies to hub datasets."""
    file = Path(path)
    if not file.is_file():
        return _read_dataset(path, split, limit)
    if file.name.endswith((".jsonl", ".jsonl.gz", ".json")):
        rows = _read_jsonl(file, limit)
    elif file.suffix in (".parquet", ".csv"):
        rows = _read_table(file, limit)
    else:
        raise DataError(f"{path}: unknown kind of file; expected .jsonl, .jsonl.gz, .parquet or .csv")
    if not rows:
        raise DataError(f"{path}: holds no rows")
    return rows


def _read_jsonl(file: Path, limit: int | None) -> list[dict[str, Any]]:
    rows = []
    opener = gzip.open if file.suffix == ".gz" else open
    try:
        with opener(file, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if limit is not None and len(rows) >= limit:
                    break
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise DataError(f"{file}, line {number}: not valid JSON: {error.msg}") from error
                if not isinstance(row, dict):
                    raise DataError(
                        f"{file}, line {number}: holds a {type(row).__name__}, expected an object with keys"
                    )
                rows.append(row)
    except (UnicodeDecodeError, gzip.BadGzipFile, EOFError) as error:
        raise DataError(f"{file}: cannot be read as text: {error}") from error
    return rows


def _read_table(file: Path, limit: int | None) -> list[dict[str, Any]]:
    import pyarrow.csv
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(file) if file.suffix == ".parquet" else pyarrow.csv.read_csv(file)
    except (OSError, pyarrow.ArrowInvalid) as error:
        raise DataError(f"{file}: cannot be read: {error}") from error
    return table.slice(0, limit).to_pylist()


def _read_dataset(name: str, split: str, limit: int | None) -> list[dict[str, Any]]:
    import datasets

    try:
        dataset = datasets.load_dataset(name, split=split)
    except Exception as error:  # the library raises many kinds, from network errors to unknown splits
        reason = str(error).strip().split("\n")[0]
        raise DataError(f"dataset '{name}' (split '{split}') cannot be loaded from the hub: {reason}") from error
    return list(dataset.select(range(min(limit or len(dataset), len(dataset)))))


def field_of(row: dict[str, Any], name: str, kinds: tuple[type, ...], path: str, number: int) -> Any:
    """A row's field, checked: DataError names file, row, field and what was expected."""
    expected = " or ".join({str: "text", list: "a list of messages"}.get(kind, kind.__name__) for kind in kinds)
    if name not in row:
        raise DataError(f"{path}, row {number}: has no field '{name}' (fields: {', '.join(row)}); expected {expected}")
    if not isinstance(row[name], kinds):
        raise DataError(f"{path}, row {number}: field '{name}' is {row[name]!r:.60}; expected {expected}")
    return row[name]
