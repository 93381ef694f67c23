"""Where etude keeps what it would otherwise make again: in a folder of the user's, open to nobody else."""

from __future__ import annotations

import os
from pathlib import Path

from etude.errors import ConfigError


def default_cache_dir() -> Path:
    """`$ETUDE_CACHE`, else `etude` in `$XDG_CACHE_HOME` or `~/.cache`.

    A relative path in either is ignored, as the XDG specification demands: the folder would be another one everywhere.
    """
    own, users = (Path(os.environ.get(name, "")) for name in ("ETUDE_CACHE", "XDG_CACHE_HOME"))
    if own.is_absolute():
        return own
    return (users if users.is_absolute() else Path.home() / ".cache") / "etude"


def private_folder(path: Path) -> Path:
    """The folder, made where it is missing, and open to its owner only: others could put files of theirs into it.

    Raises:
        OSError: it cannot be made.
        ConfigError: it belongs to another user.
    """
    path.mkdir(parents=True, exist_ok=True, mode=0o700)
    if hasattr(os, "getuid") and path.stat().st_uid != os.getuid():
        raise ConfigError(f"{path} belongs to another user; give a folder of your own", field="cache_dir")
    path.chmod(0o700)
    return path
