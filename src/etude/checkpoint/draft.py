"""A checkpoint being written, until one rename makes it a checkpoint.

    .tmp-checkpoint-9-<run>-<pid>/     files, written by anyone
    commit: hash and fsync every file -> MANIFEST.json, fsync -> fsync the folders -> rename to checkpoint-9
            -> fsync the parent -> only now "saved"

Saving a step again, in an order that a crash may interrupt anywhere:

    1. rename checkpoint-9 to .replaced-checkpoint-9-*   no checkpoint-9 from here: `newest_valid` looks at the replaced
    2. rename .tmp-checkpoint-9-* to checkpoint-9        one as well, and `lock` moves it back
    3. fsync the parent
    4. delete .replaced-checkpoint-9-*                   after a crash `lock` does it

An error from fsync is never retried: the kernel may have dropped the data and would report success the second time. The
draft is given up, the checkpoints before it stay.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Self

from etude.checkpoint.durable import estimate_free_bytes, megabytes, name_of, remove, size_of, sync_folder
from etude.checkpoint.manifest import (
    FORMAT,
    MANIFEST,
    RESERVED_KEYS,
    check_names,
    encode_manifest,
    parse_manifest,
)
from etude.checkpoint.reading import sha256_of
from etude.errors import CheckpointError

STORAGE_ERRORS = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EFBIG),
    *(errno.EMFILE, errno.ENFILE, errno.ESTALE, errno.ENAMETOOLONG),
)

# safetensors reports a failed write as its own exception with the error number in the text only.
_OS_ERROR_IN_TEXT = re.compile(r"\(os error (\d+)\)")
open_drafts: set[str] = set()  # names of the folders this process is writing


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder and its optimizer step. `manifest` is None until `CheckpointStore.verify` has read it."""

    path: Path
    step: int
    manifest: dict[str, Any] | None = None


