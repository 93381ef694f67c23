"""Many small things in little memory: what grows beyond a few MiB lies in a file without a name, which ends with the process.

A million short rows as Python objects take half a gigabyte; here they take the eight bytes that say where each one ends.
"""

from __future__ import annotations

import json
import mmap
import os
import tempfile
import weakref
from array import array
from collections.abc import Iterator, Sequence
from typing import IO, Any, overload

import numpy as np
from numpy.typing import NDArray

from etude.errors import ConfigError
from etude.private_cache import default_cache_dir, private_folder

MAX_MEMORY_BYTES = 8 * 2**20
"""Of one spool, before it goes to a file; also what is written to it at once."""


class Spool:
    """Bytes that are only appended to, and read again anywhere."""

    def __init__(self, max_memory_bytes: int = MAX_MEMORY_BYTES) -> None:
        self._max_memory_bytes = max_memory_bytes
        self._tail = bytearray()
        self._in_file = 0
        self._file: IO[bytes] | None = None

    def __len__(self) -> int:
        return self._in_file + len(self._tail)

    def write(self, content: bytes | memoryview) -> None:
        self._tail += content
        if len(self._tail) > self._max_memory_bytes:
            self._flush()

    def _flush(self) -> None:
        if self._file is None:
            self._file = _nameless_file()
            weakref.finalize(self, self._file.close)
        self._file.write(self._tail)
        self._file.flush()
        self._in_file += len(self._tail)
        self._tail = bytearray()

    def read(self, start: int, end: int) -> bytes:
        """The bytes from `start` to `end`. By reading and not by mapping: pages of a mapped file count as memory."""
        parts = []
        while start < min(end, self._in_file):
            assert self._file is not None
            part = os.pread(self._file.fileno(), min(end, self._in_file) - start, start)
            if not part:
                raise OSError("a temporary file of this process was cut off")
            parts.append(part)
            start += len(part)
        if start < end:
            parts.append(bytes(self._tail[start - self._in_file : end - self._in_file]))
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def as_array(self, dtype: str) -> NDArray[Any]:
        """All of it as numbers; nothing may be appended any more. Mapped where it lies in a file."""
        if self._file is None:
            return np.frombuffer(bytes(self._tail), dtype=dtype)
        if self._tail:
            self._flush()
        shape = (self._in_file // np.dtype(dtype).itemsize,)
        return np.asarray(np.memmap(self._file, dtype=dtype, mode="r", shape=shape))


def give_pages_back(values: Any) -> None:
    """What was read of a mapped file counts as memory of the process until it is given back; it is there to be read again."""
    while values is not None and not isinstance(values, mmap.mmap):
        values = getattr(values, "base", None)
    if values is not None and hasattr(mmap, "MADV_DONTNEED"):
        values.madvise(mmap.MADV_DONTNEED)


def _nameless_file() -> IO[bytes]:
    """In the user's cache, since `/tmp` is memory on some machines; where there is no such folder, in `/tmp` after all."""
    try:
        folder: str | None = str(private_folder(default_cache_dir()))
    except (OSError, ConfigError):
        folder = None
    return tempfile.TemporaryFile(dir=folder, prefix=".rows-")


class JsonRows(Sequence[dict[str, Any]]):
    """Rows as JSON in a spool. Each access makes the row anew; values that JSON has no word for are kept as they are."""

    def __init__(self, max_memory_bytes: int = MAX_MEMORY_BYTES) -> None:
        self._spool = Spool(max_memory_bytes)
        self._ends = array("Q", [0])
        self._as_they_are: dict[int, dict[str, Any]] = {}

    def append(self, row: dict[str, Any]) -> None:
        try:
            self._spool.write(json.dumps(row).encode())
        except (TypeError, ValueError, RecursionError):  # a date, bytes: of a field that no format knows
            self._as_they_are[len(self)] = row
        self._ends.append(len(self._spool))

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, index: slice) -> list[dict[str, Any]]: ...
    def __getitem__(self, index: int | slice) -> dict[str, Any] | list[dict[str, Any]]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        if index < 0:
            index += len(self)
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        if index in self._as_they_are:
            return self._as_they_are[index]
        row: dict[str, Any] = json.loads(self.as_json(index))
        return row

    def as_json(self, index: int) -> bytes:
        """
        Raises:
            TypeError: the row has values that JSON has no word for.
        """
        if index in self._as_they_are:
            raise TypeError(f"row {index} is no JSON")
        return self._spool.read(self._ends[index], self._ends[index + 1])

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[index] for index in range(len(self)))
