"""How many steps a run has, how large they are, and what the numbers of a finished run mean."""

from __future__ import annotations

import math
from typing import Any

import pytest

from etude import TrainOutput
from short_run import logged, short_trainer
from tiny import adapter_of, distance, language_rows


@pytest.mark.parametrize(
    ("settings", "num_steps", "epochs"),
    [
        ({"num_train_epochs": 2}, 10, 2.0),
        ({"num_train_epochs": 1.5}, 8, 1.6),  # 7.5 steps are rounded up
        ({"num_train_epochs": 0.1}, 1, 0.2),
        ({"max_steps": 7, "num_train_epochs": 99}, 7, 1.4),
        ({"gradient_accumulation_steps": 2}, 6, 2.0),  # 5 micro-batches make 3 steps, the last of one
        ({"gradient_accumulation_steps": 8, "num_train_epochs": 3}, 3, 3.0),
        ({"per_device_train_batch_size": 4}, 6, 2.0),
        ({"per_device_train_batch_size": 4, "dataloader_drop_last": True}, 4, 2.0),
        ({"per_device_train_batch_size": 64}, 2, 2.0),
    ],
    ids=str,
)
def test_number_of_steps(settings: dict[str, Any], num_steps: int, epochs: float) -> None:
    trainer = short_trainer(**settings)
    output = trainer.train()
    assert output.global_step == trainer.state.global_step == trainer.state.max_steps == num_steps
    assert trainer.state.epoch == pytest.approx(epochs)
    assert len(logged(trainer, "loss")) == num_steps
    assert len(logged(trainer, "learning_rate")) == num_steps


@pytest.mark.parametrize("fast_path", [True, False])
@pytest.mark.parametrize("accumulation", [2, 4, 8])
def test_accumulation_equals_one_large_batch(accumulation: int, fast_path: bool) -> None:
    """Rows of different length weigh by their tokens, not by their micro-batch."""
    one = short_trainer(rows=language_rows(24), per_device_train_batch_size=8, fast_path=fast_path)
    cut = short_trainer(
        rows=language_rows(24),
        per_device_train_batch_size=8 // accumulation,
        gradient_accumulation_steps=accumulation,
        fast_path=fast_path,
    )
    one.train()
    cut.train()
    assert logged(cut, "loss") == pytest.approx(logged(one, "loss"), rel=1e-5)
    assert logged(cut, "grad_norm") == pytest.approx(logged(one, "grad_norm"), rel=1e-5)
    assert distance(adapter_of(cut.model), adapter_of(one.model)) <= 1e-5


@pytest.mark.parametrize(
    "warmup", [{"warmup_ratio": 0.25}, {"warmup_steps": 2}, {"warmup_steps": 0.25}], ids=lambda warmup: str(warmup)
)
def test_warmup_rises_to_the_peak_and_falls_to_zero(warmup: dict[str, float]) -> None:
    trainer = short_trainer(max_steps=8, learning_rate=8e-4, **warmup)
    trainer.train()
    shares = [0, 1 / 2, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]
    assert logged(trainer, "learning_rate") == pytest.approx([8e-4 * share for share in shares])


def test_warmup_ratio_is_rounded_up_and_one_is_the_whole_run() -> None:
    short = short_trainer(max_steps=10, warmup_ratio=0.03)
    assert short.args.get_warmup_steps(10) == 1
    whole = short_trainer(max_steps=4, warmup_ratio=1.0, learning_rate=4e-4)
    whole.train()
    assert logged(whole, "learning_rate") == pytest.approx([0, 1e-4, 2e-4, 3e-4])


def test_the_result_says_what_was_done() -> None:
    trainer = short_trainer()
    output = trainer.train()
    assert isinstance(output, TrainOutput)
    assert output.global_step == 10
    assert output.training_loss == pytest.approx(sum(logged(trainer, "loss")) / 10)
    expected = {"train_runtime", "train_samples_per_second", "train_steps_per_second", "total_flos", "train_loss"}
    assert expected <= output.metrics.keys()
    assert output.metrics["train_loss"] == output.training_loss
    assert output.metrics["epoch"] == 2.0
    runtime = output.metrics["train_runtime"]
    assert output.metrics["train_samples_per_second"] == pytest.approx(20 / runtime, rel=0.01)
    assert output.metrics["train_steps_per_second"] == pytest.approx(10 / runtime, rel=0.01)
    assert trainer.state.log_history[-1]["train_loss"] == output.training_loss


@pytest.mark.parametrize("settings", [{"logging_strategy": "no"}, {"logging_steps": 4}], ids=str)
def test_the_mean_loss_does_not_depend_on_logging(settings: dict[str, Any]) -> None:
    assert short_trainer(**settings).train().training_loss == pytest.approx(short_trainer().train().training_loss)


def test_a_log_holds_the_mean_since_the_last_one() -> None:
    every, fourth = short_trainer(), short_trainer(logging_steps=4)
    every.train()
    fourth.train()
    losses = logged(every, "loss")
    assert logged(fourth, "loss") == pytest.approx([sum(losses[0:4]) / 4, sum(losses[4:8]) / 4])
    assert [entry["step"] for entry in fourth.state.log_history] == [4, 8, 10]


def test_the_gradient_norm_is_that_before_clipping() -> None:
    loose, tight = short_trainer(max_steps=1, max_grad_norm=1e6), short_trainer(max_steps=1, max_grad_norm=1e-3)
    loose.train()
    tight.train()
    assert logged(tight, "grad_norm") == logged(loose, "grad_norm")
    assert logged(tight, "grad_norm")[0] > 1e-3


def test_training_again_begins_anew_with_the_trained_weights() -> None:
    trainer = short_trainer(max_steps=4)
    first = trainer.train()
    second = trainer.train()
    assert first.global_step == second.global_step == 4
    assert len(logged(trainer, "loss")) == 4
    assert second.training_loss != first.training_loss


def test_two_equal_runs_give_equal_bits() -> None:
    runs = [short_trainer(model=None) for _ in range(2)]
    for trainer in runs:
        trainer.train()
    assert distance(adapter_of(runs[0].model), adapter_of(runs[1].model)) == 0
    assert logged(runs[0], "loss") == logged(runs[1], "loss")


def test_another_seed_is_another_order() -> None:
    one, other = short_trainer(seed=7), short_trainer(seed=8)
    one.train()
    other.train()
    assert logged(one, "loss") != logged(other, "loss")


def test_batch_arithmetic_is_readable_on_the_trainer() -> None:
    trainer = short_trainer(gradient_accumulation_steps=3)
    assert trainer.args.train_batch_size == 2
    assert trainer.get_total_train_batch_size(trainer.args) == 6
    assert len(trainer.get_train_dataloader()) == 5
    assert trainer.num_examples(trainer.get_train_dataloader()) == 10
    trainable = sum(parameter.numel() for parameter in trainer.model.parameters() if parameter.requires_grad)
    assert trainer.get_num_trainable_parameters() == trainable


def test_every_logged_number_is_a_plain_finite_number() -> None:
    trainer = short_trainer()
    trainer.train()
    for entry in trainer.state.log_history:
        for value in entry.values():
            assert type(value) in (int, float)
            assert math.isfinite(value)
