"""`etude train --streaming`: the rows in order, a run that is resumed within them, and what a stream cannot do."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from small_run import question_rows, save_base, write_rows

from etude.callbacks import DefaultFlowCallback
from etude.cli import main as command
from etude.cli import recipe

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def words() -> list[str]:
    save_base(Path("base"))
    rows = question_rows(30)
    for number, row in enumerate(rows):  # no two alike
        row["messages"][0]["content"] = f"w{number} w9"
    Path("rows").mkdir()
    write_rows(Path("rows/a.jsonl"), rows[:13])
    write_rows(Path("rows/b.jsonl"), rows[13:])
    words = ["train", "--model", "base", "--data", "rows", "--streaming", "--use-cpu", "--lora-r", "4"]
    return [*words, "--global-batch-size", "4", "--logging-steps", "1", "--sample-tokens", "4", "--save-steps", "100"]


def losses(folder: str) -> list[Any]:
    rows = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"], row["grad_norm"]) for row in rows if "loss" in row]


@pytest.mark.parametrize("step", [2, 7, 8, 11])  # within a file, at its end, at the end of the data, behind it
def test_a_stopped_stream_goes_on_as_if_nothing_had_happened(step: int, words: list[str], capsys: Capture) -> None:
    assert command.main([*words, "--output", "whole", "--max-steps", "12"]) == 0
    printed = capsys.readouterr().out
    assert "a stream of unknown length" in printed and "2 files, format 'messages'" in printed

    def stop(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == step:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DefaultFlowCallback, "on_step_begin", stop, raising=False)
        assert command.main([*words, "--output", "parts", "--max-steps", "12"]) == 128 + signal.SIGTERM
    assert command.main([*words, "--output", "parts", "--max-steps", "12"]) == 0
    assert losses("parts") == losses("whole") and len(losses("whole")) == 12
    adapter = "adapter_model.safetensors"
    assert Path("parts", adapter).read_bytes() == Path("whole", adapter).read_bytes()


def test_a_streamed_run_is_repeated_by_its_recipe(words: list[str]) -> None:
    assert command.main([*words, "--output", "run", "--max-steps", "3"]) == 0
    saved = recipe.build(recipe.read("run/recipe.yaml"))
    assert (saved.streaming, saved.eval_fraction, saved.format) == (True, 0.0, "messages")
    assert command.main(["train", "run/recipe.yaml", "--output", "again"]) == 0
    adapter = "adapter_model.safetensors"
    assert Path("again", adapter).read_bytes() == Path("run", adapter).read_bytes()


def test_the_epochs_of_a_stream_see_what_whole_epochs_do_in_the_order_of_the_files(words: list[str]) -> None:
    """30 rows are 7 updates of 4 and one of 2, then the data begins anew."""
    assert command.main([*words, "--output", "run", "--max-steps", "16", "--learning-rate", "0"]) == 0
    found = [loss for _, loss, _ in losses("run")]
    assert found[:8] == pytest.approx(found[8:], rel=1e-6)
    assert len({round(loss, 6) for loss in found}) == 8


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "max_steps: must be set where rows are streamed"),
        (["--max-steps", "4", "--eval-fraction", "0.1"], "eval_fraction: cannot hold out rows of a stream"),
        (["--max-steps", "4", "--dataloader-num-workers", "2"], "dataloader_num_workers: a stream is read by one"),
        (["--max-steps", "4", "--set", "data=[{path: rows, weight: 2}]"], "data: weights need all rows"),
    ],
)
def test_what_a_stream_cannot_do_is_said_at_once(
    more: list[str], message: str, words: list[str], capsys: Capture
) -> None:
    assert command.main([*words, "--output", "run", *more]) == 2
    assert message in capsys.readouterr().err
    assert not Path("run").exists()


def test_hub_names_are_asked_for_explicitly(words: list[str], capsys: Capture) -> None:
    words[words.index("rows")] = "tatsu-lab/alpaca"
    assert command.main(words) == 2
    message = "data: 'tatsu-lab/alpaca': no such file or folder; a data set on the Hub is hub:tatsu-lab/alpaca"
    assert message in capsys.readouterr().err
    words[words.index("tatsu-lab/alpaca")] = "hub:tatsu lab"
    assert command.main(words) == 2
    assert "data: expected hub:OWNER/NAME[/CONFIG][:SPLIT][@REVISION], got 'hub:tatsu lab'" in capsys.readouterr().err
