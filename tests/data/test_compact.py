"""Many rows in little memory: what goes in comes out, from memory and from a file."""

from __future__ import annotations

import datetime
import gc
import os
import pickle
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from etude.data import compact
from etude.data.compact import FileNumbers, JsonRows, Spool
from etude.data.rows import read_rows, split_by_hash

ROWS = [{"text": "é" * number, "more": [number, None, 0.1, {"a": True}]} for number in range(50)]


@pytest.mark.parametrize("max_memory_bytes", [10**6, 100, 0])
def test_bytes_are_read_where_they_were_written(max_memory_bytes: int) -> None:
    spool = Spool(max_memory_bytes)
    content = bytes(range(256)) * 3
    for start in range(0, len(content), 7):
        spool.write(content[start : start + 7])
        assert len(spool) == min(start + 7, len(content))
    for start, end in [(0, 0), (0, 768), (5, 6), (90, 110), (700, 768)]:
        assert spool.read(start, end) == content[start:end]
    assert np.asarray(spool.as_numbers("|u1")).tobytes() == content


@pytest.mark.parametrize("max_memory_bytes", [10**6, 0])
def test_rows_come_back(max_memory_bytes: int) -> None:
    rows = JsonRows(max_memory_bytes)
    dated = {"text": "x", "day": datetime.date(2026, 1, 2)}
    for row in [*ROWS, dated]:
        rows.append(row)
    assert list(rows) == [*ROWS, dated] and len(rows) == 51
    assert rows[-1] is dated and rows[3:5] == ROWS[3:5]
    with pytest.raises(IndexError, match="row 51 of 51"):
        rows[51]
    with pytest.raises(TypeError):
        rows.as_json(50)


def test_their_file_has_no_name(cache_of_its_own: Path) -> None:
    spool = Spool(0)
    spool.write(b"secret")
    assert spool.read(0, 6) == b"secret"
    assert [path for path in cache_of_its_own.rglob("*") if path.is_file()] == []


def test_without_a_cache_the_file_lies_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ETUDE_CACHE", str(tmp_path / "file" / "cache"))
    spool = Spool(0)
    spool.write(b"content")
    assert spool.read(0, 7) == b"content"


@pytest.mark.parametrize("room", [0, 5, 1000])
def test_what_a_full_disk_does_not_take_stays_in_memory(
    room: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pwrite, free = os.pwrite, [room]

    def limited(descriptor: int, content: bytearray, place: int) -> int:
        if not free[0]:
            raise OSError(28, "No space left on device")
        written = pwrite(descriptor, content[: free[0]], place)
        free[0] -= written
        return written

    monkeypatch.setattr("os.pwrite", limited)
    compact._say_once.cache_clear()
    content = np.arange(1000, dtype="<i4").tobytes()
    spools = [Spool(100), Spool(100)]
    for spool in spools:
        for start in range(0, 4000, 40):
            spool.write(content[start : start + 40])
        assert spool.read(3, 3990) == content[3:3990] and len(spool) == 4000
        assert np.asarray(spool.as_numbers("<i4")).tolist() == list(range(1000))
    assert caplog.text.count("No space left on device") == 1


def test_where_the_cache_is_only_read_the_file_lies_elsewhere(
    cache_of_its_own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, folders = tempfile.TemporaryFile, []

    def only_elsewhere(*, dir: Path | None = None, prefix: str) -> Any:
        folders.append(dir)
        if dir is not None:
            raise OSError(30, "Read-only file system")
        return make(prefix=prefix)

    monkeypatch.setattr("tempfile.TemporaryFile", only_elsewhere)
    spool = Spool(0)
    spool.write(b"content")
    assert spool.read(0, 7) == b"content" and folders == [cache_of_its_own, None]


def test_parts_of_a_set_share_its_rows(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(f'{{"text": "row {number}"}}\n' for number in range(200)))
    rows = read_rows(file)
    train, held_out = split_by_hash(rows, 0.3)
    assert len(train) + len(held_out) == 200 and 30 < len(held_out) < 90
    assert train._rows is rows._rows
    for part in (train, held_out):
        assert all(row["text"] == f"row {part.origin(index)[1] - 1}" for index, row in enumerate(part))
    backwards = held_out.subset(range(len(held_out) - 1, -1, -1))
    assert [row["text"] for row in backwards] == [row["text"] for row in held_out][::-1]
    assert backwards.as_json(range(1)) == b"[" + rows._rows.as_json(backwards.origin(0)[1] - 1) + b"]"  # type: ignore[union-attr]


def test_numbers_in_a_file_are_read_from_there() -> None:
    spool, expected = Spool(0), np.arange(1000, dtype="<i4")
    spool.write(expected.tobytes())
    numbers = spool.as_numbers("<i4")
    assert isinstance(numbers, FileNumbers) and len(numbers) == 1000 and numbers.nbytes == 4000
    for part in (
        slice(None),
        slice(10, 20),
        slice(990, 2000),
        slice(5, 5),
        slice(7, 3),
        slice(0, 50, 7),
        slice(9, 2, -1),
    ):
        assert numbers[part].tolist() == expected[part].tolist()
    assert numbers[3] == 3 and numbers[-1] == 999
    with pytest.raises(IndexError):
        numbers[1000]
    assert np.asarray(numbers).tolist() == pickle.loads(pickle.dumps(numbers)).tolist() == list(range(1000))


def test_numbers_stay_readable_after_their_spool() -> None:
    spool = Spool(0)
    spool.write(np.arange(10, dtype="<i4").tobytes())
    numbers = spool.as_numbers("<i4")
    del spool
    gc.collect()
    assert numbers[2:5].tolist() == [2, 3, 4]
