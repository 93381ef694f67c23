"""fp16 and bf16 on a CPU: bfloat16 autocast, said aloud, with trained weights in float32."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from etude import TrainerCallback
from etude.precision import use_number_settings
from short_run import logged, short_trainer
from tiny import causal_lora, language_rows


class Precision(TrainerCallback):
    """Remembers the dtypes that a linear layer of the base and the trained weights have while training."""

    def __init__(self) -> None:
        self.outputs: set[torch.dtype] = set()
        self.weights: set[torch.dtype] = set()
        self.gradients: set[torch.dtype] = set()

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        for name, module in given["model"].named_modules():
            if name.endswith("k_proj"):
                module.register_forward_hook(lambda _, __, output: self.outputs.add(output.dtype))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        for parameter in given["model"].parameters():
            if parameter.requires_grad:
                self.weights.add(parameter.dtype)
                self.gradients.add(parameter.grad.dtype)


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", ["fp16", "bf16"])
def test_mixed_precision_on_a_cpu(
    mode: str, base: torch.dtype, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    watcher = Precision()
    with caplog.at_level(logging.INFO):
        trainer = short_trainer(causal_lora().to(base), callbacks=[watcher], use_cpu=True, **{mode: True})
        trainer.train()
    assert watcher.outputs == {torch.bfloat16}
    assert watcher.weights == watcher.gradients == {torch.float32}
    captured = capsys.readouterr()
    said = (caplog.text + captured.out + captured.err).lower()
    assert "bfloat16" in said or "bf16" in said
    exact = short_trainer()
    exact.train()
    assert logged(trainer, "loss") == pytest.approx(logged(exact, "loss"), rel=0.02)
    assert logged(trainer, "loss") != logged(exact, "loss")


def test_evaluation_under_mixed_precision_is_finite_and_near() -> None:
    rows = language_rows(6, 50)
    mixed, exact = short_trainer(eval_rows=rows, bf16=True), short_trainer(eval_rows=rows)
    assert mixed.evaluate()["eval_loss"] == pytest.approx(exact.evaluate()["eval_loss"], rel=0.02)


def number_settings() -> list[Any]:
    cudnn = torch.backends.cudnn
    return [
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        cudnn.benchmark,
        torch.backends.cuda.matmul.allow_tf32,
        torch.utils.deterministic.fill_uninitialized_memory,
    ]


@pytest.mark.parametrize("before", [(False, False, True, False, True), (True, True, False, True, False)])
def test_settings_of_the_process_are_put_back(before: tuple[bool, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """After training and after an error alike; while it goes on, those that were asked for hold."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    own = number_settings()
    matmul, cudnn, deterministic = torch.backends.cuda.matmul, torch.backends.cudnn, torch.utils.deterministic
    try:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        cudnn.benchmark, matmul.allow_tf32, deterministic.fill_uninitialized_memory = before[2:]
        with ExitStack() as until_the_end:
            use_number_settings(SimpleNamespace(tf32=not before[3], deterministic=True), until_the_end)
            assert number_settings() == [True, False, False, not before[3], False]
        assert number_settings() == list(before)
        with pytest.raises(ZeroDivisionError), ExitStack() as until_the_end:
            use_number_settings(SimpleNamespace(tf32=None, deterministic=True), until_the_end)
            raise ZeroDivisionError
        assert number_settings() == list(before)
        with ExitStack() as until_the_end:
            use_number_settings(SimpleNamespace(tf32=None, deterministic=False), until_the_end)
            assert number_settings() == list(before)
    finally:
        torch.use_deterministic_algorithms(own[0], warn_only=own[1])
        cudnn.benchmark, matmul.allow_tf32, deterministic.fill_uninitialized_memory = own[2:]


class Settings(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seen = number_settings()


def test_a_deterministic_run_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    before, watcher = number_settings(), Settings()
    short_trainer(callbacks=[watcher], deterministic=True, max_steps=1).train()
    assert watcher.seen[:3] == [True, False, False]
    assert number_settings() == before


def test_float32_stays_float32() -> None:
    watcher = Precision()
    short_trainer(callbacks=[watcher]).train()
    assert watcher.outputs == watcher.weights == watcher.gradients == {torch.float32}


@pytest.mark.parametrize("fast_path", [True, False])
def test_an_adapter_given_in_bfloat16_is_trained_in_float32(fast_path: bool) -> None:
    """Steps of 1e-3 of a weight are below the resolution of bfloat16; the base keeps its type."""
    model = causal_lora().to(torch.bfloat16)
    trainer = short_trainer(model, bf16=True, learning_rate=1e-4, fast_path=fast_path)
    trainer.train()
    trained = {parameter.dtype for parameter in model.parameters() if parameter.requires_grad}
    frozen = {parameter.dtype for parameter in model.parameters() if not parameter.requires_grad}
    assert (trained, frozen) == ({torch.float32}, {torch.bfloat16})
