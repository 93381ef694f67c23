"""Writing that survives a power loss, deleting that may fail, and what a full disk is called."""

from __future__ import annotations

import errno
import logging
import os
import shutil
from contextlib import suppress
from pathlib import Path

from etude.errors import CheckpointError

logger = logging.getLogger(__name__)


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable."""
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that has nothing to sync for a folder says so
            raise
    finally:
        os.close(folder)


def make_folder_durably(path: Path) -> None:
    """Create a folder and its missing parents so that they survive a power loss."""
    missing = [each for each in (path, *path.parents) if not each.exists()]
    for folder in reversed(missing):
        folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)


def name_of(error: OSError) -> str:
    """'ENOSPC (No space left on device)'."""
    return f"{errno.errorcode.get(error.errno or 0, error.errno)} ({error.strerror})"


def estimate_free_bytes(path: str | Path) -> int:
    """Bytes this user may still write where `path` is or will be. A quota may allow fewer."""
    path = Path(path).absolute()
    try:
        while not path.exists() and path != path.parent:
            path = path.parent
        return shutil.disk_usage(path).free
    except OSError as error:
        raise CheckpointError(f"cannot be examined: {name_of(error)}", path=path) from error


def remove(path: Path) -> None:
    if path.is_symlink() or path.is_file():
        with suppress(OSError):
            path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)
    if os.path.lexists(path):
        logger.warning("%s: could not be deleted; the next start tries again", path)


def size_of(folder: Path) -> int:
    files = (Path(parent, name) for parent, _, names in os.walk(folder) for name in names)
    num_bytes = 0
    for file in files:
        with suppress(OSError):
            num_bytes += file.lstat().st_size
    return num_bytes


def megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:.1f} MB"
