"""Where etude keeps what it would otherwise make again: in a folder of the user's, open to nobody else."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from etude.errors import ConfigError


def default_cache_dir() -> Path:
    """`$ETUDE_CACHE`, else `etude` in `$XDG_CACHE_HOME` or `~/.cache`.

    A relative path in either is ignored, as the XDG specification demands: the folder would be another one everywhere.

    Raises:
        ConfigError: neither is set, and the user has no home.
    """
    own, users = (Path(os.environ.get(name, "")) for name in ("ETUDE_CACHE", "XDG_CACHE_HOME"))
    if own.is_absolute():
        return own
    if users.is_absolute():
        return users / "etude"
    try:
        return Path.home() / ".cache" / "etude"
    except RuntimeError:  # no HOME, and no entry for the user: a number alone, as containers are started with
        raise ConfigError("there is no home folder; set ETUDE_CACHE to a folder of your own", field="HOME") from None


def private_folder(path: Path) -> Path:
    """The folder, made where it is missing, and open to its owner only: others could put files of theirs into it.

    Raises:
        OSError: it cannot be made.
        ConfigError: it, or the link that leads to it, belongs to another user, or it is meant for all of them.
    """
    path.mkdir(parents=True, exist_ok=True, mode=0o700)
    found = path.stat()
    if hasattr(os, "getuid") and {found.st_uid, path.lstat().st_uid} != {os.getuid()}:
        raise ConfigError(f"{path} belongs to another user; give a folder of your own", field="cache_dir")
    if found.st_mode & stat.S_ISVTX:  # such as /tmp, which root must not close to everybody
        raise ConfigError(f"{path} is shared by all users; give a folder of your own in it", field="cache_dir")
    if stat.S_IMODE(found.st_mode) != 0o700:  # on a disk that is only read, one that is closed can be used
        path.chmod(0o700)
    return path
