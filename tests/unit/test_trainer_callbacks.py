"""Callbacks that come with the trainer, those of users, and those written for transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from etude import EarlyStoppingCallback, PrinterCallback, ProgressCallback, TrainerCallback
from short_run import Scripted, short_trainer
from tiny import adapter_of, assert_same_bits, language_rows, same_bits

EVAL_ROWS = language_rows(4, 50)


def judged(*scores: float, **settings: Any) -> Any:
    arguments: dict[str, Any] = {
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_strategy": "steps",
        "save_steps": 1,
        "metric_for_best_model": "score",
        "load_best_model_at_end": True,
    }
    return short_trainer(eval_rows=EVAL_ROWS, compute_metrics=Scripted(*scores), **(arguments | settings))


@pytest.mark.parametrize(
    "early_stopping", [EarlyStoppingCallback, transformers.EarlyStoppingCallback], ids=["etude", "transformers"]
)
@pytest.mark.parametrize(
    ("patience", "threshold", "last_step"), [(1, 0.0, 3), (2, 0.0, 4), (4, 0.0, 8), (1, 0.2, 2)], ids=str
)
def test_early_stopping(early_stopping: Any, patience: int, threshold: float, last_step: int) -> None:
    scores = (0.5, 0.6, 0.55, 0.55, 0.7, 0.1, 0.1, 0.1, 0.1, 0.1)
    if patience == 4:
        scores = (0.5, 0.6, 0.55, 0.61, *scores[2:4], 0.1, 0.1, 0.1, 0.1)
    trainer = judged(*scores, callbacks=[early_stopping(patience, threshold)])
    assert trainer.train().global_step == last_step


def test_the_printer_or_the_progress_bar(capsys: pytest.CaptureFixture[str]) -> None:
    printing = short_trainer(disable_tqdm=True, max_steps=2)
    drawing = short_trainer(disable_tqdm=False, max_steps=2)
    assert has(printing, PrinterCallback)
    assert not has(printing, ProgressCallback)
    assert has(drawing, ProgressCallback)
    assert not has(drawing, PrinterCallback)
    printing.train()
    assert "loss" in capsys.readouterr().out
    drawing.train()


def has(trainer: Any, kind: type) -> bool:
    return any(type(callback) is kind for callback in trainer.callback_handler.callbacks)


@pytest.mark.parametrize("printer", [PrinterCallback, transformers.PrinterCallback], ids=["etude", "transformers"])
def test_taking_out_the_printer_takes_out_no_progress_bar(printer: type) -> None:
    """Scripts that want no printed lines remove the printer whether or not there is one."""
    drawing, printing = short_trainer(disable_tqdm=False), short_trainer(disable_tqdm=True)
    drawing.remove_callback(printer)
    printing.remove_callback(printer)
    assert has(drawing, ProgressCallback)
    assert not has(printing, PrinterCallback)


class CountsSteps(transformers.TrainerCallback):
    """As a user wrote it for transformers: positional arguments, no return value."""

    steps = 0

    def on_step_end(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        assert args.output_dir == "out"
        assert kwargs["model"] is not None
        CountsSteps.steps += 1


def test_a_callback_of_transformers_as_object_or_class() -> None:
    for callback in (CountsSteps(), CountsSteps):
        CountsSteps.steps = 0
        short_trainer(callbacks=[callback]).train()
        assert CountsSteps.steps == 10


def test_callbacks_are_added_popped_and_removed() -> None:
    trainer = short_trainer(max_steps=1)
    trainer.add_callback(CountsSteps)
    assert has(trainer, CountsSteps)
    assert isinstance(trainer.pop_callback(CountsSteps), CountsSteps)
    assert not has(trainer, CountsSteps)
    callback = CountsSteps()
    trainer.add_callback(callback)
    trainer.remove_callback(callback)
    assert not has(trainer, CountsSteps)


class Inspector(TrainerCallback):
    """Looks at what transformers' callbacks look at."""

    def __init__(self) -> None:
        self.gradients: list[float] = []
        self.rates: list[float] = []
        self.weights: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        trained = [parameter for parameter in given["model"].parameters() if parameter.requires_grad]
        squares = [parameter.grad.double().pow(2).sum() for parameter in trained]
        self.gradients.append(float(torch.stack(squares).sum().sqrt()))
        self.weights.append(adapter_of(given["model"]))

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        assert isinstance(given["optimizer"], torch.optim.Optimizer)
        assert isinstance(given["lr_scheduler"], torch.optim.lr_scheduler.LRScheduler)
        self.rates.append(given["optimizer"].param_groups[0]["lr"])
        self.weights.append(adapter_of(given["model"]))

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        assert len(given["train_dataloader"]) == 5
        assert given["processing_class"] is given["tokenizer"]


