"""Files -> records that know their line. One reader per kind: JSON lines, a JSON array, CSV, Parquet, and the folder
that `datasets` writes with `save_to_disk`.

A reader yields a `Record` for every row, good or bad, and raises `DataError` for what makes the whole file unreadable.
Nothing is trusted: not the size, not the encoding, not that the file is a file.
"""

from __future__ import annotations

import csv
import json
import math
import os
import re
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from etude.data.formats import Problem
from etude.errors import DataError, nearest, require

MAX_LINE_BYTES = 64 * 2**20
READ_BYTES = 2**20

COMPRESSED_SUFFIXES = (".gz", ".bz2", ".xz", ".zst", ".zip", ".7z", ".tar", ".lz4")
COMPRESSED_HEADS = {b"\x1f\x8b": "gzip", b"PK\x03\x04": "zip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}  # fmt: skip
UTF8_BOM = b"\xef\xbb\xbf"
UTF16_HEADS = (b"\xff\xfe", b"\xfe\xff")
WHITE_SPACE = re.compile(r"[ \t\r\n]*")


class Record(NamedTuple):
    """One row of a file: the line it starts on (from 1), its value, and what is wrong with it as JSON or CSV."""

    line: int
    value: Any
    problem: Problem | None = None


@contextmanager
def _opened(path: Path) -> Iterator[tuple[BinaryIO, int]]:
    """A regular, uncompressed file and its size in bytes; refuses everything else, and a file that changes meanwhile."""
    if path.suffix.lower() in COMPRESSED_SUFFIXES:
        raise DataError("expected an uncompressed file; unpack it first (archives are never unpacked here)", file=path)
    try:
        # Without O_NONBLOCK, opening a named pipe waits for a writer forever.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except FileNotFoundError:
        raise DataError(f"expected a file, there is none{_similar(path)}", file=path) from None
    except OSError as error:
        raise DataError(f"expected a readable file: {error.strerror}", file=path) from None
    with os.fdopen(descriptor, "rb") as stream:
        before = os.fstat(descriptor)
        if not stat.S_ISREG(before.st_mode):
            raise DataError(f"expected a regular file, got {_kind(before.st_mode)}", file=path)
        if before.st_size == 0:
            raise DataError("expected at least one row, the file is empty", file=path)
        _require_plain_head(stream, path)
        yield stream, before.st_size
        after = os.fstat(descriptor)
        if (after.st_size, after.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
            raise _changed(path, before.st_size, after.st_size)


def _changed(path: Path, before: int, after: int) -> DataError:
    return DataError(
        f"expected a finished file, it changed while it was read ({before} bytes before, {after} now)", file=path
    )


def _similar(path: Path) -> str:
    try:
        name = nearest(path.name, sorted(entry.name for entry in path.parent.iterdir()))
    except OSError:
        return ""
    return f"; did you mean {name}?" if name and name != path.name else ""


def _kind(mode: int) -> str:
    kinds = ((stat.S_ISDIR, "a directory"), (stat.S_ISFIFO, "a named pipe"), (stat.S_ISSOCK, "a socket"))
    return next((name for is_kind, name in kinds if is_kind(mode)), "a device")


def _require_plain_head(stream: BinaryIO, path: Path) -> None:
    """Refuse compressed and UTF-16 files by their first bytes, and step over the byte order mark of UTF-8."""
    head = stream.read(6)
    for magic, name in COMPRESSED_HEADS.items():
        if head.startswith(magic):
            raise DataError(f"expected an uncompressed file, got {name} data; unpack it first", file=path)
    if head.startswith(UTF16_HEADS):
        raise DataError("expected UTF-8, got UTF-16; convert it with: iconv -f UTF-16 -t UTF-8", file=path, line=1)
    stream.seek(len(UTF8_BOM) if head.startswith(UTF8_BOM) else 0)


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The numbered lines of a file, without trusting that lines or the file end."""
    with _opened(path) as (stream, size):
        number = 0
        while raw := stream.readline(MAX_LINE_BYTES + 1):
            number += 1
            if len(raw) > MAX_LINE_BYTES:
                limit = MAX_LINE_BYTES // 2**20
                raise DataError(f"expected a row of at most {limit} MiB, the line is longer", file=path, line=number)
            if stream.tell() > size:
                raise _changed(path, size, os.fstat(stream.fileno()).st_size)
            if b"\0" in raw:
                column = raw.index(b"\0") + 1
                raise DataError(
                    f"expected UTF-8 text, got a NUL byte at column {column}; is the file UTF-16 or damaged?",
                    file=path, line=number, field=_field_at(raw, column - 1),
                )  # fmt: skip
            yield number, raw


def _field_at(raw: bytes, position: int) -> str | None:
    """The key that was opened last before a position of a JSON line: where a bad byte is."""
    keys = re.findall(rb'"([^"\\\x00-\x1f]{1,80})"\s*:', raw[:position])
    return keys[-1].decode("utf-8", "replace") if keys else None


def _not_utf8(byte: int, column: int) -> str:
    return f"expected UTF-8, got byte 0x{byte:02x} at column {column}; convert it with: iconv -f LATIN1 -t UTF-8"


class _StrictJson:
    """`json` without its leniency: duplicate keys, NaN, infinities and bottomless nesting are problems."""

    def __init__(self) -> None:
        self._problem: Problem | None = None
        self._not_a_number = math.nan
        self._decoder = json.JSONDecoder(
            object_pairs_hook=self._object, parse_constant=self._constant, parse_float=self._float
        )

    def _constant(self, name: str) -> float:
        self._problem = self._problem or Problem(f"expected JSON, got {name}, which JSON does not have")
        return self._not_a_number

    def _float(self, digits: str) -> float:
        number = float(digits)
        return number if math.isfinite(number) else self._constant(digits)

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        built = dict(pairs)
        if len(built) != len(pairs) and self._problem is None:
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            self._problem = Problem("expected every key once, got it twice in one object", twice)
        elif self._problem is not None and self._problem.field is None:
            key = next((key for key, value in pairs if value is self._not_a_number), None)
            self._problem = self._problem._replace(field=key)
        return built

    def decode_at(self, text: str, start: int) -> tuple[Any, int, Problem | None]:
        """The value that starts at `text[start]`, where it ends, and its problem.

        Raises:
            ValueError: the text is no JSON there; a `json.JSONDecodeError` knows its position.
        """
        self._problem = None
        try:
            value, end = self._decoder.raw_decode(text, start)
        except RecursionError:
            raise ValueError("nested too deeply") from None
        return value, end, self._problem


def _json_line(raw: bytes, line: int, strict: _StrictJson) -> Record:
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        return Record(line, None, Problem(_not_utf8(raw[error.start], error.start + 1), _field_at(raw, error.start)))
    start = WHITE_SPACE.match(text).end()  # type: ignore[union-attr]
    try:
        value, end, problem = strict.decode_at(text, start)
    except json.JSONDecodeError as error:
        field = _field_at(raw, len(text[: error.pos].encode()))
        if not raw.endswith(b"\n"):
            message = (
                f"expected a whole row, the last line is cut off or broken ({error.msg} at column {error.pos + 1})"
            )
        else:
            message = f"expected JSON: {error.msg} at column {error.pos + 1}"
        return Record(line, None, Problem(message, field))
    except ValueError as error:
        return Record(line, None, Problem(f"expected JSON: {error}"))
    if rest := text[end:].strip():
        return Record(line, None, Problem(f"expected one JSON object per line, got more after it: {rest[:20]!r}"))
    return Record(line, value, problem)


def read_json_lines(path: Path) -> Iterator[Record]:
    """One JSON object per line; blank lines are stepped over."""
    strict = _StrictJson()
    first = True
    for number, raw in _lines(path):
        if raw.isspace():
            continue
        if first and raw.lstrip().startswith(b"["):
            raise DataError(
                "expected one JSON object per line, got a list; a file with a JSON array must be named .json",
                file=path, line=number,
            )  # fmt: skip
        first = False
        yield _json_line(raw, number, strict)


def read_json_array(path: Path) -> Iterator[Record]:
    """A JSON array of objects; a `.json` file that holds one object per line is read as that."""
    with _opened(path) as (stream, size):
        raw = stream.read(size + 1)
        if len(raw) > size:
            raise _changed(path, size, len(raw))
    if not raw.strip():
        return
    if raw.lstrip().startswith(b"{"):
        yield from read_json_lines(path)
        return
    yield from _array_items(_decoded(raw, path), path)


def _decoded(raw: bytes, path: Path) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        line_start = raw.rfind(b"\n", 0, error.start) + 1
        raise DataError(
            _not_utf8(raw[error.start], error.start - line_start + 1),
            file=path,
            line=raw.count(b"\n", 0, error.start) + 1,
            field=_field_at(raw[line_start:], error.start - line_start),
        ) from None


def _array_items(text: str, path: Path) -> Iterator[Record]:
    strict = _StrictJson()
    line, counted = 1, 0

    def skip_space(index: int) -> int:
        nonlocal line, counted
        index = WHITE_SPACE.match(text, index).end()  # type: ignore[union-attr]
        line += text.count("\n", counted, index)
        counted = index
        return index

    def broken(message: str, at_end: bool) -> DataError:
        message = "expected a whole JSON array, the file ends inside it; was it cut off?" if at_end else message
        return DataError(message, file=path, line=line)

    index = skip_space(0)
    if text[index] != "[":
        raise broken("expected a JSON array of rows, or one JSON object per line", False)
    index = skip_space(index + 1)
    is_empty = text[index : index + 1] == "]"
    while not is_empty:
        try:
            value, end, problem = strict.decode_at(text, index)
        except json.JSONDecodeError as error:
            skip_space(index)
            line += text.count("\n", index, error.pos)
            at_end = not text[error.pos :].strip() or error.msg.startswith("Unterminated string")
            raise broken(f"expected JSON: {error.msg}", at_end) from None
        except ValueError as error:
            raise broken(f"expected JSON: {error}", False) from None
        yield Record(line, value, problem)
        index = skip_space(end)
        separator = text[index : index + 1]
        if separator == "]":
            break
        if separator != ",":
            raise broken(f"expected ',' or ']' after a row, got {separator!r}", not separator)
        index = skip_space(index + 1)
    index = skip_space(index + 1)
    if index != len(text):
        raise broken(f"expected the end of the file after the array, got {text[index : index + 20]!r}", False)


def read_csv(path: Path) -> Iterator[Record]:
    """Comma-separated values whose first row names the fields; every value is a string."""
    # Bad bytes become surrogates here, so that the cell that holds one can be named.
    decoded = (raw.decode("utf-8", "surrogateescape") for _, raw in _lines(path))
    usual_limit = csv.field_size_limit(MAX_LINE_BYTES)
    try:
        reader = csv.reader(decoded, strict=True)
        header = next(reader, None) or []
        if len(set(header)) != len(header):
            raise DataError(f"expected every column once, got {', '.join(header)}", file=path, line=1)
        line = reader.line_num + 1
        for cells in reader:
            if cells:
                yield Record(line, dict(zip(header, cells, strict=False)), _cells_problem(header, cells))
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"expected CSV: {error}", file=path, line=reader.line_num) from None
    finally:
        csv.field_size_limit(usual_limit)


def _cells_problem(header: list[str], cells: list[str]) -> Problem | None:
    if len(cells) < len(header):
        return Problem(f"expected {len(header)} cells, got {len(cells)}", header[len(cells)])
    if len(cells) > len(header):
        return Problem(f"expected {len(header)} cells, got {len(cells)}; text with a comma needs quotes")
    for name, cell in zip(header, cells, strict=True):
        if bad := re.search("[\udc80-\udcff]", cell):
            return Problem(_not_utf8(ord(bad.group()) - 0xDC00, bad.start() + 1), name)
    return None


def read_parquet(path: Path) -> Iterator[Record]:
    """Rows of a Parquet file; their `line` is the row number, from 1."""
    parquet: Any = require("pyarrow.parquet", purpose="reading Parquet files", install="pip install pyarrow")
    number = 0
    with _opened(path) as (stream, _):
        try:
            file = parquet.ParquetFile(stream, page_checksum_verification=True)
            for batch in file.iter_batches(batch_size=1024):
                batch.validate(full=True)
                for index in range(batch.num_rows):
                    yield Record(number + 1, {name: batch.column(name)[index].as_py() for name in batch.schema.names})
                    number += 1
        except (OSError, ValueError, KeyError, MemoryError) as error:  # pyarrow's errors derive from these
            raise DataError(
                f"expected a whole Parquet file, it is damaged: {str(error).splitlines()[0]}",
                file=path,
                line=number + 1,
            ) from None


def is_saved_dataset(path: Path) -> bool:
    """Whether a folder was written by `save_to_disk`: a data set, or several splits of one."""
    return (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()


def read_saved_dataset(path: Path) -> Iterator[Record]:
    """Rows of a folder that `datasets` wrote; their `line` is the row number, from 1."""
    datasets: Any = require("datasets", purpose="reading a saved data set", install="pip install 'etude[datasets]'")
    if (path / "dataset_dict.json").is_file():
        splits = sorted(entry.name for entry in path.iterdir() if (entry / "state.json").is_file())
        raise DataError(f"expected one data set, got the splits {', '.join(splits)}; name one: {path}/SPLIT", file=path)
    try:
        for number, row in enumerate(datasets.load_from_disk(str(path)), start=1):
            yield Record(number, row)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"expected a whole data set saved by datasets, it is damaged: {reason}", file=path) from None


READERS: dict[str, Callable[[Path], Iterator[Record]]] = {
    ".jsonl": read_json_lines,
    ".ndjson": read_json_lines,
    ".json": read_json_array,
    ".csv": read_csv,
    ".parquet": read_parquet,
}


def read_records(path: Path) -> Iterator[Record]:
    """The records of one file, by the kind its name says.

    Raises:
        DataError: the name says nothing known, or the file cannot be read as what it says.
    """
    if path.is_dir() and is_saved_dataset(path):
        return read_saved_dataset(path)
    suffix = path.suffix.lower()
    if suffix not in READERS and suffix not in COMPRESSED_SUFFIXES:
        raise DataError(f"expected a file named {', '.join(READERS)}, got '{suffix or path.name}'", file=path)
    return READERS.get(suffix, read_json_lines)(path)
