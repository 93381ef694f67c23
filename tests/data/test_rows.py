"""Files -> rows: forty broken or odd files, each refused (or read) with the file, the line, the field and why."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from etude.data import read_rows, readers
from etude.errors import ConfigError, DataError

GOOD = '{"prompt": "2+2?", "completion": "4"}\n'
GOOD_BYTES = GOOD.encode()


def second(line: str) -> bytes:
    """A file of three rows whose second is `line`."""
    return (GOOD + line + "\n" + GOOD).encode()


def pair(completion: str) -> str:
    """A row whose completion is the given JSON value."""
    return f'{{"prompt": "q", "completion": {completion}}}'


# (case, file name, content, line, field, part of the message that says what was expected or found)
BAD_FILES: list[tuple[str, str, bytes, int | None, str | None, str]] = [
    ("bad first line", "t.jsonl", b"{oops}\n" + GOOD_BYTES, 1, None, "expected JSON"),
    ("bad middle line", "t.jsonl", second('{"prompt": "q", "completion": }'), 2, "completion", "expected JSON"),
    ("two rows in a line", "t.jsonl", second(GOOD.strip() + GOOD.strip()), 2, None, "one JSON object per line"),
    ("truncated", "t.jsonl", (GOOD + '{"prompt": "q", "comple').encode(), 2, "prompt", "cut off"),
    ("null", "t.jsonl", second(pair("null")), 2, "completion", "expected string, got null"),
    ("missing field", "t.jsonl", second('{"prompt": "q"}'), 2, "completion", "the field is missing"),
    ("number", "t.jsonl", second(pair("4")), 2, "completion", "expected string, got number"),
    ("boolean", "t.jsonl", second(pair("true")), 2, "completion", "expected string, got boolean"),
    ("list", "t.jsonl", second(pair('["4"]')), 2, "completion", "expected string, got list"),
    ("no object", "t.jsonl", second('"hello"'), 2, None, "expected object"),
    ("wrong type late", "t.jsonl", GOOD_BYTES * 20_000 + pair("{}").encode(), 20_001, "completion", "got object"),
    ("empty string", "t.jsonl", second(pair('""')), 2, "completion", "got an empty string"),
    ("duplicate key", "t.jsonl", second('{"prompt": "a", "prompt": "b", "completion": "c"}'), 2, "prompt", "once"),
    ("NaN", "t.jsonl", second(pair("NaN")), 2, "completion", "got NaN"),
    ("Infinity in another field", "t.jsonl", second(GOOD.strip()[:-1] + ', "weight": 1e999}'), 2, "weight", "got 1e999"),
    ("UTF-16 with mark", "t.jsonl", GOOD.encode("utf-16"), 1, None, "expected UTF-8, got UTF-16"),
    ("UTF-16 without mark", "t.jsonl", GOOD.encode("utf-16-le"), 1, None, "NUL byte at column 2"),
    ("Latin-1", "t.jsonl", second(pair('"é"')).replace(b"\xc3\xa9", b"\xe9"), 2, "completion", "byte 0xe9 at column 32"),
    ("raw NUL", "t.jsonl", second(pair('"a\0"')), 2, "completion", "NUL byte"),
    ("escaped NUL", "t.jsonl", second(pair(r'"a\u0000"')), 2, "completion", "NUL character"),
    ("lone surrogate", "t.jsonl", second(pair(r'"\ud83d"')), 2, "completion", "lone surrogate"),
    ("deep nesting", "t.jsonl", second(pair("[" * 100_000)), 2, None, "nested too deeply"),
    ("number of 5000 digits", "t.jsonl", second(pair("1" * 5000)), 2, None, "expected JSON"),
    ("empty file", "t.jsonl", b"", None, None, "the file is empty"),
    ("only newlines", "t.jsonl", b"\n\r\n\n", None, None, "the file has none"),
    ("only a byte order mark", "t.json", b"\xef\xbb\xbf", None, None, "the file has none"),
    ("unknown fields", "t.jsonl", b'{"question": "a", "answer": "b"}\n', 1, None, "got question, answer"),
    ("mixed formats", "t.jsonl", second('{"instruction": "a", "output": "b"}'), 2, "prompt", "got format 'alpaca'"),
    ("list in .jsonl", "t.jsonl", b'[{"text": "a"}]', 1, None, "must be named .json"),
    ("no assistant", "t.jsonl", b'{"messages": [{"role": "user", "content": "a"}]}', 1, "messages", "'assistant'"),
    ("no content", "t.jsonl", b'{"messages": [{"role": "assistant"}]}', 1, "messages[0].content", "is missing"),
    ("null content", "t.jsonl", b'{"messages": [{"role": "assistant", "content": null}]}', 1, "messages[0].content", "null"),
    ("who is bot?", "t.jsonl", b'{"conversations": [{"from": "bot", "value": "a"}]}', 1, "conversations[0].from", "got 'bot'"),
    ("no turns", "t.jsonl", b'{"conversations": []}', 1, "conversations", "got an empty list"),
    ("array cut off", "t.json", b'[\n{"text": "a"},\n{"text": "b', 3, None, "cut off"),
    ("array without comma", "t.json", b'[\n{"text": "a"}\n{"text": "b"}]', 3, None, "expected ',' or ']'"),
    ("array item", "t.json", b'[\n{"text": "a"},\n\n{"text": null}]', 4, "text", "got null"),
    ("array and more", "t.json", b'[{"text": "a"}]\nx', 2, None, "expected the end of the file"),
    ("empty array", "t.json", b"[\n]", None, None, "the file has none"),
    ("short CSV row", "t.csv", b"prompt,completion\na,b\nc\n", 3, "completion", "expected 2 cells, got 1"),
    ("long CSV row", "t.csv", b"prompt,completion\na,b,c\n", 2, None, "expected 2 cells, got 3"),
    ("CSV after a broken line", "t.csv", b'prompt,completion\n"a\nb",c\nd,\n', 4, "completion", "empty string"),
    ("CSV quote", "t.csv", b'prompt,completion\n"a"b,c\n', 2, None, "expected CSV"),
    ("CSV in Latin-1", "t.csv", b"prompt,completion\na,caf\xe9\n", 2, "completion", "byte 0xe9 at column 4"),
    ("CSV columns twice", "t.csv", b"text,text\na,b\n", 1, None, "every column once"),
    ("gzip by name", "t.jsonl.gz", gzip.compress(GOOD_BYTES), None, None, "uncompressed"),
    ("gzip bomb in disguise", "t.jsonl", gzip.compress(bytes(10**7)), None, None, "got gzip data"),
    ("no Parquet", "t.parquet", b"PAR1 something else PAR1", 1, None, "damaged"),
    ("unknown kind", "t.docx", b"text", None, None, "expected a file named .jsonl"),
]  # fmt: skip


def refusal(path: Path, **options: Any) -> DataError:
    """The error that reading `path` ends in; its message must start with the file."""
    with pytest.raises(DataError) as caught:
        read_rows(path, **options)
    assert str(caught.value).startswith(str(path))
    assert caught.value.file == str(path)
    return caught.value


@pytest.mark.parametrize(("name", "content", "line", "field", "said"), [case[1:] for case in BAD_FILES], ids=[case[0] for case in BAD_FILES])  # fmt: skip
def test_bad_file_is_refused_by_file_line_and_field(
    tmp_path: Path, name: str, content: bytes, line: int | None, field: str | None, said: str
) -> None:
    (tmp_path / name).write_bytes(content)
    error = refusal(tmp_path / name)
    assert (error.line, error.field) == (line, field)
    assert said in str(error)
    assert (line is None) or f":{line}" in str(error)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("t.jsonl", b"\xef\xbb\xbf" + GOOD_BYTES, [1]),
        ("t.jsonl", GOOD.replace("\n", "\r\n").encode() * 2, [1, 2]),
        ("t.jsonl", b"\n\n" + GOOD_BYTES + b"\n" + GOOD_BYTES.strip(), [3, 5]),
        ("t.json", b"[\n" + GOOD_BYTES + b",\n\n" + GOOD_BYTES + b"]\n", [2, 5]),
        ("t.json", GOOD_BYTES * 2, [1, 2]),
        ("t.csv", b'prompt,completion\r\n"a\r\nb",c\r\n\r\nd,e\r\n', [2, 5]),
    ],
    ids=["byte order mark", "CRLF", "blank lines", "array", "lines in .json", "CSV with a line break"],
)
def test_odd_but_sound_file_is_read_with_its_lines(
    tmp_path: Path, name: str, content: bytes, expected: list[int]
) -> None:
    (tmp_path / name).write_bytes(content)
    rows = read_rows(tmp_path / name)
    assert [rows.origin(index) for index in range(len(rows))] == [(str(tmp_path / name), line) for line in expected]
    assert rows.format == "prompt_completion"


@pytest.mark.parametrize(
    ("row", "format"),
    [
        ({"instruction": "a", "output": "b", "input": None, "text": "all of it"}, "alpaca"),
        ({"prompt": "a", "completion": "b"}, "prompt_completion"),
        ({"messages": [{"role": "system", "content": ""}, {"role": "assistant", "content": "b"}]}, "messages"),
        ({"messages": [{"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}]}, "messages"),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, "sharegpt"),
        ({"text": "a"}, "text"),
    ],
)
def test_format_is_found_by_the_fields_and_said(row: dict[str, Any], format: str) -> None:
    rows = read_rows([row])
    assert rows.format == format
    assert f"'{format}'" in rows.describe()
    assert rows[0] == row and rows.origin(0) == ("rows", 1)


def test_line_of_60_mib_is_read_and_a_longer_one_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(GOOD + pair('"' + "a" * (60 * 2**20) + '"'))
    assert len(read_rows(path)[1]["completion"]) == 60 * 2**20
    monkeypatch.setattr(readers, "MAX_LINE_BYTES", 2**20)
    error = refusal(path)
    assert error.line == 2 and "at most 1 MiB" in str(error)


def test_named_pipe_directory_and_missing_file_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    assert "named pipe" in str(refusal(tmp_path / "pipe.jsonl"))
    (tmp_path / "folder.jsonl").mkdir()
    assert "expected a folder with .jsonl" in str(refusal(tmp_path / "folder.jsonl"))
    (tmp_path / "train.jsonl").write_text(GOOD)
    assert "did you mean train.jsonl?" in str(refusal(tmp_path / "trian.jsonl"))
    assert "did you mean" not in str(refusal(tmp_path / "nowhere" / "t.jsonl"))


def test_file_that_vanishes_after_the_folder_was_listed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text(GOOD)
    sound = readers.READERS[".jsonl"]

    def read_and_remove_next(path: Path) -> Any:
        yield from sound(path)
        (tmp_path / "b.jsonl").unlink(missing_ok=True)

    monkeypatch.setitem(readers.READERS, ".jsonl", read_and_remove_next)
    with pytest.raises(DataError, match=r"b\.jsonl: expected a file, there is none"):
        read_rows(tmp_path)


@pytest.mark.parametrize("name", ["t.jsonl", "t.csv"])
def test_file_that_grows_while_it_is_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    path = tmp_path / name
    path.write_text(GOOD * 3 if name == "t.jsonl" else "prompt,completion\na,b\n")
    reader = readers.READERS[path.suffix]

    def read_and_append(path: Path) -> Any:
        for record in reader(path):
            with path.open("a") as stream:
                stream.write(GOOD)
            yield record

    monkeypatch.setitem(readers.READERS, path.suffix, read_and_append)
    assert "it changed while it was read" in str(refusal(path))


def test_folder_is_read_in_the_order_of_its_names_and_other_files_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "b.jsonl").write_text(GOOD)
    (tmp_path / "a.csv").write_text("prompt,completion\nfirst,row\n")
    (tmp_path / "README.md").write_text("# data")
    (tmp_path / ".hidden.jsonl").write_text("no data")
    rows = read_rows(tmp_path)
    assert [Path(rows.origin(index)[0]).name for index in range(len(rows))] == ["a.csv", "b.jsonl"]
    assert rows.describe().startswith("2 rows from 2 files")
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(GOOD_BYTES))
    with pytest.raises(DataError, match=r"c\.jsonl\.gz: expected an uncompressed file"):
        read_rows(tmp_path)


def test_list_of_files_has_one_format(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(GOOD)
    (tmp_path / "b.jsonl").write_text('{"text": "b"}')
    with pytest.raises(DataError, match=r"b\.jsonl:1 .*expected format 'prompt_completion'.*got format 'text'"):
        read_rows([tmp_path / "a.jsonl", str(tmp_path / "b.jsonl")])


def test_skipping_collects_every_bad_row_and_keeps_the_others(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_bytes(b"{oops\n" + GOOD_BYTES + pair("null").encode() + b"\n" + b"\xe9\n" + GOOD_BYTES)
    rows = read_rows(path, on_bad_row="skip")
    assert [rows.origin(index)[1] for index in range(len(rows))] == [2, 5]
    assert [(error.line, error.field) for error in rows.rejected] == [(1, None), (3, "completion"), (4, None)]
    assert "3 bad rows skipped" in rows.describe()


def test_nothing_left_after_skipping_is_an_error_that_shows_the_first(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text(pair("null") + "\n" + pair("1"))
    with pytest.raises(DataError, match=r"all 2 were skipped; the first: .*t\.jsonl:1 field 'completion'"):
        read_rows(tmp_path / "t.jsonl", on_bad_row="skip")


def test_parquet_rows_are_read_checked_and_numbered(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"prompt": ["a", "b", "c"], "completion": ["x", "y", None]}), path)
    error = refusal(path)
    assert (error.line, error.field) == (3, "completion") and "got null" in str(error)
    assert read_rows(path, on_bad_row="skip")[1] == {"prompt": "b", "completion": "y"}


def test_every_bit_flip_in_a_parquet_page_is_found(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    table = pa.table({"text": [f"row number {number} of the table" for number in range(40)]})
    pq.write_table(table, path, compression="none", use_dictionary=False, write_page_checksum=True)
    sound = path.read_bytes()
    place = sound.index(b"row number 7")
    for bit in range(8):
        flipped = bytearray(sound)
        flipped[place] ^= 1 << bit
        path.write_bytes(flipped)
        assert "damaged" in str(refusal(path))


def test_settings_that_do_not_exist_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="on_bad_row: expected 'stop' or 'skip', got 'drop'"):
        read_rows(tmp_path, on_bad_row="drop")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="did you mean 'sharegpt'"):
        read_rows(tmp_path, format="shargpt")
    with pytest.raises(DataError, match="empty list"):
        read_rows([])


def test_given_format_is_required_of_every_row() -> None:
    rows = [{"text": "a", "prompt": "b", "completion": "c"}]
    assert read_rows(rows).format == "prompt_completion"
    assert read_rows(rows, format="text").format == "text"
    with pytest.raises(DataError, match="rows:1 field 'messages'"):
        read_rows(rows, format="messages")


def test_a_slice_keeps_the_origins(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"text": str(number)}) + "\n" for number in range(10)))
    rows = read_rows(tmp_path / "t.jsonl")
    part = rows[3:9:2]
    assert [row["text"] for row in part] == ["3", "5", "7"]
    assert [part.origin(index)[1] for index in range(3)] == [4, 6, 8]