@pytest.mark.parametrize("fast_path", [True, False])
def test_what_a_callback_finds_around_an_update(fast_path: bool) -> None:
    inspector = Inspector()
    trainer = short_trainer(callbacks=[inspector], max_grad_norm=0.5, fast_path=fast_path)
    trainer.train()
    norms = [min(entry["grad_norm"], 0.5) for entry in trainer.state.log_history if "grad_norm" in entry]
    assert inspector.gradients == pytest.approx(norms, rel=1e-4)  # clipped
    assert inspector.rates == pytest.approx([1e-3 * (1 - step / 10) for step in range(10)])
    before, after = inspector.weights[-2], inspector.weights[-1]
    assert not same_bits(before, after)
    assert_same_bits(after, adapter_of(trainer.model))


class WritesNotes(TrainerCallback):
    """Adds a number to every log, as metric callbacks do."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        state.log_history[-1]["note"] = 1.0


def test_a_callback_may_write_into_the_log() -> None:
    trainer = short_trainer(callbacks=[WritesNotes()], max_steps=3)
    trainer.train()
    assert all(entry["note"] == 1.0 for entry in trainer.state.log_history)


def test_log_can_be_called_by_the_user() -> None:
    trainer = short_trainer(max_steps=2)
    trainer.train()
    trainer.log({"my_metric": 3.0})
    assert trainer.state.log_history[-1] == {"my_metric": 3.0, "epoch": trainer.state.epoch, "step": 2}


@pytest.mark.parametrize(
    "settings",
    [{"logging_dir": "boards"}, {"logging_dir": "boards", "report_to": "tensorboard"}],
    ids=["folder-alone", "folder-and-name"],
)
def test_tensorboard_writes_where_it_is_told(settings: dict[str, Any]) -> None:
    short_trainer(max_steps=2, **settings).train()
    assert list(Path("boards").rglob("events.out.tfevents.*"))


def test_no_tracker_unless_asked_for() -> None:
    short_trainer(max_steps=2, save_strategy="epoch").train()
    assert not list(Path.cwd().rglob("events.out.tfevents.*"))


def test_an_overridden_compute_loss_is_used() -> None:
    from etude import Trainer

    calls: list[set[str]] = []

    class Doubled(Trainer):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **given: Any) -> Any:
            calls.append(set(inputs))
            outputs = model(**inputs, **given)
            loss = 2 * outputs.loss
            return (loss, outputs) if return_outputs else loss

    plain, doubled = short_trainer(max_steps=2), short_trainer(max_steps=2, trainer_class=Doubled)
    plain.train()
    doubled.train()
    assert calls[0] == {"input_ids", "attention_mask", "labels"}
    first = [trainer.state.log_history[0]["loss"] for trainer in (plain, doubled)]
    assert first[1] == pytest.approx(2 * first[0], rel=1e-6)


def test_an_overridden_compute_loss_with_an_old_signature_is_used() -> None:
    from etude import Trainer

    class Old(Trainer):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False) -> Any:
            outputs = model(**inputs)
            return (outputs.loss, outputs) if return_outputs else outputs.loss

    plain, old = short_trainer(max_steps=2), short_trainer(max_steps=2, trainer_class=Old)
    plain.train()
    old.train()
    losses = [trainer.state.log_history[0]["loss"] for trainer in (plain, old)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)


def test_a_loss_function_of_the_user_gets_the_item_count() -> None:
    counts: list[int] = []

    def loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        counts.append(int(num_items_in_batch))
        logits = outputs.logits[:, :-1].flatten(0, 1)
        return torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum") / num_items_in_batch

    plain = short_trainer(max_steps=3, gradient_accumulation_steps=2)
    own = short_trainer(max_steps=3, gradient_accumulation_steps=2, compute_loss_func=loss)
    plain.train()
    own.train()
    losses = [[entry["loss"] for entry in trainer.state.log_history if "loss" in entry] for trainer in (plain, own)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert counts[0] == counts[1]
