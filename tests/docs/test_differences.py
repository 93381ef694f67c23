"""Entries of GUARANTEES.md that no test of a room proves, most of them from the list of deliberate differences."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from etude import Trainer, TrainerCallback
from short_run import Scripted, checkpoints, logged, short_trainer
from tiny import StreamDataset, adapter_of, distance, language_rows

EVAL_ROWS = language_rows(4, 50)


def saved_at(*steps: int, **settings: Any) -> Any:
    """A finished run of ten steps with checkpoints every four."""
    trainer = short_trainer(save_strategy="steps", save_steps=4, **settings)
    trainer.train()
    assert checkpoints() == list(steps)
    return trainer


@pytest.mark.parametrize("greater_is_better", [True, False])
def test_a_metric_that_is_no_number_is_no_improvement(greater_is_better: bool) -> None:
    trainer = short_trainer(
        eval_rows=EVAL_ROWS,
        compute_metrics=Scripted(math.nan, 0.5, math.nan),
        eval_strategy="steps",
        eval_steps=4,
        metric_for_best_model="score",
        greater_is_better=greater_is_better,
    )
    trainer.train()
    assert trainer.state.best_metric == 0.5


def test_a_new_learning_rate_wins_over_the_checkpoint_and_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    saved_at(4, 8, 10)
    resumed = short_trainer(learning_rate=5e-4, save_strategy="steps", save_steps=4)
    resumed.train(resume_from_checkpoint="out/checkpoint-4")
    assert "learning_rate: 0.001 in the checkpoint, 0.0005 now" in capsys.readouterr().err
    ours = [
        entry["learning_rate"] for entry in resumed.state.log_history if entry.get("step", 0) > 4 and "loss" in entry
    ]
    assert ours == pytest.approx([5e-4 * (10 - step) / 10 for step in range(4, 10)])


def test_checkpoints_of_another_run_are_set_aside_whole(capsys: pytest.CaptureFixture[str]) -> None:
    saved_at(4, 8, 10)
    before = {path.name: path.read_bytes() for path in Path("out/checkpoint-8").iterdir()}
    saved_at(4, 8, 10)
    [folder] = Path("out").glob("previous-*")
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint-10", "checkpoint-4", "checkpoint-8"]
    assert {path.name: path.read_bytes() for path in (folder / "checkpoint-8").iterdir()} == before
    assert f"moved to {folder.name}/" in capsys.readouterr().err


def test_going_on_from_an_older_checkpoint_sets_the_newer_ones_aside() -> None:
    saved_at(4, 8, 10)
    short_trainer(save_strategy="steps", save_steps=4).train(resume_from_checkpoint="out/checkpoint-4")
    [folder] = Path("out").glob("previous-*")
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint-10", "checkpoint-8"]
    assert checkpoints() == [4, 8, 10]


def test_the_last_incomplete_accumulation_of_a_stream_is_an_update_of_its_own() -> None:
    """Three batches of two rows, two of them a step: the third makes an update and is not carried into the next pass."""
    rows = language_rows(6)
    settings: dict[str, Any] = {"gradient_accumulation_steps": 2, "max_steps": 4}
    stream = short_trainer(rows=StreamDataset(rows), **settings)
    stream.train()
    listed = short_trainer(rows=rows, train_sampling_strategy="sequential", **settings)
    listed.train()
    assert logged(stream, "loss") == logged(listed, "loss")
    assert logged(stream, "grad_norm") == logged(listed, "grad_norm")


def test_metrics_jsonl_is_written_whatever_is_reported_to() -> None:
    trainer = short_trainer(report_to="none", logging_steps=5)
    trainer.train()
    rows = [json.loads(line) for line in Path("out/metrics.jsonl").read_text().splitlines()]
    assert [row["loss"] for row in rows if "loss" in row] == logged(trainer, "loss")


def test_the_order_of_samples_depends_on_the_seeds_alone() -> None:
    """Under transformers, whose order follows torch's initial seed, the reseeding would change it."""
    undisturbed, reseeded, other = short_trainer(), short_trainer(), short_trainer(data_seed=8)
    torch.manual_seed(99)
    for trainer in (reseeded, other):
        trainer.train()
    torch.manual_seed(7)
    undisturbed.train()
    assert logged(reseeded, "loss") == logged(undisturbed, "loss")
    assert logged(other, "loss") != logged(undisturbed, "loss")


class Counting(Trainer):
    """Takes note of the tokens of every micro-batch."""

    def run_training_step(self, inputs: Any, num_items: int | None) -> torch.Tensor:
        self.tokens = [*getattr(self, "tokens", []), sum(inputs.lengths)]
        return super().run_training_step(inputs, num_items)


@pytest.mark.parametrize("tokens", [16, 64, 100_000])
def test_the_token_budget_changes_the_cut_and_nothing_else(tokens: int) -> None:
    rows = language_rows(16, shortest=8, longest=24)
    settings: dict[str, Any] = {"rows": rows, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    usual = short_trainer(**settings)
    usual.train()
    cut = short_trainer(tokens_per_micro_batch=tokens, trainer_class=Counting, **settings)
    cut.train()
    assert cut.path.name == "packed"
    assert max(cut.tokens) <= max(tokens, 24)
    assert (len(cut.tokens) == cut.state.global_step) == (tokens == 100_000)
    assert logged(cut, "loss") == pytest.approx(logged(usual, "loss"), rel=1e-5)
    assert distance(adapter_of(cut.model), adapter_of(usual.model)) <= 1e-4


class Asking(TrainerCallback):
    """Touches the request file in the middle of a step."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            Path(args.output_dir, "SAVE").touch()


def test_a_file_asks_for_a_checkpoint() -> None:
    short_trainer(callbacks=[Asking()]).train()
    assert checkpoints() == [3]
    assert not Path("out/SAVE").exists()


class SmallMemory(Trainer):
    """A device that has room for `room` samples at a time, and notices only when the backward pass has added to gradients."""

    room = 0

    def run_training_step(self, inputs: Any, num_items: int | None) -> torch.Tensor:
        share = super().run_training_step(inputs, num_items)
        samples = len(inputs.lengths) if hasattr(inputs, "lengths") else len(inputs["input_ids"])
        if samples > self.room:
            raise torch.OutOfMemoryError("out of memory")
        return share


@pytest.mark.parametrize(("fast_path", "room"), [(True, 8), (True, 2), (False, 4), (False, 2)])
def test_running_out_of_memory_repeats_the_step_with_the_same_samples(
    fast_path: bool, room: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SmallMemory, "room", room)
    rows = language_rows(16, shortest=20, longest=24)
    settings = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "fast_path": fast_path}
    cut = short_trainer(rows=rows, trainer_class=SmallMemory, **settings)
    cut.train()
    assert "out of memory at step 1: the step is repeated in smaller micro-batches" in capsys.readouterr().err
    whole = short_trainer(rows=rows, **settings)
    whole.train()
    assert logged(cut, "loss") == pytest.approx(logged(whole, "loss"), rel=1e-5)
    assert distance(adapter_of(cut.model), adapter_of(whole.model)) <= 1e-4
