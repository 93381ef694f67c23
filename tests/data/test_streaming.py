"""Rows that are read while training, and data sets of the Hub: the same rows as ever, and every position found again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from datasets.exceptions import DatasetNotFoundError

from etude.data import encode_rows, read_rows
from etude.data.hub import HubSource, parse, read_hub_rows
from etude.data.rows import format_of
from etude.data.streaming import StreamedRows
from etude.errors import ConfigError, DataError
from tiny import tiny_tokenizer

Row = dict[str, list[int]]


def write(name: str, numbers: range, bad: tuple[int, ...] = ()) -> Path:
    rows = [{"prompt": f"w{n % 50} w{n // 50}", "completion": f" w{n % 7}"} for n in numbers]
    lines = ["{broken" if n in bad else json.dumps(row) for n, row in zip(numbers, rows, strict=True)]
    Path(name).write_text("".join(f"{line}\n" for line in lines))
    return Path(name)


@pytest.fixture
def files() -> list[str]:
    """Three files, more rows than are tokenized together."""
    return [str(write(name, numbers)) for name, numbers in (("a.jsonl", range(70)), ("b.jsonl", range(70, 75)), ("c.jsonl", range(75, 150)))]  # fmt: skip


def stream(sources: list[str], **settings: Any) -> StreamedRows:
    return StreamedRows(sources, tiny_tokenizer(), **settings)


def test_a_stream_has_the_rows_of_the_whole(files: list[str]) -> None:
    whole = encode_rows(read_rows(files), tiny_tokenizer())
    streamed = stream(files)
    assert list(streamed) == [whole[index] for index in range(150)]
    assert list(streamed) == [whole[index] for index in range(150)]  # it begins anew
    assert streamed.source == "3 files, format 'prompt_completion'"
    assert streamed.first_rows(2) == [read_rows(files)[0], read_rows(files)[1]]


@pytest.mark.parametrize("taken", [0, 1, 63, 64, 65, 70, 73, 75, 149, 150])
def test_every_position_is_found_again(files: list[str], taken: int) -> None:
    whole = list(stream(files))
    first = stream(files)
    reading = iter(first)
    assert [next(reading) for _ in range(taken)] == whole[:taken]
    state = json.loads(json.dumps(first.state_dict()))

    second = stream(files)
    second.load_state_dict(state)
    assert list(second) == whole[taken:]
    assert list(second) == whole  # the position was that of one epoch


def test_resuming_a_resumed_stream(files: list[str]) -> None:
    whole, found, state = list(stream(files)), [], stream(files).state_dict()
    for _ in range(10):
        part = stream(files)
        part.load_state_dict(state)
        found += [row for _, row in zip(range(15), part, strict=False)]
        state = part.state_dict()
    assert len(found) == 150
    assert found == whole


def test_a_bad_row_stops_the_stream_where_it_stands_or_is_skipped() -> None:
    file = str(write("bad.jsonl", range(80), bad=(70,)))
    reading: Iterator[Row] = iter(stream([file]))
    assert len([next(reading) for _ in range(70)]) == 70  # those before it in its chunk as well
    with pytest.raises(DataError, match=r"bad.jsonl:71"):
        next(reading)

    lenient = stream([file], on_bad_row="skip")
    assert len(list(lenient)) == 79
    assert [error.line for error in lenient.rejected] == [71]
    assert lenient.state_dict() == {"file": 0, "records": 80}


def test_a_stream_without_known_rows_is_refused() -> None:
    Path("x.jsonl").write_text('{"a": 1}\n')
    with pytest.raises(DataError, match="expected rows of a known format, found none"):
        stream(["x.jsonl"])
    with pytest.raises(DataError, match="there is none"):
        stream(["none.jsonl"])


# ---------------------------------------------------------------- the Hub


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("hub:a/b", ("a/b", None, "train", None)),
        ("hub:squad", ("squad", None, "train", None)),
        ("hub:a/b:test", ("a/b", None, "test", None)),
        ("hub:a/b:train[:10%]", ("a/b", None, "train[:10%]", None)),
        ("hub:a/b-c.d/main:test@refs/pr/1", ("a/b-c.d", "main", "test", "refs/pr/1")),
        ("hub:a/b@0123abc", ("a/b", None, "train", "0123abc")),
    ],
)
def test_names_on_the_hub(name: str, source: tuple[Any, ...]) -> None:
    assert parse(name) == HubSource(*source)


@pytest.mark.parametrize("name", ["hub:", "hub:/a", "hub:a/b/c/d", "hub:a b", "hub:../etc", "hub:a/b:"])
def test_names_that_are_none(name: str) -> None:
    with pytest.raises(ConfigError, match="expected hub:OWNER/NAME"):
        parse(name)


def test_a_folder_here_is_not_taken_for_a_data_set_there() -> None:
    Path("a/b").mkdir(parents=True)
    with pytest.raises(ConfigError, match="a/b is a folder here; to read that, leave out hub:"):
        next(read_hub_rows("hub:a/b"))


class Hub:
    """Stands in for `datasets.load_dataset`: one data set, and what was asked of it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: Exception | None = None) -> None:
        self.asked: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self.error = error
        monkeypatch.setattr("datasets.load_dataset", self.load)

    def load(self, *args: Any, **options: Any) -> Any:
        self.asked.append((args, options))
        if self.error is not None:
            raise self.error
        data = Dataset.from_list([{"prompt": f"w{n}", "completion": f" w{n + 1}"} for n in range(5)])
        return data.to_iterable_dataset() if options["streaming"] else data


def test_rows_of_the_hub_are_rows_like_others(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(monkeypatch)
    rows = read_rows("hub:a/b/main:test@v1")
    assert hub.asked == [(("a/b", "main"), {"split": "test", "revision": "v1", "streaming": False})]
    assert (len(rows), rows.format, rows.origin(4)) == (5, "prompt_completion", ("hub:a/b/main:test@v1", 5))
    assert rows.describe().startswith("5 rows from hub:a/b/main:test@v1, format 'prompt_completion'")
    write("a.jsonl", range(2))
    assert len(read_rows(["a.jsonl", "hub:a/b"])) == 7

    assert format_of("hub:a/b", streaming=True) == "prompt_completion"
    assert hub.asked[-1][1]["streaming"] is True  # one row is fetched, not the data set


def test_the_hub_is_streamed_and_entered_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(monkeypatch)
    whole = list(stream(["hub:a/b"]))
    assert len(whole) == 5 and all(options["streaming"] for _, options in hub.asked)
    part = stream(["hub:a/b"])
    part.load_state_dict({"file": 0, "records": 3})
    assert list(part) == whole[3:]
    assert [number for number, _ in read_hub_rows("hub:a/b", streaming=True, skip=3)] == [4, 5]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ConnectionError("no route\nmore"), "the Hub cannot be reached.*give their folder as data: no route$"),
        (DatasetNotFoundError("a/b does not exist"), "there is no such data set on the Hub, or it needs a login"),
        (ValueError("Unknown split 'tset'"), "cannot be read: Unknown split 'tset'"),
        (RuntimeError(), "cannot be read: RuntimeError"),
    ],
)
def test_what_keeps_the_hub_away_is_said(error: Exception, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    Hub(monkeypatch, error)
    with pytest.raises(DataError, match=rf"hub:a/b: .*{message}"):
        read_rows("hub:a/b")
