"""Behaviours measured on transformers 5.23, and what must happen instead: every row has its test.

Most are where their subject is; the table says where. The others are here.
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from side_by_side import train

from etude import TrainerCallback
from etude.checkpoint.import_transformers import import_checkpoint
from etude.errors import CheckpointError
from short_run import logged, short_trainer
from tiny import Padded, Watched, adapter_of, causal_lora, distance, language_rows

TESTS = Path(__file__).parents[1]

# The row -> where it is tested.
ROWS: dict[str, str] = {
    "resume, map-style, dropout, workers, every strategy": "unit/test_trainer_resume.py::test_with_loader_workers",
    "resume: logged loss of the first window, train_loss": "unit/test_trainer_resume.py::test_under_other_settings",
    "iterable dataset, resume in epoch 2": "unit/test_trainer_resume.py::test_with_loader_workers",
    "iterable with shuffle buffer": "unit/test_trainer_resume.py::test_a_stream_with_a_shuffle_buffer",
    "newest checkpoint empty, incomplete or truncated": (
        "crash/test_training_corruption.py::test_the_run_goes_on_whatever_the_damage"
    ),
    "no optimizer, scheduler or rng state": "dropin/test_measured_rows.py::test_no_optimizer_schedule_or_random_state",
    "one adapter tensor missing": "dropin/test_measured_rows.py::test_one_adapter_tensor_missing",
    "LoRA r changed, targets grew, alpha changed": "unit/test_bad_input.py::test_a_checkpoint_of_another_model",
    "learning_rate changed on resume": (
        "docs/test_differences.py::test_a_new_learning_rate_wins_over_the_checkpoint_and_is_said"
    ),
    "dataset changed": "unit/test_bad_input.py::test_a_checkpoint_of_other_data",
    "batch size changed": "dropin/test_measured_rows.py::test_batch_size_changed",
    "all labels -100": "unit/test_bad_input.py::test_every_label_masked",
    "NaN adapter from the start": "unit/test_numbers_that_go_wrong.py::test_in_the_adapter",
    "lr=1e9": "unit/test_numbers_that_go_wrong.py::test_a_loss_that_explodes",
    "no trainable parameters": "unit/test_bad_input.py::test_nothing_to_train",
    "activation checkpointing with LoRA": "dropin/test_measured_rows.py::test_activation_checkpointing",
    "named adapter and load_best_model_at_end": (
        "unit/test_trainer_adapters.py::test_the_best_of_a_named_adapter_is_loaded_at_the_end"
    ),
    "best between two saves": "unit/test_trainer_strategies.py::test_the_best_that_no_checkpoint_falls_on_is_not_lost",
    "save_strategy best without evaluation": "unit/test_bad_input.py::test_saving_the_best_without_evaluating",
    "eval loss and the batch size": "unit/test_trainer_evaluation.py::test_the_loss_does_not_depend_on_the_batch_size",
    "auto_find_batch_size": "dropin/test_measured_rows.py::test_auto_find_batch_size",
    "SIGTERM": "crash/test_training_stopped.py::test_a_stop_at_any_moment",
    "drop_last with a dataset smaller than a batch": (
        "unit/test_bad_input.py::test_fewer_rows_than_a_batch_that_must_be_full"
    ),
    "best_metric during on_evaluate": (
        "unit/test_trainer_evaluation.py::test_best_metric_can_be_compared_from_the_first_evaluation_on"
    ),
    "a finished run resumed": "unit/test_trainer_resume.py::test_a_finished_run_reports_what_it_was",
    "resume=True in an empty folder": "unit/test_bad_input.py::test_resume_true_in_an_empty_folder",
}


@pytest.mark.parametrize("row", ROWS)
def test_the_row_has_its_test(row: str) -> None:
    file, _, name = ROWS[row].partition("::")
    tree = ast.parse((TESTS / file).read_text(encoding="utf-8"))
    assert name in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


@pytest.fixture(scope="module")
def peer_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    settings = {"max_steps": 2, "per_device_train_batch_size": 2, "save_strategy": "steps", "save_steps": 1}
    run = train(transformers, causal_lora, language_rows(10), settings, folder=tmp_path_factory.mktemp("peer"))
    return Path(run.trainer.args.output_dir, "checkpoint-1")


def copied(folder: Path) -> Path:
    import shutil

    return Path(shutil.copytree(folder, "checkpoint-1"))


@pytest.mark.parametrize("file", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_no_optimizer_schedule_or_random_state(file: str, peer_checkpoint: Path) -> None:
    """transformers goes on silently with fresh ones."""
    checkpoint = copied(peer_checkpoint)
    (checkpoint / file).unlink()
    with pytest.raises(CheckpointError, match=rf"{file}.*is missing"):
        import_checkpoint(checkpoint)


def test_one_adapter_tensor_missing(peer_checkpoint: Path) -> None:
    """transformers goes on with random numbers in its place."""
    checkpoint = copied(peer_checkpoint)
    file = checkpoint / "adapter_model.safetensors"
    tensors = load_file(file)
    lost = sorted(tensors)[0]
    del tensors[lost]
    save_file(tensors, file)
    imported = import_checkpoint(checkpoint)
    trainer = short_trainer(max_steps=2)
    before = adapter_of(trainer.model)
    with pytest.raises(CheckpointError, match="1 of the model's 8 are missing"):
        trainer.train(resume_from_checkpoint=str(imported.path))
    assert distance(adapter_of(trainer.model), before) == 0.0  # nothing was changed


def test_batch_size_changed(capsys: pytest.CaptureFixture[str]) -> None:
    """transformers takes the number of steps for the place; here it is the number of samples."""
    rows = language_rows(12)
    settings = {"save_strategy": "steps", "save_steps": 3, "max_steps": 3}
    short_trainer(rows=rows, **settings).train()
    watched = Watched(Padded())
    trainer = short_trainer(rows=rows, collate=watched, per_device_train_batch_size=3, max_steps=4)
    trainer.train(resume_from_checkpoint="out/checkpoint-3")
    order = torch.randperm(12, generator=torch.Generator().manual_seed(7))
    assert watched.batches[0] == [tuple(rows[number]["input_ids"]) for number in order[6:9]]
    assert "per_device_train_batch_size: 2 in the checkpoint, 3 now" in capsys.readouterr().err


@pytest.mark.parametrize("fast_path", [True, False])
@pytest.mark.parametrize("options", [None, {"use_reentrant": True}, {"use_reentrant": False}], ids=str)
def test_activation_checkpointing(options: Any, fast_path: bool) -> None:
    """Every tensor of the adapter moves, with the same losses as without."""
    plain = short_trainer(max_steps=3, fast_path=fast_path)
    plain.train()
    model = causal_lora()
    before = adapter_of(model)
    trainer = short_trainer(
        model,
        max_steps=3,
        fast_path=fast_path,
        activation_checkpointing=True,
        activation_checkpointing_kwargs=options,
    )
    trainer.train()
    assert logged(trainer, "loss") == pytest.approx(logged(plain, "loss"), rel=1e-5)
    after = adapter_of(trainer.model)
    assert [name for name in after if torch.equal(after[name], before[name])] == []


class LittleMemory(TrainerCallback):
    """A device that never has room for more than two rows in the second step."""

    def __init__(self, model: Any) -> None:
        self.is_second, self.sizes = False, []
        forward = model.forward

        def limited(*args: Any, **inputs: Any) -> Any:
            rows = len(inputs["input_ids"])
            if self.is_second and rows > 2:
                raise torch.OutOfMemoryError("out of memory")
            self.sizes.append(rows)
            return forward(*args, **inputs)

        model.forward = limited

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.is_second = state.global_step >= 1


def test_auto_find_batch_size() -> None:
    """transformers starts again at step 0 with trained weights and a smaller global batch; here the step is cut smaller."""
    settings = {"per_device_train_batch_size": 8, "max_steps": 3, "fast_path": False}
    rows = language_rows(24)
    plain = short_trainer(rows=rows, **settings)
    plain.train()
    model = causal_lora()
    memory = LittleMemory(model)
    trainer = short_trainer(model, rows, callbacks=[memory], auto_find_batch_size=True, **settings)
    trainer.train()
    assert trainer.state.global_step == 3
    assert logged(trainer, "loss") == pytest.approx(logged(plain, "loss"), rel=1e-5)
    assert distance(adapter_of(trainer.model), adapter_of(plain.model)) <= 1e-4
    assert max(memory.sizes) == 8
    assert memory.sizes[-4:] == [2, 2, 2, 2]
