"""The atomic checkpoint store: a checkpoint is complete and durable under its name, or it is not there.

`draft` holds the order in which one is written; here they are found, verified, retired, and cleared up after a crash.
One process writes (`CheckpointStore.lock`), any number may read meanwhile. POSIX only.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import os
import re
import secrets
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from etude.checkpoint.draft import Checkpoint, Draft, open_drafts
from etude.checkpoint.durable import (
    estimate_free_bytes,
    make_folder_durably,
    megabytes,
    name_of,
    remove,
    size_of,
    sync_folder,
)
from etude.checkpoint.manifest import MANIFEST, check_files, read_manifest
from etude.checkpoint.reading import opened_folder
from etude.errors import CheckpointError

logger = logging.getLogger(__name__)

LOCK_FILE = ".etude.lock"
NO_LOCKS_HERE = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
_held_locks: set[int] = set()


@dataclass(frozen=True)
class Rejection:
    """A checkpoint that is not valid, and why."""

    path: Path
    reason: str

    def __str__(self) -> str:
        return f"{self.path.name}: {self.reason}"


class CheckpointStore:
    """The checkpoints `<prefix>-<step>` in the folder `root`. Nothing is created before `lock` or `begin`."""

    def __init__(self, root: str | Path, prefix: str = "checkpoint") -> None:
        self.root, self.prefix = Path(root), prefix
        step = r"(?P<step>0|[1-9][0-9]{0,17})"
        self._committed_name = re.compile(rf"{re.escape(prefix)}-{step}")
        self._aside_name = re.compile(
            rf"\.(?P<kind>tmp|replaced|trash)-{re.escape(prefix)}-{step}-(?P<host>[0-9a-f]{{8}})[0-9a-f]{{8}}-(?P<pid>[0-9]{{1,9}})"
        )

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Be the only writer of `root`, and first clear up what a killed writer on this host left.

        Raises:
            CheckpointError: another process writes here (it is named), or the lock file cannot be written.
        """
        path = self.root / LOCK_FILE
        try:
            make_folder_durably(self.root)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        except OSError as error:
            raise CheckpointError(f"cannot be written: {name_of(error)}", path=path) from error
        _held_locks.add(descriptor)
        try:
            _lock_or_refuse(descriptor, path)
            self._clear_up()
            yield
        finally:
            if descriptor in _held_locks:  # not in a forked child, which closed it at once
                _held_locks.remove(descriptor)
                os.close(descriptor)

    def begin(self, step: int, *, expected_bytes: int | None = None) -> Draft:
        """Start a checkpoint of `step`. Use it as a context manager: what is not committed is removed.

        Args:
            step: the optimizer step it will be named after.
            expected_bytes: its size if known; otherwise twice the size of the newest checkpoint must be free.

        Raises:
            CheckpointError: there is not enough space, or the folder cannot be made.
        """
        final = self.root / f"{self.prefix}-{step}"
        committed = self.committed()
        newest = committed[-1].path if committed else None
        intact = f"{newest.name} is intact" if newest else "there is no earlier checkpoint"
        needed = 2 * size_of(newest) if expected_bytes is None and newest else expected_bytes or 0
        free = estimate_free_bytes(self.root)
        if free < needed:
            raise CheckpointError(
                f"not enough space to save step {step}: needs {megabytes(needed)}, free {megabytes(free)}; {intact}",
                path=final,
                step=step,
            )
        draft = Draft(final, self._aside("tmp", step), step, intact)
        with draft.failures_named():
            make_folder_durably(self.root)
            draft.make_folder()
        return draft

    def committed(self) -> list[Checkpoint]:
        """Every folder named `<prefix>-<step>`, by ascending step, unread.

        Raises:
            CheckpointError: `root` exists but cannot be listed.
        """
        return [each for each in self._checkpoints(self._names()) if each.path.is_dir()]

    def verify(self, path: str | Path, *, digests: bool = True) -> Checkpoint:
        """The checkpoint in any folder `path`, after comparing it with its manifest; without `digests` only sizes.

        Raises:
            CheckpointError: naming the file that is missing, damaged or not to be trusted.
        """
        path = Path(path)
        with opened_folder(path) as folder:
            manifest = read_manifest(folder, shown=path)
            step: int = manifest["step"]
            named = self._committed_name.fullmatch(path.name)
            if named and int(named["step"]) != step:
                raise CheckpointError(f"is of step {step}, not of the step its folder names", path=path / MANIFEST)
            check_files(folder, manifest, digests=digests, shown=path)
        return Checkpoint(path, step, manifest)

    def newest_valid(self) -> tuple[Checkpoint | None, list[Rejection]]:
        """The newest checkpoint that verifies, and the newer ones that do not. Best called while holding `lock`."""
        rejections: list[Rejection] = []
        for candidate in reversed(self._candidates()):
            before = _identity(candidate.path)
            try:
                return self.verify(candidate.path), rejections
            except CheckpointError as error:
                # A writer that retired or replaced it meanwhile may be deleting it, still under the name that was listed.
                if candidate not in self._candidates() or _identity(candidate.path) != before:
                    return self.newest_valid()
                reason = str(error).removeprefix(f"{candidate.path}{os.sep}").removeprefix(f"{candidate.path}: ")
                rejections.append(Rejection(candidate.path, reason))
        return None, rejections

    def retire(self, checkpoint: Checkpoint) -> None:
        """Delete a checkpoint: out of sight by one rename first. Failing to delete is logged, not raised.

        Raises:
            CheckpointError: it is not one of this store's.
        """
        if checkpoint.path.parent != self.root or not self._committed_name.fullmatch(checkpoint.path.name):
            raise CheckpointError(f"is no checkpoint of {self.root}: not deleted", path=checkpoint.path)
        trash = self._aside("trash", checkpoint.step)
        try:
            checkpoint.path.rename(trash)
            sync_folder(self.root)  # or a power loss could bring it back, half deleted, under its old name
        except OSError as error:
            logger.warning("%s: could not be retired: %s", checkpoint.path, name_of(error))
            return
        remove(trash)

    def _candidates(self) -> list[Checkpoint]:
        """What has the name of a checkpoint, and checkpoints whose replacement was cut off between its two renames."""
        names = self._names()  # one listing: between two, a live writer may have finished a replacement
        named = self._checkpoints(names)
        steps = {each.step for each in named}
        asides = self._matching(self._aside_name, names)
        cut_off = [Checkpoint(path, int(match["step"])) for path, match in asides if match["kind"] == "replaced"]
        return sorted([*named, *(each for each in cut_off if each.step not in steps)], key=lambda each: each.step)

    def _clear_up(self) -> None:
        for path, match in self._matching(self._aside_name, self._names()):
            final = self.root / f"{self.prefix}-{match['step']}"
            if match["kind"] != "trash" and not _is_abandoned(path.name, match["host"], int(match["pid"])):
                continue
            if match["kind"] == "replaced" and not os.path.lexists(final):
                try:
                    path.rename(final)
                    sync_folder(self.root)
                except OSError as error:
                    logger.warning("%s: could not be moved back to %s: %s", path, final.name, name_of(error))
            else:
                remove(path)

    def _checkpoints(self, names: list[str]) -> list[Checkpoint]:
        matching = self._matching(self._committed_name, names)
        return sorted((Checkpoint(path, int(match["step"])) for path, match in matching), key=lambda each: each.step)

    def _matching(self, pattern: re.Pattern[str], names: list[str]) -> list[tuple[Path, re.Match[str]]]:
        return [(self.root / name, match) for name in names if (match := pattern.fullmatch(name))]

    def _names(self) -> list[str]:
        try:
            return sorted(path.name for path in self.root.iterdir())
        except FileNotFoundError:
            return []
        except OSError as error:
            raise CheckpointError(f"cannot be listed: {name_of(error)}", path=self.root) from error

    def _aside(self, kind: str, step: int) -> Path:
        return self.root / f".{kind}-{self.prefix}-{step}-{host_tag()}{secrets.token_hex(4)}-{os.getpid()}"


