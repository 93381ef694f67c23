"""Files -> rows that know their file and line.

    read_rows("data/")  ->  RowSet: 999 rows from 2 files, format 'alpaca'
    rows[500]           ->  {"instruction": ..., "output": ...}
    rows.origin(500)    ->  ("data/train.jsonl", 501)

Everything is read and checked before anything else happens: a bad row 200,000 is an error now, not in three hours.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal, overload

import numpy as np

from etude.data.compact import JsonRows
from etude.data.formats import FORMATS, Problem, Row, detect_format, expected_fields, row_problem
from etude.data.hub import is_hub_name, read_hub_rows
from etude.data.readers import COMPRESSED_SUFFIXES, READERS, Record, is_saved_dataset, read_records
from etude.errors import ConfigError, DataError, nearest

Source = str | Path | Sequence[str | Path] | Sequence[Row]
OnBadRow = Literal["stop", "skip"]

IN_MEMORY = "rows"  # the file name of rows that came from a list


class Origins:
    """The file and line of every row, in 16 bytes for each."""

    def __init__(self, files: Sequence[str]) -> None:
        self.files = list(files)
        self._file_of_row = array("L")
        self._line_of_row = array("Q")

    def append(self, file: int, line: int) -> None:
        """Add a row that came from line `line` of `files[file]`."""
        self._file_of_row.append(file)
        self._line_of_row.append(line)

    def place(self, index: int) -> tuple[int, int]:
        """The number of the file, and the line, of row `index`."""
        return self._file_of_row[index], self._line_of_row[index]

    def at(self, index: int) -> tuple[str, int]:
        """The file and the line (from 1) of row `index`."""
        file, line = self.place(index)
        return self.files[file], line

    def subset(self, indices: Iterable[int]) -> Origins:
        """The origins of the rows at `indices`, in that order."""
        chosen = Origins(self.files)
        for index in indices:
            chosen.append(*self.place(index))
        return chosen

    def columns(self) -> tuple[array[int], array[int]]:
        """The number of the file, and the line, of every row."""
        return self._file_of_row, self._line_of_row


class RowSet(Sequence[Row]):
    """Checked rows of one format, each with its origin.

    Attributes:
        format: a name of `FORMATS`.
        origins: where every row came from.
        rejected: one `DataError` for each row that was skipped (`on_bad_row="skip"`), in reading order.
    """

    def __init__(
        self, format: str, rows: list[Row] | JsonRows, origins: Origins, chosen: Sequence[int] | None = None
    ) -> None:
        self.format = format
        self.origins = origins
        self.rejected: list[DataError] = []
        self._rows = rows
        self._chosen = None if chosen is None else array("Q", chosen)  # None: all of `rows` in their order

    def __len__(self) -> int:
        return len(self._rows) if self._chosen is None else len(self._chosen)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> RowSet: ...
    def __getitem__(self, index: int | slice) -> Row | RowSet:
        if isinstance(index, slice):
            return self.subset(range(*index.indices(len(self))))
        return self._rows[index if self._chosen is None else self._chosen[index]]

    def __iter__(self) -> Iterator[Row]:
        return iter(self._rows) if self._chosen is None else (self._rows[index] for index in self._chosen)

    def as_json(self, indices: range) -> bytes:
        """A JSON list of the rows at `indices`, as they were kept where that is JSON already.

        Raises:
            TypeError, ValueError: a row has values that JSON has no word for.
        """
        if isinstance(self._rows, list):
            return json.dumps([self[index] for index in indices]).encode()
        numbers = indices if self._chosen is None else [self._chosen[index] for index in indices]
        return b"[" + b",".join(map(self._rows.as_json, numbers)) + b"]"

    def origin(self, index: int) -> tuple[str, int]:
        """The file and the line (from 1; the row number in Parquet files and lists) that row `index` came from."""
        return self.origins.at(index)

    def subset(self, indices: Sequence[int]) -> RowSet:
        """The rows at `indices`, in that order, with their origins. No row is copied."""
        chosen = indices if self._chosen is None else array("Q", (self._chosen[index] for index in indices))
        return RowSet(self.format, self._rows, self.origins.subset(indices), chosen)

    def describe(self) -> str:
        """One line for the start screen: `999 rows from train.jsonl, format 'alpaca' (instruction + output)`."""
        skipped = f", {len(self.rejected)} bad rows skipped" if self.rejected else ""
        return f"{len(self)} rows from {self.source}{skipped}"

    @property
    def source(self) -> str:
        """Where the rows come from and their format: `train.jsonl, format 'alpaca' (instruction + output)`."""
        names = self.origins.files
        files = names[0] if len(names) == 1 else f"{len(names)} files"
        return f"{files}, format '{self.format}' ({' + '.join(FORMATS[self.format].required)})"


def read_rows(source: Source, on_bad_row: OnBadRow = "stop", format: str | None = None) -> RowSet:
    """Read and check every row of a file, of a folder (its data files, sorted by name), or of a list of those.

    Args:
        source: `.jsonl`, `.ndjson`, `.json` (an array), `.csv` or `.parquet` files, folders that `datasets` saved
            (`save_to_disk`), names on the Hub (`hub:OWNER/NAME`, see `etude.data.hub`), or rows already in memory.
        on_bad_row: `"stop"` raises at the first bad row, `"skip"` collects bad rows in `rejected`. What makes a whole
            file unreadable always raises.
        format: one of `FORMATS`; without it, the fields of the first good row decide. All rows have the same format.

    Raises:
        DataError: names the file, the line, the field, what was expected and what was found.
        ConfigError: `on_bad_row` or `format` has no such value.
    """
    if on_bad_row not in ("stop", "skip"):
        raise ConfigError(f"expected 'stop' or 'skip', got {on_bad_row!r}", field="on_bad_row")
    if format is not None and format not in FORMATS:
        guess = nearest(format, tuple(FORMATS))
        hint = f"; did you mean '{guess}'?" if guess else ""
        raise ConfigError(f"expected one of {', '.join(FORMATS)}, got {format!r}{hint}", field="format")

    files: dict[str, Iterable[Record]]
    if not isinstance(source, str | Path) and any(isinstance(item, dict) for item in source):
        files = {IN_MEMORY: (Record(number, row) for number, row in enumerate(source, start=1))}
    else:
        files = {str(file): _records_of(file) for file in files_of(source)}  # type: ignore[arg-type]
    rows = RowSet(
        format or "", [] if isinstance(source, list) and IN_MEMORY in files else JsonRows(), Origins(list(files))
    )
    for index, record in ((index, record) for index, records in enumerate(files.values()) for record in records):
        rows.format, problem = checked(record, rows.format)
        if problem is None:
            rows._rows.append(record.value)
            rows.origins.append(index, record.line)
            continue
        error = DataError(problem.message, file=rows.origins.files[index], line=record.line, field=problem.field)
        if on_bad_row == "stop":
            raise error
        rows.rejected.append(error)
    if not rows:
        raise DataError(f"no row is left, all {len(rows.rejected)} were skipped; the first: {rows.rejected[0]}")
    return rows


def format_of(source: str | Path | Sequence[str | Path], *, streaming: bool = False) -> str | None:
    """The format of the first row that has one, without reading further.

    `streaming` fetches no more than that row of a data set on the Hub.

    Raises:
        DataError: the data is not there, or cannot be read up to such a row.
    """
    records = (record for file in files_of(source) for record in _records_of(file, streaming=streaming))
    formats = (detect_format(record.value) for record in records if isinstance(record.value, dict))
    return next((format for format in formats if format is not None), None)


def checked(record: Record, format: str) -> tuple[str, Problem | None]:
    """The format that rows have from here on, and what is wrong with a record, or None.

    The first row with known fields decides the format where there is none yet (`""`).
    """
    if record.problem is not None:
        return format, record.problem
    if format:
        return format, row_problem(record.value, format)
    if not isinstance(record.value, dict):
        return "", Problem(f"expected object, got {type(record.value).__name__}; rows need {expected_fields()}")
    found = detect_format(record.value)
    if found is None:
        names = ", ".join(map(str, record.value)) or "none"
        return "", Problem(f"expected the fields of one format ({expected_fields()}), got {names}")
    problem = row_problem(record.value, found)
    return ("" if problem else found), problem


def _records_of(file: Path | str, *, streaming: bool = False) -> Iterator[Record]:
    is_empty = True
    for record in _read(file, streaming):
        is_empty = False
        yield record
    if is_empty:
        raise DataError("expected at least one row, the file has none", file=file)


def _read(file: Path | str, streaming: bool) -> Iterator[Record]:
    if is_hub_name(file):
        return (Record(line, row) for line, row in read_hub_rows(str(file), streaming=streaming))
    return read_records(Path(file))


def files_of(source: str | Path | Sequence[str | Path]) -> list[Path | str]:
    """The files that a source stands for, in the order of reading; names on the Hub as they are.

    Raises:
        DataError: a folder without data files, or an empty list.
    """
    if not isinstance(source, str | Path):
        if not source:
            raise DataError("expected at least one file or row, got an empty list")
        return [file for item in source for file in files_of(item)]
    if is_hub_name(source):
        return [str(source)]
    path = Path(source).expanduser()
    if not path.is_dir() or is_saved_dataset(path):
        return [path]
    entries = sorted(entry for entry in path.iterdir() if not entry.name.startswith(".") and not entry.is_dir())
    # A compressed file in the folder is data that would be left out without a word: its reader refuses it.
    files: list[Path | str] = [e for e in entries if e.suffix.lower() in (*READERS, *COMPRESSED_SUFFIXES)]
    if not files:
        raise DataError(f"expected a folder with {', '.join(READERS)} files, it has none", file=path)
    return files


def split_by_hash(rows: RowSet, fraction: float, seed: int = 0) -> tuple[RowSet, RowSet]:
    """Split rows into (train, eval); about `fraction` of them are held out.

    A row's side depends on its content and the seed alone: it stays when rows are added, removed or reordered, and
    equal rows are never on both sides. In a small set either side can be empty.

    Raises:
        ConfigError: `fraction` is not between 0 and 1.
    """
    if not 0 <= fraction < 1:
        raise ConfigError(f"expected a share of at least 0 and below 1, got {fraction}", field="fraction")
    held_out = np.fromiter((_hash_share(row, seed) < fraction for row in rows), dtype=bool, count=len(rows))
    sides = (array("Q", np.flatnonzero(side).astype(np.uint64).tobytes()) for side in (~held_out, held_out))
    train, evaluation = map(rows.subset, sides)
    return train, evaluation


def repeat_by_weight(rows: RowSet, weights: Sequence[tuple[str | Path, float]]) -> RowSet:
    """The rows of each source as often as its weight says; of a broken weight, a share that a hash of the row chooses.

    Args:
        weights: (file or folder, weight) pairs. Weight 2 has every row twice, 0.25 a quarter of the rows; rows of
            other files stay as they are.
    """
    of_file = {str(file): weight for source, weight in weights if weight != 1 for file in files_of(source)}
    if not of_file:
        return rows
    chosen = array("Q")
    for index, row in enumerate(rows):
        times, share = divmod(of_file.get(rows.origin(index)[0], 1.0), 1)
        chosen.extend([index] * (int(times) + (_hash_share(row, seed=1) < share)))
    return rows.subset(chosen)


def _hash_share(row: Row, seed: int) -> float:
    """A number in [0, 1) that is uniform over rows and fixed for a row and a seed."""
    content = json.dumps([seed, row], sort_keys=True, default=str).encode()
    return int.from_bytes(hashlib.sha256(content).digest()[:6]) / 2**48
