"""Tokens that are kept: found by content, checked before they are used, never in the way."""

from __future__ import annotations

import datetime
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from etude.data import RowSet, TokenizedRows, encode_rows, kept_tokens, read_rows
from etude.data import cache as token_cache
from etude.data.cache import COLUMNS, MANIFEST, TokenCache, digest_of, fingerprint_of, stamp_of
from etude.data.compact import FileNumbers
from etude.data.kept_tokens import encode_rows_once, token_cache_dir

ROWS = [{"prompt": f"Say {number}", "completion": f" hello {number % 7}"} for number in range(40)]


@pytest.fixture(autouse=True)
def everything_is_worth_keeping(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_tokens, "WORTH_KEEPING_SECONDS", 0.0)


@pytest.fixture
def tokenized(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of rows of every time that rows were tokenized and not found."""
    calls: list[int] = []

    def counted(rows: RowSet, *args: Any, **options: Any) -> TokenizedRows:
        calls.append(len(rows))
        return encode_rows(rows, *args, **options)

    monkeypatch.setattr(kept_tokens, "encode_rows", counted)
    return calls


def once(tokenizer: Any, rows: list[dict[str, Any]] = ROWS, **options: Any) -> TokenizedRows:
    return encode_rows_once(read_rows(rows), tokenizer, **{"max_length": 16, "on_bad_row": "skip"} | options)


def entry() -> Path:
    [found] = [path for path in token_cache_dir().iterdir() if not path.name.startswith(".")]
    return found


def assert_equal(one: TokenizedRows, other: TokenizedRows) -> None:
    assert one.statistics == other.statistics and one.source == other.source
    assert [one.origin(i) for i in range(len(one))] == [other.origin(i) for i in range(len(other))]
    assert list(one) == list(other)
    assert [(str(e), e.file, e.line, e.field) for e in one.rejected] == [
        (str(e), e.file, e.line, e.field) for e in other.rejected
    ]


def test_the_second_time_nothing_is_tokenized(tokenizer: PreTrainedTokenizerFast, tokenized: list[int]) -> None:
    rows = [*ROWS, {"prompt": "long " * 30, "completion": "no"}]
    first, second = once(tokenizer, rows), once(tokenizer, rows)
    assert tokenized == [41]
    assert len(first.rejected) == 1 and first.statistics.samples == 40
    assert_equal(first, second)


def test_tokens_that_were_kept_stay_in_their_files(tokenizer: PreTrainedTokenizerFast) -> None:
    once(tokenizer)
    for column in once(tokenizer).columns.values():
        assert isinstance(column, FileNumbers)


def test_only_the_user_may_look_at_them(tokenizer: PreTrainedTokenizerFast) -> None:
    once(tokenizer)
    assert token_cache_dir().stat().st_mode & 0o777 == 0o700
    assert entry().stat().st_mode & 0o777 == 0o700


def other_core(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    described["model"]["merges"] = described["model"]["merges"][:-3]
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(described)), bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


def templated(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}</s>{% endfor %}"
    return tokenizer


@pytest.mark.parametrize(
    ("changed", "options"),
    [
        (lambda tokenizer: tokenizer, {"max_length": 12}),
        (lambda tokenizer: tokenizer, {"train_on": "all"}),
        (lambda tokenizer: tokenizer, {"on_bad_row": "stop"}),
        (lambda tokenizer: tokenizer, {"template": "{% for m in messages %}{{ m.content }}{% endfor %}"}),
        (other_core, {}),
        (templated, {}),
    ],
)
def test_whatever_decides_about_tokens_is_part_of_the_key(
    changed: Callable[[Any], Any],
    options: dict[str, Any],
    tokenizer: PreTrainedTokenizerFast,
    tokenized: list[int],
) -> None:
    once(tokenizer)
    again = changed(tokenizer)
    assert_equal(once(again, **options), encode_rows(read_rows(ROWS), again, **{"max_length": 16} | options))
    assert tokenized == [40, 40]


def test_a_state_that_every_call_sets_anew_is_none_of_them(
    tokenizer: PreTrainedTokenizerFast, tokenized: list[int]
) -> None:
    for _ in range(2):  # as a tokenizer.json may have it, or a call of the script's
        tokenizer.backend_tokenizer.enable_truncation(3)
        tokenizer.backend_tokenizer.enable_padding()
        assert len(once(tokenizer)[0]["input_ids"]) > 3
    assert tokenized == [40]


def test_a_template_that_writes_the_date_is_kept_for_a_day(
    tokenizer: PreTrainedTokenizerFast, tokenized: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Tomorrow(datetime.date):
        @classmethod
        def today(cls) -> Tomorrow:
            return cls(2999, 12, 31)

    dated = "{{ strftime_now('%d %b %Y') }}{% for m in messages %}{{ m.content }}</s>{% endfor %}"
    for template in (dated, None):
        once(tokenizer, template=template)
        once(tokenizer, template=template)
    assert tokenized == [40, 40]
    monkeypatch.setattr(kept_tokens, "date", Tomorrow)
    for template in (dated, None):
        once(tokenizer, template=template)
    assert tokenized == [40, 40, 40]


def test_a_token_that_is_added_in_place_is_another_tokenizer(
    tokenizer: PreTrainedTokenizerFast, tokenized: list[int]
) -> None:
    once(tokenizer)
    tokenizer.add_tokens(["hello"])
    assert_equal(once(tokenizer), encode_rows(read_rows(ROWS), tokenizer, max_length=16))
    tokenizer.eos_token = "<|end|>"
    assert_equal(once(tokenizer), encode_rows(read_rows(ROWS), tokenizer, max_length=16))
    assert tokenized == [40, 40, 40]


def test_one_process_of_a_machine_keeps_them(
    tokenizer: PreTrainedTokenizerFast, tokenized: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    once(tokenizer)
    assert list(token_cache_dir().iterdir()) == []
    monkeypatch.setenv("LOCAL_RANK", "0")
    once(tokenizer)
    monkeypatch.setenv("LOCAL_RANK", "1")
    once(tokenizer)
    assert tokenized == [40, 40]


def test_one_changed_row_is_other_data(tokenizer: PreTrainedTokenizerFast, tokenized: list[int]) -> None:
    once(tokenizer)
    once(tokenizer, [*ROWS[:-1], ROWS[-1] | {"completion": " hello!"}])
    once(tokenizer, ROWS[1:])
    assert tokenized == [40, 40, 39]


@pytest.mark.parametrize("name", [MANIFEST, *(f"rows.{column}" for column in COLUMNS)])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "link", "folder"])
def test_a_damaged_entry_is_made_again(
    name: str, damage: str, tokenizer: PreTrainedTokenizerFast, tokenized: list[int], tmp_path: Path
) -> None:
    first = once(tokenizer)
    file = entry() / name
    content = file.read_bytes()
    file.unlink()
    if damage == "flip":
        place = len(content) // 2
        file.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    elif damage == "cut":
        file.write_bytes(content[:-1])
    elif damage == "link":  # to the same content, which somebody else may change later
        (tmp_path / "elsewhere").write_bytes(content)
        file.symlink_to(tmp_path / "elsewhere")
    elif damage == "folder":
        file.mkdir()
    assert_equal(once(tokenizer), first)
    assert_equal(once(tokenizer), first)
    assert tokenized == [40, 40]


@pytest.mark.parametrize("kind", ["file", "link", "dangling"])
def test_what_is_no_entry_makes_room_for_one(
    kind: str, tokenizer: PreTrainedTokenizerFast, tokenized: list[int], tmp_path: Path
) -> None:
    first = once(tokenizer)
    folder = entry()
    shutil.rmtree(folder)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "kept").write_text("mine")
    if kind == "file":
        folder.write_text("")
    else:
        folder.symlink_to(tmp_path / ("elsewhere" if kind == "link" else "missing"))
    for _ in range(2):
        assert_equal(once(tokenizer), first)
    assert tokenized == [40, 40] and not entry().is_symlink()
    assert (tmp_path / "elsewhere" / "kept").read_text() == "mine"


def test_an_entry_that_lies_elsewhere_is_not_used(
    tokenizer: PreTrainedTokenizerFast, tokenized: list[int], tmp_path: Path
) -> None:
    once(tokenizer)
    folder = entry()
    folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    once(tokenizer)
    assert tokenized == [40, 40] and not entry().is_symlink() and (tmp_path / "elsewhere" / MANIFEST).exists()


def test_a_manifest_of_another_shape_is_damage(tokenizer: PreTrainedTokenizerFast, tokenized: list[int]) -> None:
    once(tokenizer)
    for manifest in ([], {}, {"sets": {"rows": {}}, "files": {}}, {"sets": 3, "files": {}, "note": None}):
        (entry() / MANIFEST).write_text(json.dumps({"manifest": manifest, "sha256": digest_of(manifest)}))
        once(tokenizer)
    for text in ("nul", "[" * 100_000):
        (entry() / MANIFEST).write_text(text)
        once(tokenizer)
    assert tokenized == [40] * 7


def test_every_byte_of_the_manifest_counts(tokenizer: PreTrainedTokenizerFast, tokenized: list[int]) -> None:
    first = once(tokenizer, [*ROWS, {"prompt": "long " * 30, "completion": "no"}])
    file = entry() / MANIFEST
    content = file.read_text()
    for before, after in (("41", "14"), ('"samples": 40', '"samples": 41'), ("got none", "got some")):
        if before in content:
            file.write_text(content.replace(before, after))
            assert_equal(once(tokenizer, [*ROWS, {"prompt": "long " * 30, "completion": "no"}]), first)
    assert len(tokenized) == 4


def test_a_run_that_dies_while_it_keeps_tokens_leaves_no_entry(
    tokenizer: PreTrainedTokenizerFast, tokenized: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(token_cache, "_described", interrupted)
    with pytest.raises(KeyboardInterrupt):
        once(tokenizer)
    assert list(token_cache_dir().iterdir()) == []
    monkeypatch.undo()


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), PermissionError(13, "Permission denied")])
def test_a_cache_that_cannot_be_written_to_costs_no_run(
    error: OSError,
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def failing(*args: Any) -> Any:
        raise error

    monkeypatch.setattr(token_cache, "_written", failing)
    assert len(once(tokenizer)) == 40
    assert "tokens are not kept for the next run" in caplog.text and str(error) in caplog.text
    assert list(token_cache_dir().iterdir()) == []


def test_without_a_folder_nothing_is_kept(
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ETUDE_CACHE", str(tmp_path / "file" / "cache"))
    assert len(once(tokenizer)) == 40
    assert "tokens are not kept" in caplog.text


def test_without_a_home_nothing_is_kept(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("ETUDE_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # as where nothing is known of the user
    assert len(once(tokenizer)) == 40
    assert "tokens are not kept" in caplog.text and "set ETUDE_CACHE" in caplog.text


def test_the_last_room_of_a_disk_is_for_checkpoints(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=token_cache.MIN_FREE_BYTES + 1))
    assert len(once(tokenizer)) == 40
    assert "the disk is nearly full" in caplog.text and list(token_cache_dir().iterdir()) == []


def test_a_disk_that_is_only_read_is_used(
    tokenizer: PreTrainedTokenizerFast, tokenized: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*args: Any, **options: Any) -> Any:
        raise OSError(30, "Read-only file system")

    once(tokenizer)
    for name in ("os.utime", "os.chmod", "os.rename"):
        monkeypatch.setattr(name, refused)
    once(tokenizer)
    assert tokenized == [40] and entry().is_dir()


def test_what_is_tokenized_quickly_is_not_kept(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept_tokens, "WORTH_KEEPING_SECONDS", 3600.0)
    once(tokenizer)
    assert list(token_cache_dir().iterdir()) == []


def test_a_tokenizer_with_code_of_its_own_is_not_trusted_to_stay_the_same(
    tokenizer: PreTrainedTokenizerFast, tokenized: list[int]
) -> None:
    class Shouting(PreTrainedTokenizerFast):
        def _encode_plus(self, text: Any, *args: Any, **options: Any) -> Any:
            return super()._encode_plus([one.upper() for one in text], *args, **options)

    own = Shouting(tokenizer_object=tokenizer.backend_tokenizer, bos_token="<s>", eos_token="</s>")
    once(own)
    once(own)
    assert tokenized == [40, 40] and list(token_cache_dir().iterdir()) == []


def test_rows_that_are_no_json_are_not_kept(tokenizer: PreTrainedTokenizerFast, tokenized: list[int]) -> None:
    rows = [row | {"seen": object()} for row in ROWS]
    once(tokenizer, rows)
    once(tokenizer, rows)
    assert tokenized == [40, 40]


# -- the folder ---------------------------------------------------------------------------------------------------------


def stored(cache: TokenCache, tokenizer: Any, *keys: str) -> None:
    rows = encode_rows(read_rows(ROWS), tokenizer)
    for age, key in enumerate(reversed(keys)):
        cache.store(key, {"rows": rows}, None)
        then = time.time() - 60 * age
        os.utime(cache.folder / key / MANIFEST, (then, then))


def test_it_does_not_grow_for_ever(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = TokenCache(tmp_path / "cache")
    stored(cache, tokenizer, "a", "b", "c", "d")
    month_ago = time.time() - 31 * 24 * 3600
    os.utime(cache.folder / "d" / MANIFEST, (month_ago, month_ago))
    (cache.folder / ".draft-dead").mkdir()
    os.utime(cache.folder / ".draft-dead", (month_ago, month_ago))
    (cache.folder / ".draft-alive").mkdir()
    (cache.folder / "half-removed").mkdir()
    os.utime(cache.folder / "half-removed", (month_ago, month_ago))
    stored(cache, tokenizer, "e")
    assert {path.name for path in cache.folder.iterdir()} == {"a", "b", "c", "e", ".draft-alive"}
    monkeypatch.setattr(token_cache, "MAX_ENTRIES", 3)
    assert cache.load("a") is not None  # used last
    stored(cache, tokenizer, "f")
    assert {path.name for path in cache.folder.iterdir()} == {"a", "e", "f", ".draft-alive"}
    monkeypatch.setattr(token_cache, "MAX_BYTES", token_cache.entries_in(cache.folder)[0][1] + 1)
    stored(cache, tokenizer, "g")
    assert len(token_cache.entries_in(cache.folder)) == 2


def test_two_that_keep_the_same_do_not_meet(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    cache = TokenCache(tmp_path / "cache")
    stored(cache, tokenizer, "a")
    before = (cache.folder / "a").stat().st_ino
    stored(cache, tokenizer, "a")
    assert (cache.folder / "a").stat().st_ino == before
    assert [path.name for path in cache.folder.iterdir()] == ["a"]


def test_files_are_known_by_what_is_in_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "set").mkdir()
    files = [tmp_path / "a.jsonl", tmp_path / "set"]
    files[0].write_text("one")
    (tmp_path / "set" / "part").write_text("two")
    before, stamp = fingerprint_of(files), stamp_of(files)
    os.utime(files[0], (1, 1))
    assert fingerprint_of(files) == before and stamp_of(files) != stamp
    (tmp_path / "set" / "part").write_text("tow")
    assert fingerprint_of(files) != before
    assert fingerprint_of(["hub:owner/name"]) is None
    assert fingerprint_of([tmp_path / "missing"]) is None
    os.mkfifo(tmp_path / "pipe")
    assert fingerprint_of([tmp_path / "pipe"]) is None  # and does not wait for a writer

    opened: list[Any] = []
    monkeypatch.setattr("os.open", lambda *args: opened.append(args))
    assert fingerprint_of([tmp_path / "pipe"]) is None
    assert opened == []  # a writer that found a reader gone would end
