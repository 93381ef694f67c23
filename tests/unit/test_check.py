"""`Trainer.check`: it agrees where etude is right, finds a kernel that is not, and leaves nothing behind."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from etude import StepCheck, Trainer
from etude import check as check_module
from etude.errors import ConfigError, DataError
from etude.kernels import plan, reference
from etude.model import paths
from short_run import short_trainer
from tiny import (
    Padded,
    StreamDataset,
    Watched,
    assert_same_bits,
    causal_lora,
    language_rows,
    tiny_bert,
    tiny_gemma3,
    tiny_llama,
    tiny_qwen3,
    with_lora,
)

MODELS = {"llama": tiny_llama, "qwen3": tiny_qwen3, "gemma3": tiny_gemma3}
TRAINED = {"task_type": "CAUSAL_LM", "init_lora_weights": False}
"""An adapter as training leaves it: no gradient is zero."""


def adapted(name: str = "llama", **lora: Any) -> nn.Module:
    return with_lora(MODELS[name](), **(TRAINED | lora))


def check(model: nn.Module | None = None, **settings: Any) -> StepCheck:
    settings = {"gradient_accumulation_steps": 2} | settings
    found: StepCheck = short_trainer(adapted() if model is None else model, **settings).check()
    return found


# -- what it finds ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("budget", [None, 16], ids=["whole", "cut"])
def test_our_gradient_is_that_of_stock_peft(name: str, budget: int | None) -> None:
    found = check(adapted(name), tokens_per_micro_batch=budget)
    assert found.path == "packed" and any("own forward and backward" in reason for reason in found.path_reasons)
    assert (found.micro_batches > 1) == (budget is not None)
    assert found.is_fine and found.is_of_every_tensor and found.tolerance == 1e-4
    assert 0 < found.max_error < 1e-4 and found.loss_error < 1e-5
    assert len(found.tensors) == 2 * 7 * 2 and all(tensor.norm > 0 for tensor in found.tensors)
    assert all(tensor.cosine > 1 - 1e-6 for tensor in found.tensors)
    errors = [tensor.error for tensor in found.tensors]
    assert errors == sorted(errors, reverse=True)


def test_the_zero_gradients_of_an_untrained_adapter() -> None:
    found = check(adapted(init_lora_weights=True))
    assert found.is_fine
    zero = [tensor for tensor in found.tensors if "lora_A" in tensor.name]
    assert len(zero) == 14
    assert {(tensor.error, tensor.cosine, tensor.norm) for tensor in zero} == {(0.0, 1.0, 0.0)}


def wrong_gate(
    grad: Tensor, gates: Tensor, activation: str, out: Tensor, product: Tensor, right: Any = reference.gate_backward
) -> None:
    right(grad, gates, activation, out, product)
    out.mul_(1.1)


def test_a_wrong_kernel_is_found_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "gate_backward", wrong_gate)
    monkeypatch.setattr(plan, "compare", lambda block, call: 0.0)  # the probe would have found it first
    found = check()
    assert not found.is_fine
    of_gates = [tensor for tensor in found.tensors if ".1.mlp.gate_proj" in tensor.name or ".1.mlp.up" in tensor.name]
    assert [tensor.error for tensor in of_gates] == pytest.approx([0.1] * 4, rel=1e-3)
    right = [tensor for tensor in found.tensors if ".1.mlp.down_proj" in tensor.name]
    assert max(tensor.error for tensor in right) < 1e-5  # computed before the fault
    assert found.loss_error < 1e-5
    name = found.tensors[0].name.removeprefix("base_model.model.").removesuffix(".default.weight")
    assert "NOT fine" in str(found) and f"worst is {name}. " in str(found)


def test_in_bfloat16_ours_is_as_near_to_float32_as_stock() -> None:
    model = adapted().to(torch.bfloat16)
    found = short_trainer(model, gradient_accumulation_steps=2, bf16=True).check(reference_dtype="float32")
    assert (found.precision, found.tolerance, found.is_of_every_tensor) == ("bfloat16", 5e-2, False)
    assert found.is_fine
    assert found.reference_loss == pytest.approx(found.stock_loss, rel=1e-2)
    assert found.reference_errors is not None
    ours, stock = found.reference_errors
    assert 1e-3 < ours < 1.5 * stock < 0.15
    assert "against float32" in str(found)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(("ours", "is_fine"), [(0.05, True), (0.1002, True), (0.102, False), (math.nan, False)])
def test_what_stock_misses_the_float32_model_by_as_well(ours: float, is_fine: bool) -> None:
    """Two errors of the same size: which is a hair larger is chance."""
    model = adapted().to(torch.bfloat16)
    found = short_trainer(model, bf16=True).check(reference_dtype="float32")
    assert replace(found, gradient_error=0.07, reference_errors=(ours, 0.1)).is_fine == is_fine
    assert not replace(found, gradient_error=0.07, reference_errors=None).is_fine


@pytest.mark.parametrize(("failures", "is_there"), [(1, True), (2, False)])
def test_a_reference_that_does_not_fit_computes_its_layers_again(
    monkeypatch: pytest.MonkeyPatch, failures: int, is_there: bool
) -> None:
    def compute(trainer: Any, *arguments: Any) -> Any:
        in_float32 = trainer.precision.autocast_dtype is None
        recomputes = any(getattr(module, "gradient_checkpointing", False) for module in trainer.model.modules())
        if in_float32:
            tried.append(recomputes)
        if in_float32 and len(tried) <= failures:
            raise torch.OutOfMemoryError("out of memory")
        return original(trainer, *arguments)

    original, model = check_module._compute, adapted().to(torch.bfloat16)
    expected = short_trainer(model, bf16=True).check(reference_dtype="float32")
    tried: list[bool] = []
    monkeypatch.setattr(check_module, "_compute", compute)
    found = short_trainer(model, bf16=True).check(reference_dtype="float32")
    assert tried == [False, True]
    assert (found.reference_errors is not None) == is_there
    if is_there:
        assert found.reference_loss == pytest.approx(expected.reference_loss, rel=1e-6)
        assert found.reference_errors == pytest.approx(expected.reference_errors, rel=1e-4)
    assert ("no float32 reference: memory ran out" in found.notes) != is_there
    assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def test_a_wrong_kernel_in_bfloat16_is_farther_from_float32_than_stock(monkeypatch: pytest.MonkeyPatch) -> None:
    def useless_gate(*arguments: Any) -> None:
        wrong_gate(*arguments)
        arguments[3].mul_(0.5)

    monkeypatch.setattr(reference, "gate_backward", useless_gate)
    monkeypatch.setattr(plan, "compare", lambda block, call: 0.0)
    monkeypatch.setattr(paths, "_why_no_block_on_cpu", lambda model: None)  # the model's own layers have no such kernel
    trainer = short_trainer(adapted().to(torch.bfloat16), bf16=True)
    assert not trainer.check(reference_dtype="float32").is_fine
    assert "reference_dtype='float32' shows which" in str(trainer.check())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("settings", [{}, {"bf16": True}, {"bf16": True, "gradient_checkpointing": True}])
def test_on_a_gpu(settings: dict[str, Any]) -> None:
    """With gradients added in place and CUDA graphs, as they are trained there."""
    model = adapted().to(torch.bfloat16 if "bf16" in settings else torch.float32)
    trainer = short_trainer(model, use_cpu=False, gradient_accumulation_steps=2, **settings)
    tensors, generator = tensors_of(model), torch.cuda.get_rng_state()
    found = trainer.check(reference_dtype="float32")
    assert found.path == "packed" and any("own forward and backward" in reason for reason in found.path_reasons)
    assert found.is_fine, str(found)
    assert_same_bits(tensors_of(model), tensors)
    assert torch.equal(torch.cuda.get_rng_state(), generator)
    assert trainer.train().global_step == 6


def test_dropout_is_off_in_both() -> None:
    found = check(adapted(lora_dropout=0.5))
    assert found.path == "packed" and found.max_error < 1e-4


def test_recomputed_layers_are_checked_as_they_run() -> None:
    model = adapted()
    found = check(model, gradient_checkpointing=True)
    assert found.is_fine and found.path == "packed"
    assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    assert not model.get_base_model().model.embed_tokens._forward_hooks  # type: ignore[operator, union-attr]


# -- the general path -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "settings"),
    [
        (causal_lora, {"fast_path": False}),
        (tiny_bert, {}),
    ],
    ids=["turned off", "classifier"],
)
def test_on_the_general_path_there_is_nothing_to_compare(build: Callable[[], Any], settings: dict[str, Any]) -> None:
    if build is tiny_bert:
        rows = [{**row, "labels": number % 3} for number, row in enumerate(language_rows(8))]
        settings = {"rows": rows}
    found = check(build(), **settings)
    assert found.path == "general" and found.is_fine and found.max_error == 0.0
    assert found.loss == found.stock_loss > 0
    assert "nothing to compare" in str(found) and "gradient of" not in str(found)


def test_a_loss_that_is_not_finite_is_not_fine() -> None:
    class Broken(Trainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            return super().compute_loss(*args, **kwargs) * float("nan")

    found = check(trainer_class=Broken)
    assert found.path == "general" and not found.is_fine
    assert "not finite" in str(found)


# -- what it leaves ---------------------------------------------------------------------------------------------------


def parts_of(model: nn.Module) -> dict[str, Any]:
    """Everything of a model that is not a tensor and that a step might change."""
    return {
        name: (
            module.training,
            sorted(vars(module)),
            [list(hooks) for key, hooks in vars(module).items() if key.endswith("_hooks")],
            "forward" in vars(module),
        )
        for name, module in model.named_modules()
    }


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    tensors = {name: value.detach().clone() for name, value in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            tensors[f"gradient of {name}"] = parameter.grad.clone()
    return tensors


@pytest.mark.parametrize("settings", [{}, {"fast_path": False}, {"gradient_checkpointing": True}, {"bf16": True}])
def test_everything_is_left_as_it_was(settings: dict[str, Any]) -> None:
    model = adapted(lora_dropout=0.1)
    trainer = short_trainer(model, save_strategy="steps", save_steps=1, **settings)
    model.get_base_model().model.layers[0].eval()  # type: ignore[operator, union-attr]
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter)
    gradients = [parameter.grad for parameter in model.parameters()]
    config, attributes = dict(vars(model.config)), dict(vars(trainer))
    tensors, parts = tensors_of(model), parts_of(model)
    generators = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # type: ignore[index]

    assert trainer.check(reference_dtype="float32").is_fine

    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == generators  # type: ignore[index]
    assert_same_bits(tensors_of(model), tensors)
    assert all(now.grad is was for now, was in zip(model.parameters(), gradients, strict=True))
    assert parts_of(model) == parts
    assert vars(model.config) == config
    assert vars(trainer) == attributes
    assert list(Path.cwd().iterdir()) == []


def test_training_afterwards_is_training_without_a_check() -> None:
    results = []
    for checks in (False, True):
        collate = Watched(Padded())
        model = adapted(lora_dropout=0.1)
        trainer = short_trainer(
            model, collate=collate, gradient_accumulation_steps=2, output_dir=f"out-{checks}", max_steps=4
        )
        if checks:
            trainer.check()
            checked_rows = list(collate.batches)
            collate.batches.clear()
        output = trainer.train()
        assert not checks or checked_rows == collate.batches[: len(checked_rows)]
        results.append((tensors_of(model), output.training_loss, [e.get("loss") for e in trainer.state.log_history]))
        if checks:
            assert trainer.check().is_fine  # also after training, with its adapter
    (tensors, *losses), (tensors_after, *losses_after) = results
    assert_same_bits(tensors_after, tensors)
    assert losses_after == losses


def test_a_step_that_fails_leaves_everything_as_it_was() -> None:
    class Failing(Padded):
        def __call__(self, rows: Any) -> Any:
            batch = super().__call__(rows)
            batch["labels"].fill_(-100)
            return batch

    model = adapted()
    trainer = short_trainer(model, collate=Failing())
    parts, attributes = parts_of(model), dict(vars(trainer))
    with pytest.raises(DataError, match="every label of the first step"):
        trainer.check()
    assert parts_of(model) == parts
    assert vars(trainer) == attributes


def test_a_stream_is_read_anew_and_an_iterator_is_refused() -> None:
    assert check(rows=StreamDataset(language_rows(8)), max_steps=2).is_fine
    with pytest.raises(DataError, match="would use up its first rows"):
        check(rows=iter(language_rows(8)), max_steps=2)


def test_a_loader_of_the_user_draws_the_same_order_afterwards() -> None:
    class OwnLoader(Trainer):
        loader: Any = None

        def get_train_dataloader(self) -> Any:
            if self.loader is None:
                generator = torch.Generator().manual_seed(3)
                self.loader = torch.utils.data.DataLoader(
                    self.train_dataset, batch_size=2, shuffle=True, generator=generator, collate_fn=self.data_collator
                )
            return self.loader

    trainer = short_trainer(adapted(), trainer_class=OwnLoader)
    generator = trainer.get_train_dataloader().generator
    before = generator.get_state()
    assert trainer.check().is_fine
    assert torch.equal(generator.get_state(), before)


def test_what_cannot_be_a_reference() -> None:
    with pytest.raises(ConfigError, match="reference_dtype: is 'float32' or None, got 'bfloat16'"):
        short_trainer(adapted()).check(reference_dtype="bfloat16")
