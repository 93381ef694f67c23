"""A NaN or an infinity, wherever it comes from, stops the run before the update: named with its step, micro-batch and rows; the
adapter and the last checkpoint are those before.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from etude import Trainer, TrainerCallback
from etude.checkpoint import CheckpointStore
from etude.errors import CheckpointError, DataError, ModelError, NonFiniteError
from short_run import checkpoints, logged, short_trainer
from tiny import IGNORED, adapter_of, causal_lora, language_rows, same_bits

NAN, INF = math.nan, math.inf
ROWS = language_rows(20)
BAD_STEP = 4
RUN: dict[str, Any] = {
    "gradient_accumulation_steps": 2,
    "num_train_epochs": 2,
    "save_strategy": "steps",
    "save_steps": 1,
    "train_sampling_strategy": "sequential",
}
BAD_ROWS = {0: "12, 13", 1: "14, 15"}  # of each micro-batch of step 4, in the order of the data


class Spoiled(Trainer):
    """Multiplies the loss of one micro-batch, or of all from one step on."""

    def __init__(self, *args: Any, factor: float, micro_batch: int, from_then_on: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.factor, self.micro_batch, self.from_then_on = factor, micro_batch, from_then_on
        self.seen: list[int] = []

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        loss = super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        step = self.state.global_step + 1
        self.seen.append(step)
        is_due = step > BAD_STEP and self.from_then_on
        is_due = is_due or (step == BAD_STEP and self.seen.count(step) == self.micro_batch + 1)
        return loss * self.factor if is_due else loss


def spoiled(factor: float, micro_batch: int, **more: Any) -> Callable[..., Trainer]:
    return lambda *args, **kwargs: Spoiled(*args, factor=factor, micro_batch=micro_batch, **more, **kwargs)


class AdapterBefore(TrainerCallback):
    """Remembers the adapter as it was when a step began."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.adapter = adapter_of(kwargs["model"])


class Spoil(TrainerCallback):
    """Puts a NaN into a parameter when a step begins, or after its update."""

    def __init__(self, part_of_name: str, *, after_update: bool = False) -> None:
        self.part_of_name, self.after_update = part_of_name, after_update

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.after_update:
            self.spoil(state, kwargs["model"])

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.after_update:
            self.spoil(state, kwargs["model"])

    @torch.no_grad()
    def spoil(self, state: Any, model: Any) -> None:
        if state.global_step + 1 == BAD_STEP:
            next(p for name, p in model.named_parameters() if self.part_of_name in name).view(-1)[0] = NAN