class Draft:
    """A checkpoint being written. Anyone may put files and folders into `path` until `commit`; without it they are removed."""

    def __init__(self, final: Path, path: Path, step: int, intact: str) -> None:
        self.path, self.step = path, step
        self._final, self._intact = final, intact
        self._closed = self._committed = False
        self._identity = (0, 0)
        open_drafts.add(path.name)

    def make_folder(self) -> None:
        self.path.mkdir()
        self._identity = _identity_of(self.path)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._closed = True
        open_drafts.discard(self.path.name)
        if self._committed:
            return
        needed_bytes = size_of(self.path)
        remove(self.path)
        if error is not None and (number := self._storage_error(error)):
            self._fail(OSError(number, os.strerror(number)), self._final, needed_bytes, cause=error)

    def write(self, name: str, data: bytes | memoryview) -> None:
        """Create the file `name` ('a' or 'sub/a'). It becomes durable with `commit`, which syncs every file it finds.

        Raises:
            CheckpointError: the name is not a plain relative one or exists, or the file cannot be written.
        """
        if self._closed or name == MANIFEST:
            raise CheckpointError("cannot be written: only commit() does, as the last file", path=self._final / name)
        check_names([name], shown=self._final)
        self._write(name, data)

    def commit(self, *, step: int, extra: Mapping[str, Any]) -> Checkpoint:
        """Make the draft durable and visible as `<prefix>-<step>`. When this returns, the checkpoint survives a power loss.

        Args:
            step: the step given to `begin`.
            extra: JSON values that the manifest carries beside `format`, `step`, `files` and `digest`.

        Raises:
            CheckpointError: something failed; a draft that failed once cannot be committed again.
        """
        if self._closed:
            raise CheckpointError("was committed or given up before", path=self._final, step=self.step)
        if step != self.step or any(key in RESERVED_KEYS for key in extra):
            raise CheckpointError(f"commit(step={step}) of step {self.step} with {sorted(extra)}", path=self._final)
        self._closed = True
        with self.failures_named():
            self._require_same_folder()
            folders, names = self._tree()
            files = {name: self._seal(name) for name in names}
            raw, manifest = self._manifest({"format": FORMAT, "step": step, "files": files, **extra})
            self._write(MANIFEST, raw)
            self._seal(MANIFEST)
            for folder in reversed(folders):
                sync_folder(folder)
            self._require_same_folder()
            self._publish()
        self._committed = True
        return Checkpoint(self._final, step, manifest)

    @contextmanager
    def failures_named(self, name: str | None = None, needed_bytes: int | None = None) -> Iterator[None]:
        """Turn an OSError into a CheckpointError that names file, step, space and what is intact."""
        try:
            yield
        except OSError as error:
            shown = self._final / name if name else self._final
            self._fail(error, shown, size_of(self.path) if needed_bytes is None else needed_bytes, cause=error)

    def _require_same_folder(self) -> None:
        """Where the folder was moved away, whoever writes by name makes another one, in which the files before are missing."""
        if _identity_of(self.path) != self._identity:
            raise OSError(errno.ENOENT, "the folder was moved or deleted meanwhile", str(self.path))

    def _tree(self) -> tuple[list[Path], list[str]]:
        """Folders, each before those inside it, and the names of regular files. Links and devices stay unlisted."""
        folders, names = [], []
        for folder, _, files in os.walk(self.path, onerror=_raise):
            folders.append(Path(folder))
            paths = [Path(folder, file) for file in sorted(files)]
            names += [path.relative_to(self.path).as_posix() for path in paths if stat.S_ISREG(path.lstat().st_mode)]
        return folders, names

    def _write(self, name: str, data: bytes | memoryview) -> None:
        remaining = memoryview(data).cast("B")
        with self.failures_named(name, remaining.nbytes):
            target = self.path / name
            target.parent.mkdir(parents=True, exist_ok=True)
            file = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
            try:
                while remaining:
                    remaining = remaining[os.write(file, remaining) :]
            finally:
                os.close(file)

    def _seal(self, name: str) -> dict[str, int | str]:
        """Hash what is on disk, whoever wrote it, and sync it."""
        with self.failures_named(name):
            file = os.open(self.path / name, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                num_bytes, sha256 = sha256_of(file)
                os.fsync(file)
            finally:
                os.close(file)
        return {"bytes": num_bytes, "sha256": sha256}

    def _manifest(self, document: dict[str, Any]) -> tuple[bytes, dict[str, Any]]:
        """Encoded and read back: what could not be read again is not written."""
        shown = self._final / MANIFEST
        try:
            raw = encode_manifest(document)
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"extra is not plain JSON: {error}", path=shown, step=self.step) from error
        return raw, parse_manifest(raw, shown=shown)

    def _publish(self) -> None:
        replaced = self.path.with_name(self.path.name.replace(".tmp-", ".replaced-", 1))
        try:
            if os.path.lexists(self._final):
                self._final.rename(replaced)
            self.path.rename(self._final)
        except BaseException:
            with suppress(OSError):  # nothing to move back, or `lock` will
                replaced.rename(self._final)
            raise
        sync_folder(self._final.parent)
        if os.path.lexists(replaced):
            remove(replaced)

    def _storage_error(self, error: BaseException) -> int | None:
        """The errno, if what broke the save from outside (a hook, another library) was the storage."""
        if isinstance(error, OSError):
            inside = str(error.filename or "").startswith(str(self.path))
            return error.errno if inside or error.errno in STORAGE_ERRORS else None
        match = _OS_ERROR_IN_TEXT.search(str(error)) if isinstance(error, Exception) else None
        inside = str(self.path) in str(error)  # as where the folder is moved or deleted meanwhile
        return int(match[1]) if match and (inside or int(match[1]) in STORAGE_ERRORS) else None

    def _fail(self, error: OSError, shown: Path, needed_bytes: int, *, cause: BaseException) -> NoReturn:
        free = megabytes(estimate_free_bytes(self._final.parent))
        message = f"{name_of(error)} while saving step {self.step}: needs {megabytes(needed_bytes)}, free {free}; {self._intact}"
        raise CheckpointError(message, path=shown, step=self.step) from cause


def _identity_of(folder: Path) -> tuple[int, int]:
    found = folder.stat()
    return found.st_dev, found.st_ino


def _raise(error: OSError) -> NoReturn:
    raise error
