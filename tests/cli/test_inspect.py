"""`etude data inspect`: what is shown of rows, and which hazards are found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from small_run import chat_tokenizer, question_rows, write_rows

from etude.cli import main as command
from etude.cli.inspect import coloured, hazards, histogram, runs_of
from etude.data import encode_rows, read_rows

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def model(tmp_path: Path) -> str:
    """A folder with a tokenizer alone: nothing else is needed."""
    chat_tokenizer().save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


def found(rows: list[dict[str, Any]], tokenizer: Any = None, **options: Any) -> list[str]:
    tokenizer = tokenizer or chat_tokenizer()
    row_set = read_rows(rows)
    tokenized = encode_rows(row_set, tokenizer, on_bad_row="skip", **options)
    max_length = options.get("max_length")
    return [
        f"{hazard.kind}: {hazard.text}"
        for hazard in hazards(row_set, tokenized, tokenizer, template=options.get("template"), max_length=max_length)
    ]


def different_rows(num_rows: int) -> list[dict[str, Any]]:
    rows = question_rows(num_rows)
    for number, row in enumerate(rows):
        row["messages"][0]["content"] = f"w{number} w9"
    return rows


def test_rows_appear_as_the_model_sees_them(model: str, capsys: Capture) -> None:
    write_rows(Path("rows.jsonl"), [*different_rows(3), {"messages": [{"role": "user", "content": "w1"}]}])
    assert command.main(["data", "inspect", "rows.jsonl", "--model", model, "--rows", "2"]) == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert lines[0] == "3 rows from rows.jsonl, format 'messages' (messages), 1 bad rows skipped"
    assert lines[2] == "rows.jsonl:1  8 tokens, 3 learned"
    assert lines[3] == "<|user|> w0 w9 <|end|> <|assistant|>⟦ w10 w11 <|end|>⟧"
    assert "rows.jsonl:3" not in out.partition("samples")[0]  # two rows were asked for
    assert "3 samples, 24 tokens (38% supervised), longest 8, 0 cut off, 0 duplicates" in out
    assert "bad row: rows.jsonl:4 field 'messages'" in out
    assert max(map(len, lines)) <= 80


def test_good_rows_are_called_whole(model: str, capsys: Capture) -> None:
    write_rows(Path("rows.jsonl"), different_rows(3))
    assert command.main(["data", "inspect", "rows.jsonl", "--model", model, "--rows", "0"]) == 0
    out = capsys.readouterr().out
    assert "every row is whole" in out
    assert "problem" not in out


def test_learned_tokens_are_green_and_special_tokens_bold() -> None:
    tokenizer = chat_tokenizer()
    row = encode_rows(read_rows(different_rows(1)), tokenizer)[0]
    console = Console(force_terminal=True, color_system="standard", width=80, highlight=False)
    with console.capture() as capture:
        console.print(coloured(row["input_ids"], row["labels"], tokenizer, ("[", "]")))
    out = capture.get()
    assert "\x1b[32m w10 w11\x1b[0m" in out
    assert "\x1b[1;32m <|end|>\x1b[0m" in out
    assert "\x1b[1;2m<|user|>\x1b[0m" in out


def test_no_token_is_left_out_between_the_colours() -> None:
    tokenizer = chat_tokenizer()
    row = encode_rows(read_rows(different_rows(1)), tokenizer)[0]
    runs = list(runs_of(row["input_ids"], row["labels"], tokenizer))
    assert "".join(run.text for run in runs) == tokenizer.decode(row["input_ids"])
    assert [run.is_special for run in runs] == [True, False, True, False, True]


@pytest.mark.parametrize("code", ["\x1b[2J\x1b[31m", "\x9b2J", "\r", "\x07", "[bold red]"])
def test_a_row_cannot_command_the_terminal(code: str, capsys: Capture) -> None:
    """Byte-level tokenizers give back what was in the row; a tokenizer of words would hide the attack."""

    class Bytes:
        bos_token_id = pad_token_id = unk_token_id = None
        all_special_ids: tuple[int, ...] = ()

        def decode(self, ids: list[int], **_: bool) -> str:
            return bytes(ids).decode("utf-8", "replace")

    ids = list(f"a{code}b\nc".encode())
    text = coloured(ids, [-100] * len(ids), Bytes(), ("[", "]")).plain
    assert all(character.isprintable() or character == "\n" for character in text)
    assert text.endswith("b\\n\nc")
    assert text.startswith("a" + ("[bold red]" if code == "[bold red]" else "\\"))


def test_long_rows_are_shown_in_part() -> None:
    tokenizer = chat_tokenizer()
    text = coloured([9] * 500, [9] * 500, tokenizer, ("[", "]")).plain
    assert text.endswith("] ... 100 tokens more")


def test_the_histogram_counts_every_row() -> None:
    lines = histogram([1, 1, 2, 9, 16], max_length=9)
    assert len(lines) == 9
    assert lines[1].split() == ["1-2", "#" * 40, "3"]
    assert lines[5].split() == ["9-10", "#" * 14, "1", "<-", "max_length"]
    assert sum(int(line.split("  <-")[0].split()[-1]) for line in lines[1:]) == 5
    assert histogram([7], None)[1].split() == ["7-7", "#" * 40, "1"]
    assert max(map(len, histogram([1, 32768], None))) <= 80


# -- hazards ----------------------------------------------------------------------------------------------------------


def test_nothing_is_found_where_nothing_is_wrong() -> None:
    assert found(different_rows(4)) == []


def test_cut_off_rows() -> None:
    assert "problem: 4 rows (100%) lose their end at max_length=7" in found(different_rows(4), max_length=7)


def test_duplicates() -> None:
    assert "problem: 2 rows appear more than once" in found(question_rows(6))


def test_a_missing_end() -> None:
    endless = chat_tokenizer("{% for m in messages %}{{ m['content'] }} {% endfor %}")
    endless.eos_token = None
    [hazard] = [text for text in found(different_rows(2), endless) if "stop" in text]
    assert hazard.startswith("problem: 2 rows do not end in an end token")
    assert hazard.endswith("the tokenizer has none (eos_token)")


def test_a_double_beginning() -> None:
    """Two <bos> written by the template itself: ours takes one away, a third is left over."""
    doubled = chat_tokenizer("<bos> <bos> <bos> {% for m in messages %}{{ m['content'] }} <|end|> {% endfor %}")
    assert "problem: 2 rows begin with <bos> twice" in found(different_rows(2), doubled)


def test_padding_that_is_the_end() -> None:
    same = chat_tokenizer()
    same.pad_token = same.eos_token
    assert any("pad and end are the same token, <eos>" in text for text in found(different_rows(2), same))


def test_unknown_words_and_a_missing_template() -> None:
    plain = found(different_rows(2), chat_tokenizer(None))
    assert any(text.startswith("note: the tokenizer has no chat template") for text in plain)
    assert any("tokens are <unk>" in text for text in plain)


def test_prompts_that_are_learned() -> None:
    assert "problem: everything is learned, the prompts too" in found(different_rows(2), train_on="all")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["none.jsonl", "--model", "base"], "none.jsonl: expected a file, there is none"),
        (["rows.jsonl", "--model", "nowhere"], "nowhere: no usable tokenizer"),
        (["rows.jsonl", "--model", "base", "--rows", "-1"], "--rows: must not be negative"),
        (["rows.jsonl", "--model", "base", "--template", "raw"], "template: raw is for prompts"),
        (["rows.jsonl", "--model", "base", "--train-on", "most"], "train_on: expected 'completion'"),
    ],
)
def test_errors_are_one_line(words: list[str], message: str, model: str, capsys: Capture) -> None:
    write_rows(Path("rows.jsonl"), question_rows(1))
    assert command.main(["data", "inspect", *words]) in (1, 2)
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.count("\n") == 1
