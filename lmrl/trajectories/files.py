"""Files of rows, opened: JSONL (plain or gzipped), one JSON array, Parquet (a file or a folder), CSV, folders that
`datasets` has saved, the hub."""

from __future__ import annotations

import codecs
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmrl.errors import DataError
from lmrl.local_names import refuse_missing
from lmrl.plugins.objects import find, is_object, is_rows
from lmrl.trajectories.readers import NOT_UTF8, Given, JsonLines, Malformed, Renamed, Row, Rows, Table, parsed

TEXT_FIELDS = ("prompt", "completion", "chosen", "rejected", "text")
"""Fields that are text even where a CSV file writes them as numbers."""


@dataclass(frozen=True)
class Selection:
    """How rows are read: for a dataset on the hub its split, configuration (None: the only or default one) and revision
    (None: main), for a saved one its split; and names of fields with the columns that hold them."""

    split: str = "train"
    config: str | None = None
    revision: str | None = None
    columns: tuple[tuple[str, str], ...] = ()

    @classmethod
    def of(cls, section: Any) -> Selection:
        """The dataset named by a recipe's `source` or `task.prompts`."""
        given = {name: getattr(section, name, None) for name in ("split", "config", "revision")}
        columns = tuple(sorted((getattr(section, "columns", None) or {}).items()))
        return cls(columns=columns, **{name: value for name, value in given.items() if value is not None})

    def __str__(self) -> str:
        named = {"config": self.config, "split": self.split, "revision": self.revision}
        return ", ".join(f"{name} '{value}'" for name, value in named.items() if value is not None)


def open_rows(path: str, part: Selection = Selection()) -> Rows:
    """The rows of a file, of a folder of Parquet shards, of an object (`python:NAME`), or (the `part` of it) of a
    dataset on the hub or saved by `save_to_disk`."""
    file = Path(path)
    rows: Rows
    if file.exists() and (given := next((name for name in ("config", "revision") if getattr(part, name)), None)):
        raise DataError(
            f"{path}: `{given}` selects from a dataset on the hub, but this is a file or folder: leave it out"
        )
    if is_object(path):
        rows = _open_object(path)
    elif file.is_dir():
        rows = _open_folder(file, part)
    elif not file.is_file():
        refuse_missing(path, "data", "dataset")
        rows = _open_hub(path, part)
    elif file.suffix == ".json" and _is_array(file):
        rows = _open_array(file)
    elif file.name.endswith((".jsonl", ".jsonl.gz", ".json")):
        rows = JsonLines(file)
    elif file.suffix == ".parquet":
        rows = _open_parquet([file])
    elif file.suffix == ".csv":
        rows = _open_csv(file, part)
    else:
        raise DataError(f"{path}: unknown file type; expected .jsonl, .jsonl.gz, .json, .parquet or .csv")
    if not len(rows):
        raise DataError(f"{path}: holds no rows")
    return Renamed(rows, dict(part.columns)) if part.columns else rows


def read_rows(path: str, part: Selection = Selection(), limit: int | None = None) -> list[Row]:
    """All rows (at most `limit`) at once. A malformed line names file and line; `part` applies to hub datasets."""
    rows = open_rows(path, part)
    return [rows[index] for index in range(min(len(rows), limit if limit is not None else len(rows)))]


def quiet_datasets() -> Any:
    """The `datasets` library (slow to import) without its progress bars."""
    import datasets

    datasets.disable_progress_bars()
    return datasets


def _is_array(file: Path) -> bool:
    """True if a JSON file holds one array instead of an object per line."""
    try:
        with open(file, "rb") as opened:
            return opened.read(256).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error}") from error


def _open_array(file: Path) -> Given:
    """All rows of a JSON array."""
    try:
        rows = parsed(file.read_bytes(), "an array of objects")
    except Malformed as error:
        raise DataError(f"{file}: {error}") from error
    if (number := next((place for place, row in enumerate(rows, 1) if not isinstance(row, dict)), None)) is not None:
        raise DataError(f"{file}, row {number}: holds a {type(rows[number - 1]).__name__}; expected an object")
    return Given(str(file), rows)


