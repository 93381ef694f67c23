"""A base of bitsandbytes on the packed path, on a CUDA device: as close to full precision as the general path, in graphs."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import prepare_model_for_kbit_training
from torch import Tensor, nn

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)
if importlib.util.find_spec("bitsandbytes") is None:
    pytest.skip("needs bitsandbytes (pip install bitsandbytes)", allow_module_level=True)

from etude import Trainer, TrainingArguments
from etude.kernels.quantized import QuantizedProjection
from etude.model.paths import PackedPath, choose_path
from quantized_models import quantised, quantised_lora
from tiny import IGNORED, Padded, language_rows, tiny_llama, tiny_qwen3, with_lora

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:MatMul8bitLt. inputs will be cast:UserWarning"),
]

WIDE = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "num_hidden_layers": 3, "initializer_range": 0.05}
MODELS: dict[str, Any] = {"llama": lambda **shape: tiny_llama(attention_bias=True, **shape), "qwen3": tiny_qwen3}


def loss_and_gradients(model: nn.Module, loss: Tensor) -> tuple[Tensor, Tensor]:
    model.zero_grad()
    loss.backward()
    gradients = [p.grad.flatten() for p in model.parameters() if p.requires_grad and p.grad is not None]
    return loss.detach().double(), torch.cat(gradients).double()


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


@pytest.mark.parametrize(
    ("kind", "nested", "gradients"), [("nf4", True, 3e-2), ("nf4", False, 3e-2), ("int8", False, 8e-2)]
)
@pytest.mark.parametrize("lora", [{}, {"use_dora": True}], ids=["LoRA", "DoRA"])
@pytest.mark.parametrize("name", MODELS)
def test_the_packed_path_against_the_general_one(
    name: str, lora: dict[str, Any], kind: str, nested: bool, gradients: float
) -> None:
    """Both round to bfloat16; 8-bit layers of bitsandbytes round their activations to 8 bits besides."""
    model = quantised_lora(MODELS[name](**WIDE).bfloat16(), kind, "cuda", nested=nested, **lora)
    for key, parameter in model.named_parameters():
        if "lora_magnitude" in key:  # not the norms that they begin with
            parameter.data *= torch.empty_like(parameter).uniform_(0.5, 1.5)
    rows = language_rows(16, seed=3, shortest=5, longest=40)
    batch = {key: value.cuda() for key, value in Padded()(rows).items()}
    num_items = int((batch["labels"][:, 1:] != IGNORED).sum())
    with torch.autocast("cuda", dtype=torch.bfloat16):
        theirs = loss_and_gradients(model, model(**batch, num_items_in_batch=num_items).loss)
    path = choose_path(model, fast_path=True, overridden=(), sample_inputs=batch, training_dtype=torch.bfloat16)
    assert isinstance(path, PackedPath), path.reasons
    projections = [projection for block in path.plan.blocks for projection in block.projections]
    assert projections and all(isinstance(projection, QuantizedProjection) for projection in projections), path.reasons
    with torch.autocast("cuda", dtype=torch.bfloat16):
        ours = loss_and_gradients(model, path.loss(model, batch, num_items))
    print(f"{name} {kind}: loss {relative(ours[0], theirs[0]):.1e}, gradients {relative(ours[1], theirs[1]):.1e}")
    assert relative(ours[0], theirs[0]) < 1e-2
    assert relative(ours[1], theirs[1]) < gradients
    largest = max(projection.out_features * projection.in_features for projection in projections)
    assert projections[0].workspace._buffer.numel() == largest


@pytest.mark.parametrize("lora", [{}, {"use_dora": True}], ids=["LoRA", "DoRA"])
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_run_in_graphs_is_the_eager_one(tmp_path: Path, kind: str, lora: dict[str, Any]) -> None:
    losses = []
    for cuda_graphs in (False, True):
        settings: dict[str, Any] = {
            "output_dir": str(tmp_path), "per_device_train_batch_size": 8, "max_steps": 12, "logging_steps": 1,
            "learning_rate": 1e-3, "bf16": True, "save_strategy": "no", "disable_tqdm": True, "cuda_graphs": cuda_graphs,
        }  # fmt: skip
        trainer = Trainer(
            model=quantised_lora(tiny_llama(**WIDE).bfloat16(), kind, "cuda", **lora),
            args=TrainingArguments(**settings),
            train_dataset=language_rows(32, seed=1, shortest=8, longest=60),
            data_collator=Padded(),
        )
        trainer.train()
        assert any("bitsandbytes" in reason for reason in trainer.path.reasons), trainer.path.reasons
        if cuda_graphs:
            assert trainer.graphs is None or trainer.graphs.failure is None
        losses.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
    eager, graphed = losses
    assert graphed == pytest.approx(eager, rel=1e-2)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_base_prepared_by_peft_is_trained_by_our_own_layers(tmp_path: Path, kind: str) -> None:
    """What travels between the layers is float32 then."""
    losses = []
    for fast_path, cuda_graphs in ((False, False), (True, False), (True, True)):
        base = prepare_model_for_kbit_training(
            quantised(tiny_llama(**WIDE).bfloat16(), kind, "cuda"), use_gradient_checkpointing=False
        )
        trainer = Trainer(
            model=with_lora(base, task_type="CAUSAL_LM", init_lora_weights=False).train(),
            args=TrainingArguments(
                output_dir=str(tmp_path), per_device_train_batch_size=8, max_steps=12, logging_steps=1,
                learning_rate=1e-3, bf16=True, save_strategy="no", disable_tqdm=True, fast_path=fast_path,
                cuda_graphs=cuda_graphs,
            ),
            train_dataset=language_rows(32, seed=1, shortest=8, longest=60),
            data_collator=Padded(),
        )  # fmt: skip
        trainer.train()
        if fast_path:
            assert any("3 decoder layers with their own" in line for line in trainer.path.reasons), trainer.path.reasons
        losses.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
    stock, eager, graphed = losses
    assert eager == pytest.approx(stock, rel=2e-2)
    assert graphed == pytest.approx(eager, rel=1e-2)