def assert_stopped(trainer: Any, before: AdapterBefore, step: int = BAD_STEP) -> NonFiniteError:
    """Training stops at `step` without changing anything; the error is returned."""
    with pytest.raises(NonFiniteError) as caught:
        trainer.train()
    error = caught.value
    assert error.step == step and str(error).startswith(f"step {step}") and trainer.state.global_step == step - 1
    assert same_bits(adapter_of(trainer.model), before.adapter)
    assert checkpoints() == list(range(1, step))
    saved = load_file(f"out/checkpoint-{step - 1}/adapter_model.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in saved.values())
    assert all(math.isfinite(value) for value in logged(trainer, "loss") + logged(trainer, "grad_norm"))
    return error


@pytest.mark.parametrize("micro_batch", [0, 1])
@pytest.mark.parametrize("factor", [NAN, INF, -INF])
def test_in_the_loss_of_a_micro_batch(factor: float, micro_batch: int) -> None:
    """transformers goes on, logs a loss of 0 and saves an adapter that is NaN."""
    before = AdapterBefore()
    trainer = short_trainer(rows=ROWS, callbacks=[before], trainer_class=spoiled(factor, micro_batch), **RUN)
    error = assert_stopped(trainer, before)
    assert error.micro_batch == micro_batch and error.rows == BAD_ROWS[micro_batch]
    assert "the loss is" in str(error) and "on_nonfinite='continue'" in str(error)


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("fast_path", [True, False])
def test_in_the_gradient_alone(fast_path: bool, value: float) -> None:
    """The loss is fine; no micro-batch can be blamed, so all rows of the step are named."""
    model, before = causal_lora(), AdapterBefore()
    trainer = short_trainer(model, ROWS, callbacks=[before], fast_path=fast_path, **RUN)

    def spoil(gradient: torch.Tensor) -> torch.Tensor | None:
        return gradient * value if trainer.state.global_step + 1 == BAD_STEP else None

    next(parameter for parameter in model.parameters() if parameter.requires_grad).register_hook(spoil)
    error = assert_stopped(trainer, before)
    assert "the gradient norm is" in str(error)
    assert error.micro_batch is None and error.rows == f"{BAD_ROWS[0]}, {BAD_ROWS[1]}"


@pytest.mark.parametrize("fast_path", [True, False])
def test_in_the_base_weights(fast_path: bool) -> None:
    before = AdapterBefore()
    callbacks = [Spoil("up_proj"), before]
    error = assert_stopped(short_trainer(rows=ROWS, callbacks=callbacks, fast_path=fast_path, **RUN), before)
    assert "the loss is nan" in str(error) and BAD_ROWS[0] in (error.rows or "")


@pytest.mark.parametrize("fast_path", [True, False])
@pytest.mark.parametrize("matrix", ["q_proj.lora_A", "v_proj.lora_B"])
def test_in_the_adapter(matrix: str, fast_path: bool) -> None:
    """In the loss or, where the attention hides it there, in the gradient."""
    trainer = short_trainer(rows=ROWS, callbacks=[Spoil(matrix)], fast_path=fast_path, **RUN)
    with pytest.raises(NonFiniteError, match=rf"step {BAD_STEP}\b.*rows 1[24], .* is nan"):
        trainer.train()
    assert checkpoints() == list(range(1, BAD_STEP))


@pytest.mark.parametrize("in_background", [True, False])
@pytest.mark.parametrize("every", [1, 2])
def test_an_adapter_that_an_update_has_spoiled_is_not_saved(every: int, in_background: bool) -> None:
    """Loss and gradient were fine, but the optimizer made a NaN of them (a state gone wrong, a rate too large). The loss of
    the step after it is the first to show it where a thread looks at what it writes, but the update is to blame."""
    settings = RUN | {"save_steps": every, "save_in_background": in_background}
    trainer = short_trainer(rows=ROWS, callbacks=[Spoil("q_proj.lora_A", after_update=True)], **settings)
    with pytest.raises(
        NonFiniteError, match=rf"step {BAD_STEP}: .*q_proj\.lora_A.*checkpoint-{BAD_STEP - every} is"
    ) as caught:
        trainer.train()
    assert caught.value.step == BAD_STEP
    assert checkpoints() == list(range(every, BAD_STEP, every))
    assert not list(Path("out").glob(".tmp*"))


def test_the_best_checkpoint_is_not_one_that_was_not_written() -> None:
    class EachIsBetter(Trainer):
        def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
            return {"eval_loss": -float(self.state.global_step)}

    settings = RUN | {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True}
    spoil = Spoil("q_proj.lora_A", after_update=True)
    trainer = short_trainer(rows=ROWS, eval_rows=ROWS[:4], callbacks=[spoil], trainer_class=EachIsBetter, **settings)
    with pytest.raises(NonFiniteError, match=f"step {BAD_STEP}: the update"):
        trainer.train()
    assert trainer.state.best_model_checkpoint == f"out/checkpoint-{BAD_STEP - 1}"


def spoiled_adapter(*callbacks: TrainerCallback, **settings: Any) -> Trainer:
    spoil = Spoil("q_proj.lora_A", after_update=True)
    trainer: Trainer = short_trainer(rows=ROWS, callbacks=[spoil, *callbacks], **(RUN | settings))
    return trainer


def test_who_passes_over_the_error_hears_it_again() -> None:
    """A callback that saves by hand, whatever comes of it: no other step is blamed for the weights."""

    class SaveAnyhow(TrainerCallback):
        def __init__(self) -> None:
            self.heard: list[Exception] = []

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == BAD_STEP:
                try:
                    trainer.save_model("by-hand")
                except NonFiniteError as error:
                    self.heard.append(error)

    save_anyhow = SaveAnyhow()
    trainer = spoiled_adapter(save_anyhow)
    with pytest.raises(NonFiniteError, match=f"step {BAD_STEP}: the update"):
        trainer.train()
    assert len(save_anyhow.heard) == 1


@pytest.mark.parametrize("in_background", [True, False])
def test_broken_weights_are_told_apart_from_a_full_disk(monkeypatch: pytest.MonkeyPatch, in_background: bool) -> None:
    begin = CheckpointStore.begin

    def begin_or_fail(store: CheckpointStore, step: int) -> Any:
        if step == BAD_STEP:
            raise CheckpointError("no space left", path=store.root)
        return begin(store, step)

    monkeypatch.setattr(CheckpointStore, "begin", begin_or_fail)
    with pytest.raises(NonFiniteError, match=f"step {BAD_STEP}: the update"):
        spoiled_adapter(save_in_background=in_background).train()


def test_a_step_that_goes_wrong_after_a_save_that_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(store: CheckpointStore, step: int) -> Any:
        raise CheckpointError("no space left", path=store.root)

    monkeypatch.setattr(CheckpointStore, "begin", fail)
    with pytest.raises(NonFiniteError, match=f"step {BAD_STEP}, micro-batch 0") as caught:
        short_trainer(rows=ROWS, trainer_class=spoiled(NAN, 0), **RUN).train()  # the third save in a row fails then
    assert any("no space left" in note for note in caught.value.__notes__)


def test_another_error_ends_the_run_before_the_thread_is_heard() -> None:
    class Stop(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == BAD_STEP:
                trainer._run.saves.writer.wait()
                raise KeyError("of the user")

    trainer: Any = spoiled_adapter(Stop())
    with pytest.raises(KeyError, match="of the user") as caught:
        trainer.train()
    assert any(f"step {BAD_STEP}: the update made weights NaN" in note for note in caught.value.__notes__)
    assert any("checkpoint not written: step 4" in line for line in trainer.notices.lines)
    assert checkpoints() == list(range(1, BAD_STEP))


def test_an_adapter_that_is_nan_is_saved_where_that_was_asked_for() -> None:
    trainer = short_trainer(
        rows=ROWS, callbacks=[Spoil("q_proj.lora_A", after_update=True)], on_nonfinite="continue", **RUN
    )
    assert trainer.train().global_step == 10 and checkpoints() == list(range(1, 11))


def test_a_loss_that_explodes() -> None:
    """Finite at first, then larger and larger until it is not: no checkpoint holds anything but numbers."""
    trainer = short_trainer(rows=ROWS, learning_rate=1e35, max_grad_norm=0.0, optim="sgd", **RUN)
    with pytest.raises(NonFiniteError) as caught:
        trainer.train()
    assert 1 < caught.value.step <= 10 and caught.value.rows
    assert checkpoints() == list(range(1, caught.value.step))
    for step in checkpoints():
        saved = load_file(f"out/checkpoint-{step}/adapter_model.safetensors")
        assert all(torch.isfinite(tensor).all() for tensor in saved.values()), step


def test_the_stopped_run_can_be_resumed() -> None:
    with pytest.raises(NonFiniteError):
        short_trainer(rows=ROWS, trainer_class=spoiled(NAN, 0), **RUN).train()
    whole = short_trainer(rows=ROWS, **(RUN | {"output_dir": "whole", "fast_path": False}))
    whole.train()
    resumed = short_trainer(rows=ROWS, fast_path=False, **RUN)
    resumed.train(resume_from_checkpoint=True)
    assert same_bits(adapter_of(resumed.model), adapter_of(whole.model))


def test_going_on_as_transformers_does() -> None:
    """`on_nonfinite="continue"`: the update is made, and the log leaves the bad loss out."""
    trainer = short_trainer(rows=ROWS, on_nonfinite="continue", trainer_class=spoiled(NAN, 0), **RUN)
    assert trainer.train().global_step == 10
    assert not all(torch.isfinite(tensor).all() for tensor in adapter_of(trainer.model).values())
    assert all(math.isfinite(value) for value in logged(trainer, "loss"))
    state = json.loads(Path("out/checkpoint-10/trainer_state.json").read_text(), parse_constant=pytest.fail)
    assert state["global_step"] == 10  # and it is JSON without NaN, whatever the norm was


def test_going_on_may_be_asked_for_by_its_old_name() -> None:
    trainer = short_trainer(rows=ROWS, logging_nan_inf_filter=True, trainer_class=spoiled(NAN, 0), **RUN)
    assert trainer.args.on_nonfinite == "continue" and trainer.train().global_step == 10


# Steps without anything to learn from


def masked(rows: list[Any], numbers: range) -> list[Any]:
    return [
        row | {"labels": [IGNORED] * len(row["labels"])} if number in numbers else row
        for number, row in enumerate(rows)
    ]


@pytest.mark.parametrize("fast_path", [True, False])
def test_a_step_without_labels_changes_nothing(fast_path: bool) -> None:
    """A warning names the rows; the adapter is the same before and after, and the run goes on."""

    class Remember(TrainerCallback):
        adapters: list[Any]

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.adapters = [*getattr(self, "adapters", []), adapter_of(kwargs["model"])]

    remember = Remember()
    trainer = short_trainer(
        rows=masked(ROWS, range(12, 16)),
        callbacks=[remember],
        weight_decay=0.0,
        fast_path=fast_path,
        optim="sgd",
        **RUN,
    )
    assert trainer.train().global_step == 10
    assert same_bits(remember.adapters[2], remember.adapters[3])
    assert not same_bits(remember.adapters[3], remember.adapters[4])
    said = [line for line in trainer.notices.lines if "masked" in line]
    assert len(said) == 2 and "step 4" in said[0] and "rows 12, 13, 14, 15" in said[0]
    assert all(math.isfinite(value) for value in logged(trainer, "loss"))


@pytest.mark.parametrize("fast_path", [True, False])
def test_a_micro_batch_without_labels_is_no_harm(fast_path: bool) -> None:
    trainer = short_trainer(rows=masked(ROWS, range(12, 14)), fast_path=fast_path, **RUN)
    assert trainer.train().global_step == 10
    assert all(math.isfinite(value) for value in logged(trainer, "loss") + logged(trainer, "grad_norm"))


@pytest.mark.parametrize("fast_path", [True, False])
def test_a_first_step_without_labels_is_refused(fast_path: bool) -> None:
    """It is rather a wrong template or length than chance; nothing is written."""
    trainer = short_trainer(rows=masked(ROWS, range(4)), fast_path=fast_path, **RUN)
    with pytest.raises(DataError, match=r"first step \(rows 0, 1, 2, 3\) is masked"):
        trainer.train()
    assert checkpoints() == []


# Gradients that do not arrive


class Detached(Trainer):
    """A loss that does not depend on the adapter, from one step on."""

    detached_from = 1

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        loss = super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        is_due = self.state.global_step + 1 >= self.detached_from
        return torch.tensor(1.0, requires_grad=True) * loss.detach() if is_due else loss


def test_nothing_receives_a_gradient_in_the_first_step() -> None:
    trainer = short_trainer(rows=ROWS, trainer_class=Detached, **RUN)
    before = adapter_of(trainer.model)
    with pytest.raises(ModelError, match="no trainable parameter received a gradient in the first step"):
        trainer.train()
    assert same_bits(adapter_of(trainer.model), before) and checkpoints() == []


def test_nothing_receives_a_gradient_in_a_later_step() -> None:
    """A step that learns nothing is allowed (a schedule of losses); without gradients the optimizer moves nothing."""

    class Later(Detached):
        detached_from = BAD_STEP

    trainer = short_trainer(rows=ROWS, trainer_class=Later, **RUN)
    assert trainer.train().global_step == 10
    at_three = load_file(f"out/checkpoint-{BAD_STEP - 1}/adapter_model.safetensors")
    at_ten = load_file("out/checkpoint-10/adapter_model.safetensors")
    assert same_bits(at_three, at_ten)
