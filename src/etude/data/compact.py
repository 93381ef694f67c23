"""Many small things in little memory: what grows beyond a few MiB lies in a file without a name, which ends with the process.

A million short rows as Python objects take half a gigabyte; here they take the eight bytes that say where each one ends.
"""

from __future__ import annotations

import json
import logging
import math
import os
import tempfile
import weakref
from array import array
from collections.abc import Iterator, Sequence
from functools import cache
from typing import IO, Any, overload

import numpy as np
from numpy.typing import NDArray

from etude.errors import ConfigError
from etude.private_cache import default_cache_dir, private_folder

logger = logging.getLogger(__name__)

PREFIX = ".rows-"
MAX_MEMORY_BYTES = 8 * 2**20
"""Of one spool, before it goes to a file; also what is written to it at once."""


class Spool:
    """Bytes that are only appended to, and read again anywhere. What a full disk does not take stays in memory."""

    def __init__(self, max_memory_bytes: int = MAX_MEMORY_BYTES) -> None:
        self._max_memory_bytes: float = max_memory_bytes
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
        try:
            if self._file is None:
                self._file = _nameless_file()
                weakref.finalize(self, self._file.close)
            while self._tail:
                written = os.pwrite(self._file.fileno(), self._tail, self._in_file)
                self._in_file += written
                del self._tail[:written]
        except OSError as error:
            _say_once(f"rows stay in memory, where they take more room: {error}")
            self._max_memory_bytes = math.inf

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

    def as_numbers(self, dtype: str) -> NDArray[Any] | FileNumbers:
        """All of it as numbers; nothing may be appended any more. Where it lies in a file, they stay there."""
        if self._file is not None and self._tail and self._max_memory_bytes < math.inf:
            self._flush()
        if self._file is None or self._tail:
            return np.frombuffer(self.read(0, len(self)), dtype=dtype)
        return FileNumbers(self._file.fileno(), dtype, self._in_file // np.dtype(dtype).itemsize)


class FileNumbers:
    """Numbers in a file, read as they are asked for.

    They are not mapped: every look into a map brings its neighbourhood along, two megabytes on some systems, so that an epoch
    in random order has the whole file count as memory of the process.
    """

    def __init__(self, descriptor: int, dtype: str, count: int) -> None:
        self.dtype, self._count, self._descriptor = np.dtype(dtype), count, os.dup(descriptor)
        weakref.finalize(self, os.close, self._descriptor)

    def __len__(self) -> int:
        return self._count

    @property
    def nbytes(self) -> int:
        return self._count * self.dtype.itemsize

    @overload
    def __getitem__(self, place: int) -> Any: ...
    @overload
    def __getitem__(self, place: slice) -> NDArray[Any]: ...
    def __getitem__(self, place: int | slice) -> Any:
        if not isinstance(place, slice):
            return self._read(range(self._count)[place], 1)[0]
        start, stop, step = place.indices(self._count)
        return self._read(start, max(0, stop - start))[::step] if step > 0 else np.asarray(self)[place]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return self._read(0, self._count).astype(dtype or self.dtype)

    def __reduce__(self) -> Any:
        """A copy in another process has no such file."""
        return np.array, (np.asarray(self),)

    def _read(self, start: int, count: int) -> NDArray[Any]:
        wanted, first, parts = count * self.dtype.itemsize, start * self.dtype.itemsize, []
        while wanted:
            part = os.pread(self._descriptor, wanted, first)
            if not part:
                raise OSError("a file of tokens was cut off while it was read")
            parts.append(part)
            first, wanted = first + len(part), wanted - len(part)
        return np.frombuffer(b"".join(parts), dtype=self.dtype)


def _nameless_file() -> IO[bytes]:
    """In the user's cache, since `/tmp` is memory on some machines; where there is no such folder, in `/tmp` after all."""
    try:
        return tempfile.TemporaryFile(dir=private_folder(default_cache_dir()), prefix=PREFIX)
    except (OSError, ConfigError):
        return tempfile.TemporaryFile(prefix=PREFIX)


@cache
def _say_once(text: str) -> None:
    """A run has several spools, and they meet the same disk."""
    logger.warning(text)


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
