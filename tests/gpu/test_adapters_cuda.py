"""DoRA, several active adapters and biases of LoRA on layers of our own, on a CUDA device: eager, in graphs, and as peft
trains them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

from etude import Trainer, TrainerCallback, TrainingArguments
from tiny import Padded, language_rows, tiny_llama, with_lora

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

WIDE = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}


def with_dora() -> Any:
    model = with_lora(tiny_llama(**WIDE).bfloat16(), use_dora=True, task_type="CAUSAL_LM")
    for name, parameter in model.named_parameters():
        if "lora_magnitude" in name:  # not the norms that they begin with
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model


def with_magnitudes_of_zero() -> Any:
    model = with_dora()
    for name, parameter in model.named_parameters():
        if "lora_magnitude" in name:
            parameter.data[1::3] = 0.0
    return model


def with_dora_that_drops() -> Any:
    """Little: peft draws other elements to drop."""
    model = with_lora(tiny_llama(**WIDE).bfloat16(), use_dora=True, lora_dropout=0.05, task_type="CAUSAL_LM")
    for name, parameter in model.named_parameters():
        if "lora_magnitude" in name:
            parameter.data *= 1.2
    return model


def on_few_layers() -> Any:
    """The gates have no adapter at all."""
    return with_lora(tiny_llama(**WIDE).bfloat16(), target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


def with_dora_after_lora() -> Any:
    model = with_lora(tiny_llama(**WIDE).bfloat16(), task_type="CAUSAL_LM")
    model.add_adapter(
        "second", LoraConfig(r=5, use_dora=True, target_modules=["q_proj", "up_proj", "o_proj"], task_type="CAUSAL_LM")
    )
    model.base_model.set_adapter(["default", "second"])
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.requires_grad_(True)
        if "lora_magnitude" in name:
            parameter.data *= 1.3
    return model


def with_two_adapters() -> Any:
    model = with_lora(tiny_llama(**WIDE).bfloat16(), target_modules=["q_proj", "gate_proj"], task_type="CAUSAL_LM")
    targets = ["q_proj", "v_proj", "up_proj", "down_proj"]
    model.add_adapter("second", LoraConfig(r=5, lora_alpha=3, target_modules=targets, task_type="CAUSAL_LM"))
    model.base_model.set_adapter(["default", "second"])
    for name, parameter in model.named_parameters():
        if ".second." in name:
            parameter.requires_grad_(True)
    return model


def with_biases() -> Any:
    biased = {"attention_bias": True, "mlp_bias": True}
    model = with_lora(tiny_llama(**WIDE, **biased).bfloat16(), lora_bias=True, task_type="CAUSAL_LM")
    for name, parameter in model.named_parameters():
        if "lora_B" in name and name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    return model


class GraphsSeen(TrainerCallback):
    """The graphs that there were after the last step."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer, self.num_graphs, self.failure = trainer, 0, None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer.graphs is not None:
            self.num_graphs, self.failure = self.trainer.graphs.num_graphs, self.trainer.graphs.failure


RUNS: dict[str, tuple[Callable[[], Any], float]] = {
    "DoRA": (with_dora, 2e-2),
    "DoRA of zero": (with_magnitudes_of_zero, 2e-2),
    "DoRA after LoRA": (with_dora_after_lora, 2e-2),
    "DoRA that drops": (with_dora_that_drops, 5e-2),
    "two adapters": (with_two_adapters, 2e-2),
    "biases": (with_biases, 2e-2),
    "on few layers": (on_few_layers, 2e-2),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_is_that_of_peft(tmp_path: Path, name: str) -> None:
    build, tolerance = RUNS[name]
    losses = []
    for fast_path, cuda_graphs in ((False, False), (True, False), (True, True)):
        trainer = Trainer(
            model=build(),
            args=TrainingArguments(
                output_dir=str(tmp_path), per_device_train_batch_size=8, max_steps=16, logging_steps=1,
                learning_rate=1e-3, bf16=True, save_strategy="no", disable_tqdm=True, fast_path=fast_path,
                cuda_graphs=cuda_graphs,
            ),
            train_dataset=language_rows(32, seed=1, shortest=8, longest=60),
            data_collator=Padded(),
        )  # fmt: skip
        seen = GraphsSeen(trainer)
        trainer.add_callback(seen)
        trainer.train()
        if fast_path:
            assert trainer.path.name == "packed", trainer.path.reasons
            assert any("2 decoder layers with their own" in line for line in trainer.path.reasons), trainer.path.reasons
            assert (seen.num_graphs > 0) == cuda_graphs and seen.failure is None
        losses.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
    stock, eager, graphed = losses
    assert sum(stock[-4:]) < sum(stock[:4])  # of the same rows
    assert eager == pytest.approx(stock, rel=tolerance)
    assert graphed == pytest.approx(eager, rel=2e-3 if tolerance < 5e-2 else tolerance)
