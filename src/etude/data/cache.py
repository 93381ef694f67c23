"""Tokenized rows kept from run to run, in the user's private cache, by what they were made from.

An entry is a folder: an array in a file each, and `MANIFEST.json` with the size and sha256 of every file, written last. It gets
its name by one rename when it is complete, so two processes that make the same entry do not meet. An entry is read only after
every file has shown to be the one that was written; one that is not is removed, and the rows are tokenized again.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from io import BufferedReader
from pathlib import Path
from typing import Any

import numpy as np

from etude.data.compact import FileNumbers
from etude.data.hub import is_hub_name
from etude.data.tokens import COLUMNS, Statistics, TokenizedRows
from etude.errors import DataError
from etude.private_cache import private_folder

MANIFEST = "MANIFEST.json"
FORMAT = 1
"""Changes with what an entry holds, or with what the same rows are turned into."""
NUMBERS_AT_ONCE = 2**21
"""Of a column, while it is written."""
MAX_ENTRIES, MAX_BYTES, MAX_UNUSED_DAYS = 64, 10 * 2**30, 30
MIN_FREE_BYTES = 2**30
"""Left on the disk by an entry: for the checkpoints of the run, which matter more."""
ABANDONED_AFTER_SECONDS = 24 * 3600
DRAFT = ".draft-"
DAMAGE = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError)
"""What reading an entry raises that somebody changed or cut off."""


def digest_of(*parts: Any) -> str:
    """A key: the sha256 of values that JSON has words for, and of bytes."""
    digest = hashlib.sha256()
    for part in parts:
        content = part if isinstance(part, bytes) else json.dumps(part, sort_keys=True).encode()
        digest.update(len(content).to_bytes(8))
        digest.update(content)
    return digest.hexdigest()


def fingerprint_of(files: Iterable[Path | str]) -> list[Any] | None:
    """Of each file (or saved data set) its name and what is in it; None where that cannot be told from here."""
    return _each(files, sha256_of)


def stamp_of(files: Iterable[Path | str]) -> list[Any] | None:
    """Of each file its size and when it was last written: whether it changed while this process ran."""
    return _each(files, lambda path: [path.stat().st_size, path.stat().st_mtime_ns])


def _each(files: Iterable[Path | str], look: Callable[[Path], Any]) -> list[Any] | None:
    found: list[Any] = []
    for file in files:
        if is_hub_name(file):
            return None
        path = Path(file)
        inside = sorted(path.rglob("*")) if path.is_dir() else [path]
        try:
            found.append([str(file), [[str(part), look(part)] for part in inside if not part.is_dir()]])
        except OSError:
            return None
    return found


def sha256_of(path: Path) -> str:
    with _opened(path) as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _opened(path: Path, flags: int = 0) -> BufferedReader:
    """
    Raises:
        OSError: it is no regular file.
    """
    if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe takes what somebody writes into it
        raise OSError(f"{path} is no regular file")
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | flags)
    content = os.fdopen(descriptor, "rb")
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        content.close()
        raise OSError(f"{path} is no regular file")
    return content


class TokenCache:
    """The entries below a folder.

    Raises:
        OSError, ConfigError: the folder cannot be made, or belongs to another user.
    """

    def __init__(self, folder: Path) -> None:
        private_folder(folder.parent)
        self.folder = private_folder(folder)

    def has_any(self, prefix: str) -> bool:
        """Whether there is an entry whose key starts so."""
        return any(self.folder.glob(f"{prefix}*/{MANIFEST}"))

    def load(self, key: str) -> tuple[dict[str, TokenizedRows], Any] | None:
        """What was stored under `key`: the data sets by their names, and what was noted with them. None without an entry.

        Raises:
            DataError: the entry is damaged; it has been removed.
        """
        folder = self.folder / key
        if not folder.exists():
            return None
        try:
            if folder.is_symlink():
                raise OSError("a link in the place of a folder")
            manifest = _manifest_in(folder)
            sets = {name: _loaded(folder, name, kept, manifest["files"]) for name, kept in manifest["sets"].items()}
            note = manifest["note"]
        except DAMAGE as error:
            self._remove(folder)
            raise DataError(f"kept tokens are damaged ({error})", file=folder) from None
        with contextlib.suppress(OSError):  # a disk that is only read: there is nothing to be forgotten on it
            os.utime(folder / MANIFEST)
        return sets, note

    def store(self, key: str, sets: Mapping[str, TokenizedRows], note: Any) -> None:
        """Keep data sets under a key, with a note that JSON has words for; whoever was first stays.

        Raises:
            OSError: there is no room.
            TypeError: the note is no JSON.
        """
        self._tidy()
        needed = sum(rows.columns[column].nbytes for rows in sets.values() for column in COLUMNS)
        if shutil.disk_usage(self.folder).free < needed + MIN_FREE_BYTES:
            raise OSError(errno.ENOSPC, "the disk is nearly full", str(self.folder))
        draft = Path(tempfile.mkdtemp(prefix=DRAFT, dir=self.folder))
        try:
            files = {}
            for name, rows in sets.items():
                for column, dtype in COLUMNS.items():
                    files[f"{name}.{column}"] = _written(draft / f"{name}.{column}", rows.columns[column], dtype)
            manifest = {"files": files, "note": note, "sets": {name: _described(rows) for name, rows in sets.items()}}
            content = json.dumps({"manifest": manifest, "sha256": digest_of(manifest)})
            (draft / MANIFEST).write_text(content, encoding="utf-8")
            if not (self.folder / key / MANIFEST).exists():
                self._remove(self.folder / key)  # what somebody left of an entry
                draft.rename(self.folder / key)
        except OSError:
            if not (self.folder / key / MANIFEST).exists():  # or another process was faster
                raise
        finally:
            shutil.rmtree(draft, ignore_errors=True)

    def _tidy(self) -> None:
        """Remove what was not used for long, and what a killed process left. Whoever has it open can still read it."""
        now = time.time()
        for folder in self.folder.iterdir():
            is_entry = not folder.name.startswith(DRAFT) and (folder / MANIFEST).exists()
            if not is_entry and _age(folder, now) > ABANDONED_AFTER_SECONDS:
                self._remove(folder)
        total_bytes = 0
        for number, (folder, size) in enumerate(entries_in(self.folder), start=1):
            total_bytes += size
            is_old = _age(folder / MANIFEST, now) > MAX_UNUSED_DAYS * 24 * 3600
            if is_old or number >= MAX_ENTRIES or total_bytes > MAX_BYTES:
                self._remove(folder)

    def _remove(self, folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(OSError):
            folder.unlink()  # what is a file or a link in the place of a folder


def entries_in(folder: Path) -> list[tuple[Path, int]]:
    """Every complete entry of a cache with its size in bytes, the one used last first."""
    now = time.time()
    manifests = sorted(folder.glob(f"[!.]*/{MANIFEST}"), key=lambda manifest: _age(manifest, now))
    return [(manifest.parent, _size_of(manifest.parent)) for manifest in manifests]


def _age(path: Path, now: float) -> float:
    try:
        return now - path.stat().st_mtime
    except OSError:  # another process was faster
        return 0.0


def _size_of(folder: Path) -> int:
    try:
        return sum(file.stat().st_size for file in folder.iterdir())
    except OSError:
        return 0


def _written(path: Path, values: Any, dtype: str) -> dict[str, Any]:
    digest, written = hashlib.sha256(), 0
    with path.open("xb") as file:
        for start in range(0, len(values), NUMBERS_AT_ONCE):
            block = np.ascontiguousarray(values[start : start + NUMBERS_AT_ONCE], dtype=dtype).data
            digest.update(block)
            file.write(block)
            written += block.nbytes
    return {"bytes": written, "sha256": digest.hexdigest()}


def _described(rows: TokenizedRows) -> dict[str, Any]:
    rejected = [[str(error), error.file, error.line, error.field] for error in rows.rejected]
    return {
        "files": rows.files,
        "source": rows.source,
        "statistics": rows.statistics._asdict(),
        "rejected": rejected,
    }


def _loaded(folder: Path, name: str, kept: dict[str, Any], files: dict[str, Any]) -> TokenizedRows:
    columns = {column: _column(folder / f"{name}.{column}", dtype, files) for column, dtype in COLUMNS.items()}
    rejected = []
    for text, file, line, field in kept["rejected"]:
        error = DataError(text)
        error.file, error.line, error.field = file, line, field
        rejected.append(error)
    return TokenizedRows(columns, kept["files"], kept["source"], Statistics(**kept["statistics"]), rejected)


def _manifest_in(folder: Path) -> dict[str, Any]:
    with _opened(folder / MANIFEST, os.O_NOFOLLOW) as content:
        found = json.loads(content.read())
    manifest: dict[str, Any] = found["manifest"]
    if digest_of(manifest) != found["sha256"]:
        raise ValueError(f"{MANIFEST} is not the file that was written")
    return manifest


def _column(path: Path, dtype: str, files: dict[str, Any]) -> Any:
    """An array that lies in a file of the size and the hash that the manifest says."""
    with _opened(path, os.O_NOFOLLOW) as content:
        size = os.fstat(content.fileno()).st_size
        if size != files[path.name]["bytes"]:
            raise ValueError(f"{path.name} has {size} bytes instead of {files[path.name]['bytes']}")
        if hashlib.file_digest(content, "sha256").hexdigest() != files[path.name]["sha256"]:
            raise ValueError(f"{path.name} is not the file that was written")
        if size == 0:
            return np.empty(0, dtype)
        return FileNumbers(content.fileno(), dtype, size // np.dtype(dtype).itemsize)
