"""Samples on the way, and what a run leaves that did not end as it should."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from small_run import chat_tokenizer, question_rows, save_base, write_rows

from etude.cli import main as command
from etude.cli import samples as samples_module
from etude.cli.adapted import load_adapted
from etude.cli.generate import continued
from etude.cli.samples import FILE_NAME, Samples, given_prompts, prompts_of_rows, template_for
from etude.cli.voice import Voice
from etude.errors import ConfigError

Capture = pytest.CaptureFixture[str]
CLOCKED = ("waiting_for_data", "save_stall_seconds", "runtime", "per_second", "memory_gib")


@pytest.fixture
def words() -> list[str]:
    save_base(Path("base"))
    write_rows(Path("rows.jsonl"), question_rows(24))
    settings = ["--max-steps", "6", "--eval-steps", "2", "--learning-rate", "1e-2", "--use-cpu", "--sample-tokens", "6"]
    settings += ["--lora-r", "4", "--lora-dropout", "0.1", "--global-batch-size", "4", "--logging-steps", "1"]
    return ["train", "--model", "base", "--data", "rows.jsonl", "--eval-data", "rows.jsonl", *settings]


def kept(folder: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(folder, FILE_NAME).read_text().splitlines()]


def logged(folder: str) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if not name.endswith(CLOCKED)} for row in rows]


def test_samples_are_shown_and_kept_and_change_nothing(words: list[str], capsys: Capture) -> None:
    assert command.main([*words, "--output", "with", "--early-stopping-patience", "0"]) == 0
    printed = capsys.readouterr().out
    assert command.main([*words, "--output", "without", "--early-stopping-patience", "0", "--samples", "0"]) == 0
    assert logged("with") == logged("without")
    adapter = "adapter_model.safetensors"
    assert Path("with", adapter).read_bytes() == Path("without", adapter).read_bytes()
    assert not Path("without", FILE_NAME).exists()

    rows = kept("with")
    assert [row["step"] for row in rows] == [0, 2, 4, 6]
    first = rows[0]["samples"][1]
    assert (first["prompt"], first["expected"]) == ("w1 w9", "w11 w12")  # what is asked, once for equal rows
    assert len({sample["prompt"] for sample in rows[0]["samples"]}) == 3
    assert "samples before training (" in printed and "     expected  w11 w12" in printed
    for row in rows[1:]:
        assert f"samples at step {row['step']} (" in printed
        assert f"  1  {row['samples'][0]['answer'] or '(nothing)'}\n" in printed


def test_the_last_samples_are_those_of_the_adapter_that_was_saved(words: list[str]) -> None:
    assert command.main([*words, "--output", "run"]) == 0
    adapted = load_adapted("run")
    voice = Voice(adapted.tokenizer, format="messages", template=None)
    asked = [sample["prompt"] for sample in kept("run")[0]["samples"]]
    answers = continued(adapted.model, voice, [voice.prompt_of(text) for text in asked], max_new_tokens=6, batch_size=4)
    report = Path("run/report.html").read_text()
    assert "Before and after" in report
    for answer in answers:
        assert f"<td><div>{answer}</div></td>" in report


def test_a_resumed_run_keeps_the_samples_of_before(words: list[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        kill_at(4, patch)
        assert command.main([*words, "--output", "run"]) == 128 + signal.SIGTERM
    earlier = kept("run")
    assert command.main([*words, "--output", "run"]) == 0
    assert kept("run")[: len(earlier)] == earlier
    assert [row["step"] for row in kept("run")] == [0, 2, 4, 6]
    assert command.main([*words, "--output", "whole"]) == 0
    assert kept("run") == kept("whole")


def test_prompts_of_a_list_and_of_a_file(words: list[str], capsys: Capture) -> None:
    assert command.main([*words, "--output", "run", "--sample-prompts", '["w3 w9, w4"]', "--samples", "1"]) == 0
    assert kept("run")[0]["samples"][0]["prompt"] == "w3 w9, w4"
    assert "expected" not in kept("run")[0]["samples"][0]
    capsys.readouterr()
    assert command.main([*words, "--output", "other", "--sample-prompts", "none.txt"]) == 2
    assert "sample_prompts: 'none.txt': no such file" in capsys.readouterr().err

    Path("prompts.jsonl").write_text('w5\n{"messages": [{"role": "user", "content": "w6"}]}\n{"instruction": "w7"}\n')
    voice = Voice(chat_tokenizer(), format="messages", template=None)
    asked = given_prompts("prompts.jsonl", voice)
    assert [prompt.text for prompt in asked] == ["w5", "w6", "w7"]
    assert asked[1].ids == voice.prompt_of("w6")
    with pytest.raises(ConfigError, match="no such file"):
        given_prompts("none", voice)


@pytest.mark.parametrize(
    ("format", "row", "text", "expected"),
    [
        ("alpaca", {"instruction": "w1", "input": "w2", "output": "w3"}, "w1\n\nw2", "w3"),
        ("prompt_completion", {"prompt": "w1", "completion": "w2"}, "w1", "w2"),
        ("text", {"text": "w1 w2 w3 w4"}, "w1 w2", " w3 w4"),
        (
            "sharegpt",
            {"conversations": [{"from": "human", "value": "w1"}, {"from": "gpt", "value": "w2"}]},
            "w1",
            "w2",
        ),
    ],
)
def test_a_row_of_every_format_has_a_prompt(format: str, row: dict[str, Any], text: str, expected: str) -> None:
    voice = Voice(chat_tokenizer(), format=format, template=template_for(format, None))
    [prompt] = prompts_of_rows([row, row], format, voice, 3)
    assert (prompt.text, prompt.expected) == (text, expected)
    spoken = voice.tokenizer.decode(prompt.ids)
    assert ("<|assistant|>" in spoken) == (format != "text")
    assert expected.strip() not in spoken


def test_a_row_that_the_template_refuses_is_no_prompt() -> None:
    template = (
        "{% for m in messages %}{% if m['content'] == 'w1' %}{{ raise_exception('no w1') }}{% endif %}"
        "<|{{ m['role'] }}|> {{ m['content'] }} <|end|> {% endfor %}"
    )
    voice = Voice(chat_tokenizer(template), format="prompt_completion", template=None)
    rows = [{"prompt": word, "completion": "w9"} for word in ("w1", "w2")]
    assert [prompt.text for prompt in prompts_of_rows(rows, "prompt_completion", voice, 3)] == ["w2"]


def test_samples_that_would_take_too_long_are_left_out(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr(samples_module, "FREE_SECONDS", 0.0)
    monkeypatch.setattr(samples_module, "LARGEST_SHARE", 0.0)
    assert command.main([*words, "--output", "run"]) == 0
    assert "samples are left out where they would take more than 0% of the time" in capsys.readouterr().err
    assert len(kept("run")) == 2  # before, and of the finished adapter


# ---------------------------------------------------------------- runs that end early


def kill_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    ask = Samples.on_evaluate

    def ask_and_kill(self: Samples, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        ask(self, args, state, control, **kwargs)
        if state.global_step == step:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Samples, "on_evaluate", ask_and_kill)


def test_a_stopped_run_leaves_a_report_that_says_how_to_go_on(words: list[str], capsys: Capture) -> None:
    with pytest.MonkeyPatch.context() as patch:
        kill_at(4, patch)
        assert command.main([*words, "--output", "run"]) == 128 + signal.SIGTERM
    assert "report:  run/report.html" in capsys.readouterr().err
    page = Path("run/report.html").read_text()
    for text in (
        "base, stopped",
        "ended after 4 of 6 updates",
        "stopped by SIGTERM after step 4",
        "This goes on from checkpoint-4 as if nothing had happened:",
        f"etude train {Path('run/recipe.yaml').resolve()}",
        "etude chat run/checkpoint-4",
        "Before and after",
    ):
        assert text in page, text
    assert command.main(["train", str(Path("run/recipe.yaml").resolve())]) == 0  # the command of the report
    page = Path("run/report.html").read_text()
    assert "base, fine-tuned" in page and 'class="ending"' not in page


def test_a_failed_run_leaves_a_report_that_says_why(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("the <device> is gone")

    monkeypatch.setattr(Samples, "on_evaluate", fail)
    with pytest.raises(RuntimeError, match="is gone"):
        command.main([*words, "--output", "run"])
    page = Path("run/report.html").read_text()
    assert "base, failed" in page and "failed: RuntimeError: the &lt;device&gt; is gone" in page
    assert "No checkpoint was written yet, so this starts from the beginning:" in page
    assert "etude chat" not in page  # there is no adapter yet
    assert "report:  run/report.html" in capsys.readouterr().err


def test_a_report_that_cannot_be_written_does_not_hide_the_error(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("first")

    def full(*_: object, **__: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(Samples, "on_evaluate", fail)
    monkeypatch.setattr("etude.reporting.write", full)
    with pytest.raises(RuntimeError, match="first"):
        command.main([*words, "--output", "run"])
    assert "the report could not be written: No space left" in capsys.readouterr().err