def _open_folder(folder: Path, part: Selection) -> Table:
    if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
        return _open_saved(folder, part)
    shards = sorted(folder.glob("*.parquet"))
    if not shards:
        raise DataError(
            f"{folder}: the folder holds neither Parquet shards (*.parquet) nor a dataset of `save_to_disk`; name a file in it"
        )
    return _open_parquet(shards)


def _open_parquet(shards: list[Path]) -> Table:
    import pyarrow.parquet

    files = []
    for shard in shards:
        try:
            files.append((str(shard), pyarrow.parquet.read_metadata(shard).num_rows))
        except (OSError, pyarrow.ArrowInvalid) as error:
            raise DataError(f"{shard}: cannot be read: {error}") from error
    try:
        return Table(quiet_datasets().Dataset.from_parquet([str(shard) for shard in shards]), files)
    except Exception as error:  # the library wraps Arrow's errors: shards with different columns, damaged pages
        cause = error.__cause__ or error
        raise DataError(f"{shards[0]}: cannot be read: {str(cause).strip().splitlines()[0]}") from error


def _open_csv(file: Path, part: Selection) -> Table:
    """A CSV file. Columns that hold only numbers become numbers, or booleans; all others, and those that are trained
    on, are text as it is written."""
    from pyarrow import csv, string, types

    def read(text: list[str]) -> Any:
        columns = csv.ConvertOptions(column_types=dict.fromkeys(text, string()))
        return csv.read_csv(file, parse_options=csv.ParseOptions(newlines_in_values=True), convert_options=columns)

    names = dict(part.columns)
    trained = {names.get(field, field) for field in TEXT_FIELDS}
    fine, values = (types.is_string, types.is_null), (types.is_integer, types.is_floating, types.is_boolean)
    try:
        table = read([])
        if text := [
            one.name
            for one in table.schema
            if not any(kind(one.type) for kind in (fine if one.name in trained else (*fine, *values)))
        ]:  # numbers, dates and times; and bytes, which are refused
            table = read(text)
    except (OSError, ValueError) as error:  # ArrowInvalid is a ValueError, as is a column's name in another encoding
        if isinstance(error, ValueError) and (line := _first_line_not_in_utf8(file)) is not None:
            raise DataError(f"{file}, line {line}: {NOT_UTF8}") from error
        raise DataError(f"{file}: cannot be read: {error}") from error
    return Table(quiet_datasets().Dataset(table), [(str(file), len(table))])


def _first_line_not_in_utf8(file: Path) -> int | None:
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                line.decode()
            except UnicodeDecodeError:
                return number
    return None


def _open_object(name: str) -> Rows:
    rows = find(name, "data")
    if isinstance(rows, list):
        return Given(name, rows)
    if hasattr(rows, "iterrows"):
        return Given(name, _records(rows))
    if not is_rows(rows):
        raise DataError(
            f"{name}: a {type(rows).__name__} is not data: pass a list of mappings, a datasets.Dataset or a pandas data frame"
        )
    return Table(rows, [(name, len(rows))])


def _records(frame: Any) -> list[Row]:
    """A pandas frame's rows, with None for missing values, which pandas keeps as NaN, NaT or NA."""
    columns = {name: frame[name].astype(object).where(frame[name].notna(), None) for name in frame.columns}
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _open_saved(folder: Path, part: Selection) -> Table:
    """A dataset that `save_to_disk` has written; of several splits, `part.split`."""
    try:
        saved = quiet_datasets().load_from_disk(str(folder))
    except Exception as error:  # the library wraps Arrow's errors
        raise DataError(f"{folder}: cannot be read: {str(error).strip().splitlines()[0]}") from error
    if isinstance(saved, dict):
        if part.split not in saved:
            raise DataError(f"{folder}: has no split '{part.split}' (splits: {', '.join(saved)}); set `split`")
        saved = saved[part.split]
    return Table(saved, [(str(folder), len(saved))])


def _open_hub(name: str, part: Selection) -> Table:
    try:
        dataset = quiet_datasets().load_dataset(name, part.config, split=part.split, revision=part.revision)
    except Exception as error:  # the library raises many kinds, from network errors to unknown splits
        reason = str(error).strip().split("\n")[0]
        raise DataError(
            f"dataset '{name}' ({part}) is not a file here, and cannot be loaded from the hub: {reason}"
        ) from error
    return Table(dataset, [(name, len(dataset))])
