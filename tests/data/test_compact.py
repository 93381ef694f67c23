"""Many rows in little memory: what goes in comes out, from memory and from a file."""

from __future__ import annotations

import datetime
from pathlib import Path

import numpy as np
import pytest

from etude.data.compact import JsonRows, Spool, give_pages_back
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
    assert spool.as_array("|u1").tobytes() == content


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


def test_numbers_in_a_file_are_mapped() -> None:
    spool = Spool(0)
    spool.write(np.arange(1000, dtype="<i4").tobytes())
    assert isinstance(spool.as_array("<i4").base, np.memmap)
    assert spool.as_array("<i4").tolist() == list(range(1000))


def test_pages_that_are_given_back_are_read_again() -> None:
    spool = Spool(0)
    spool.write(np.arange(100_000, dtype="<i4").tobytes())
    numbers = spool.as_array("<i4")
    part = numbers[10:20]
    give_pages_back(part)
    assert part.tolist() == list(range(10, 20)) and int(numbers.sum()) == sum(range(100_000))
    give_pages_back(np.arange(3))  # of no file