def _lock_or_refuse(descriptor: int, path: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(descriptor, 4096, 0).decode(errors="replace").strip() or "unknown"
        raise CheckpointError(f"another process is writing checkpoints here: {holder}", path=path) from None
    except OSError as error:
        if error.errno not in NO_LOCKS_HERE:
            raise CheckpointError(f"cannot be locked: {name_of(error)}", path=path) from error
        warnings.warn(f"{path}: this file system has no locks; do not start two runs in this folder", stacklevel=4)
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode(), 0)
    except OSError as error:
        raise CheckpointError(f"cannot be written: {name_of(error)}", path=path) from error


def _close_inherited_locks() -> None:
    """In a forked child: a data-loading worker that outlives its killed parent must not keep the parent's lock."""
    for descriptor in _held_locks:
        os.close(descriptor)
    _held_locks.clear()


os.register_at_fork(after_in_child=_close_inherited_locks)


def _is_abandoned(name: str, host: str, pid: int) -> bool:
    """Whether its writer is known to be dead. In a restarted container the dead one often had our own process id."""
    if host != host_tag():
        return False
    if pid == os.getpid():
        return name not in open_drafts
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False


def host_tag() -> str:
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = path.lstat()
    except OSError:
        return None
    return status.st_dev, status.st_ino
