"""`etude train` on rows that an earlier run tokenized: the same run, and nothing is read or tokenized."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from small_run import question_rows, save_base, write_rows

from etude.cli import main as command
from etude.cli import rows as cli_rows
from etude.data import kept_tokens
from etude.data.kept_tokens import token_cache_dir

Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def base(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_tokens, "WORTH_KEEPING_SECONDS", 0.0)
    save_base(Path("base"))
    rows = question_rows(30)
    for number, row in enumerate(rows):  # no two alike
        row["messages"][0]["content"] = f"w{number} w9"
    write_rows(Path("rows.jsonl"), rows)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The data of every time that rows were read."""
    found: list[str] = []
    read_data = cli_rows.read_data

    def noted(chosen: Any) -> Any:
        found.append(str(chosen.data))
        return read_data(chosen)

    monkeypatch.setattr(cli_rows, "read_data", noted)
    return found


def train(output: str, *more: str) -> list[Any]:
    """A run of four steps: its losses, and the samples that were shown."""
    words = ["train", "--model", "base", "--data", "rows.jsonl", "--output", output, "--use-cpu", "--lora-r", "4"]
    words += ["--max-steps", "4", "--global-batch-size", "4", "--logging-steps", "1", "--sample-tokens", "4"]
    assert command.main([*words, "--eval-fraction", "0.3", "--save-strategy", "no", *more]) == 0
    rows = [json.loads(line) for line in Path(output, "metrics.jsonl").read_text().splitlines()]
    samples = [json.loads(line) for line in Path(output, "samples.jsonl").read_text().splitlines()]
    return [[(row["step"], row.get("loss"), row.get("eval_loss")) for row in rows], samples]


def train_briefly(output: str, *more: str) -> None:
    """A run of one step, for its rows alone."""
    words = ["train", "--model", "base", "--data", "rows.jsonl", "--output", output, "--use-cpu", "--samples", "0"]
    words += ["--max-steps", "1", "--global-batch-size", "1", "--eval-fraction", "0.3", "--eval-strategy", "no"]
    assert command.main([*words, "--save-strategy", "no", "--no-fast-path", *more]) == 0


def test_the_same_run_without_reading(reads: list[str]) -> None:
    first = train("one")
    assert len(reads) == 1
    assert train("two") == first
    assert len(reads) == 1


def test_the_screen_says_the_same(capsys: Capture) -> None:
    def screen(output: str) -> tuple[str, str]:
        train_briefly(output)
        before, _, rest = capsys.readouterr().out.partition("train ")
        return before, rest.partition("eval ")[0]

    before, first = screen("one")
    assert "samples" in first and "earlier run" not in before
    before, second = screen("two")
    assert second == first and "of an earlier run" in before and "--no-keep-tokens" in before


@pytest.mark.parametrize("more", [["--no-keep-tokens"], ["--set", "keep_tokens=false"]])
def test_nothing_is_kept_where_nobody_wants_it(more: list[str], reads: list[str]) -> None:
    train_briefly("one", *more)
    train_briefly("two", *more)
    assert len(reads) == 2
    assert not token_cache_dir().exists()


def test_what_was_kept_is_not_used_where_nobody_wants_it(reads: list[str]) -> None:
    train_briefly("one")
    train_briefly("two", "--no-keep-tokens")
    assert len(reads) == 2


@pytest.mark.parametrize("more", [["--max-length", "6"], ["--train-on", "all"], ["--template", "plain"]])
def test_another_setting_tokenizes_again(more: list[str], reads: list[str]) -> None:
    train_briefly("one")
    train_briefly("two", *more)
    assert len(reads) == 2


def test_a_changed_file_is_read_again(reads: list[str]) -> None:
    train_briefly("one")
    text = Path("rows.jsonl").read_text()
    Path("rows.jsonl").write_text(text.replace("w29 w9", "w29 w8"))
    train_briefly("two")
    assert len(reads) == 2
    Path("rows.jsonl").write_text(text)
    train_briefly("three")
    assert len(reads) == 2  # what is in a file counts, not when it was written


def test_a_file_that_changes_while_it_is_read_is_not_kept(monkeypatch: pytest.MonkeyPatch, reads: list[str]) -> None:
    read_sets = cli_rows.read_sets

    def slow(chosen: Any) -> Any:
        sets = read_sets(chosen)
        os.utime("rows.jsonl", (1, 1))
        return sets

    monkeypatch.setattr(cli_rows, "read_sets", slow)
    train_briefly("one")
    assert list(token_cache_dir().iterdir()) == []


def test_a_file_that_comes_while_a_folder_is_read_is_not_kept(
    monkeypatch: pytest.MonkeyPatch, reads: list[str]
) -> None:
    Path("folder").mkdir()
    Path("rows.jsonl").rename("folder/rows.jsonl")
    read_sets = cli_rows.read_sets

    def with_another(chosen: Any) -> Any:
        write_rows(Path("folder/other.jsonl"), question_rows(2))
        return read_sets(chosen)

    monkeypatch.setattr(cli_rows, "read_sets", with_another)
    train_briefly("one", "--data", "folder")
    assert list(token_cache_dir().iterdir()) == []


def test_damage_is_said_and_mended(reads: list[str], capsys: Capture, caplog: pytest.LogCaptureFixture) -> None:
    train_briefly("one")
    [entry] = token_cache_dir().iterdir()
    (entry / "train.input_ids").write_bytes(b"")
    train_briefly("two")
    assert "kept tokens are damaged" in caplog.text and "tokenized again" in caplog.text
    assert len(reads) == 2
    train_briefly("three")
    assert len(reads) == 2
