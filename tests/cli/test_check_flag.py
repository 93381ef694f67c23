"""`etude train --check`: a table and an exit code, and nothing trained."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_run import question_rows, save_base, write_rows

from etude import precision
from etude.cli import main as command
from etude.kernels import plan, reference
from etude.kernels.norm import LastNorm


@pytest.fixture
def words() -> list[str]:
    save_base(Path("base"))
    write_rows(Path("rows.jsonl"), question_rows(24))
    flags = ["--model", "base", "--data", "rows.jsonl", "--output", "run", "--use-cpu", "--lora-r", "4", "--check"]
    return ["train", *flags]


def test_a_table_and_exit_code_zero(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([*words, "--no-bf16"]) == 0
    printed = capsys.readouterr().out
    assert "path  packed: padding removed" in printed
    assert "model.layers.0.mlp.down_proj.lora_B" in printed
    assert printed.endswith("fine: the loss and every gradient are within 1e-04 of stock peft\n")
    assert not Path("run").exists()


def test_a_wrong_kernel_is_exit_code_one(
    words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "compare", lambda block, call: 0.0)  # the probe would have found it first
    monkeypatch.setattr(LastNorm, "compare", lambda norm, hidden: 0.0)
    monkeypatch.setattr(reference, "rms_norm_backward", lambda grad, h, *_: grad.to(h.dtype).clone())
    assert command.main([*words, "--no-bf16"]) == 1
    assert "NOT fine: the loss and every gradient should be within 1e-04" in capsys.readouterr().out


def test_in_half_precision_float32_stands_beside_it(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([*words, "--bf16"]) == 0
    assert "gradient of (ours, stock: against float32)" in capsys.readouterr().out


@pytest.mark.parametrize(("has_instructions", "tolerance"), [(True, "5e-02"), (False, "1e-04")])
def test_bfloat16_where_the_processor_has_instructions_for_it(
    words: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    has_instructions: bool,
    tolerance: str,
) -> None:
    monkeypatch.setattr(precision, "multiplies_bfloat16", lambda device: has_instructions)
    assert command.main(words) == 0
    assert f"within {tolerance} of stock peft" in capsys.readouterr().out
