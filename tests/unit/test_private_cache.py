"""Where the cache lies, and who may look into it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from etude.errors import ConfigError
from etude.private_cache import default_cache_dir, private_folder


def test_the_cache_lies_where_the_user_keeps_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ETUDE_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / "etude"
    for ignored in ("relative/cache", ""):
        monkeypatch.setenv("XDG_CACHE_HOME", ignored)
        assert default_cache_dir() == Path.home() / ".cache" / "etude"


def test_a_folder_for_etude_alone_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("ETUDE_CACHE", str(tmp_path / "own"))
    assert default_cache_dir() == tmp_path / "own"
    monkeypatch.setenv("ETUDE_CACHE", "relative")
    assert default_cache_dir() == tmp_path / "xdg" / "etude"


def test_an_open_folder_is_closed(tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir(mode=0o755)
    assert private_folder(tmp_path / "cache").stat().st_mode & 0o777 == 0o700


def test_the_folder_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.getuid", lambda: 12345)
    with pytest.raises(ConfigError, match="belongs to another user"):
        private_folder(tmp_path)


def test_without_a_home_a_folder_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ETUDE_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # as where nothing is known of the user
    with pytest.raises(ConfigError, match="set ETUDE_CACHE"):
        default_cache_dir()


def test_a_folder_of_all_users_is_left_open(tmp_path: Path) -> None:
    shared = tmp_path / "tmp"
    shared.mkdir()
    shared.chmod(0o1777)
    with pytest.raises(ConfigError, match="is shared by all users"):
        private_folder(shared)
    assert shared.stat().st_mode & 0o7777 == 0o1777


def test_a_link_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own").mkdir(mode=0o755)
    (tmp_path / "cache").symlink_to(tmp_path / "own")
    assert private_folder(tmp_path / "cache").stat().st_mode & 0o777 == 0o700  # a link of one's own is fine
    (tmp_path / "own").chmod(0o755)
    lstat = Path.lstat

    def planted(path: Path) -> os.stat_result:
        values = list(lstat(path))
        values[4] = os.getuid() + 1
        return os.stat_result(values)

    monkeypatch.setattr(Path, "lstat", planted)
    with pytest.raises(ConfigError, match="belongs to another user"):
        private_folder(tmp_path / "cache")
    assert (tmp_path / "own").stat().st_mode & 0o777 == 0o755


def test_a_closed_folder_on_a_disk_that_is_only_read_is_fine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(path: Path, mode: int) -> None:
        raise OSError(30, "Read-only file system")

    (tmp_path / "cache").mkdir(mode=0o700)
    monkeypatch.setattr(Path, "chmod", refused)
    assert private_folder(tmp_path / "cache") == tmp_path / "cache"
