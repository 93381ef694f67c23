"""Blocks whose adapters are more than a plain one each (DoRA, several at once, LoRA with a bias), against peft's layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig
from test_blocks import (
    ADAPTERS,
    FLOAT32_NORMS,
    adapted,
    applied,
    assert_block_equals_layer,
    assert_equal,
    batches,
    loss_and_gradients,
    num_items_of,
    with_blocks,
)
from torch import nn

from etude import Trainer, TrainingArguments
from etude.errors import ModelError
from etude.kernels.block import Block
from etude.kernels.layers import block_of, compare
from etude.model.capabilities import causal_model, decoder_of
from tiny import Padded, adapter_of, assert_same_bits, language_rows

MODELS = ("llama, all biases", "qwen3", "gemma3, window 4")


def with_norms_of_its_own(kind: str, **lora: Any) -> nn.Module:
    """DoRA whose magnitudes are not the norms that they begin with."""
    model = adapted(kind, use_dora=True, **lora)
    for name, parameter in model.named_parameters():
        if "lora_magnitude" in name:
            with torch.no_grad():
                parameter.mul_(torch.empty_like(parameter).uniform_(0.5, 1.5))
    return model


def with_two(kind: str, *, trains_second: bool = True, **lora: Any) -> nn.Module:
    """Two active adapters of different layers, ranks and scalings."""
    model = adapted(kind, target_modules=["q_proj", "k_proj", "gate_proj", "o_proj"], **lora)
    targets = ["q_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]
    second = {"r": 5, "lora_alpha": 3, "target_modules": targets, "init_lora_weights": False}
    model.add_adapter("second", LoraConfig(**{"task_type": "CAUSAL_LM"} | lora | second))
    model.base_model.set_adapter(["default", "second"])
    for name, parameter in model.named_parameters():
        if ".second." in name:
            parameter.requires_grad_(trains_second)
    return model


def with_bias(kind: str, **lora: Any) -> nn.Module:
    """Biases of LoRA on the layers that have one of their own, which peft asks for."""
    targets = ["q_proj", "v_proj"] if kind == "qwen2" else "all-linear"
    model = adapted(kind, lora_bias=True, target_modules=targets, **lora)
    for name, parameter in model.named_parameters():
        if "lora_B" in name and name.endswith("bias"):
            nn.init.normal_(parameter)
    return model


BUILT: dict[str, Callable[[], nn.Module]] = {
    **{f"DoRA, {kind}": lambda kind=kind: with_norms_of_its_own(kind) for kind in MODELS},
    **{
        f"DoRA, {name}": lambda name=name: with_norms_of_its_own("qwen2", **ADAPTERS[name])
        for name in ("q and v", "down and k", "a rank and an alpha each", "rslora", "in the second layer alone")
    },
    **{f"two, {kind}": lambda kind=kind: with_two(kind) for kind in MODELS},
    "two, one of them frozen": lambda: with_two("qwen2", trains_second=False),
    "two with biases": lambda: with_two("llama, all biases", lora_bias=True),
    "bias, all layers": lambda: with_bias("llama, all biases"),
    "bias, q and v": lambda: with_bias("qwen2"),
}  # type: ignore[misc]


@pytest.mark.parametrize("way", ["everything kept", "gates made again", "run again"])
@pytest.mark.parametrize("name", BUILT)
def test_a_block_equals_its_layer(name: str, way: str) -> None:
    """Output, gradient of the input and gradient of every parameter, magnitudes and biases among them."""
    model = BUILT[name]().double()
    with applied(model, torch.float64) as found:
        assert found.plan.explain() == ["2 decoder layers with their own forward and backward pass"]
        for block, call in found.pairs():
            block.keeps_gates, block.recomputes = way != "gates made again", way == "run again"
            assert compare(block, call) < FLOAT32_NORMS
            assert_block_equals_layer(block, call, FLOAT32_NORMS)


@pytest.mark.parametrize("name", ["DoRA, qwen3", "two, qwen3", "two, one of them frozen", "bias, all layers"])
def test_steps_of_a_model_equal_those_of_peft(name: str) -> None:
    """The adapters as they are after every update."""
    model = BUILT[name]()
    first, second = batches(2)
    num_items = num_items_of(first) + num_items_of(second)
    path = with_blocks(model, first)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(3):
        theirs = loss_and_gradients(
            model, lambda: (model(**batch, num_items_in_batch=num_items).loss for batch in (first, second))
        )
        ours = loss_and_gradients(model, lambda: (path.loss(model, batch, num_items) for batch in (first, second)))
        assert_equal(ours, theirs, 1e-5)
        optimizer.step()
        losses.append(float(ours["loss"]))
    assert losses[0] > losses[1] > losses[2]


@pytest.mark.parametrize("name", ["DoRA, llama, all biases", "two with biases", "bias, q and v"])
def test_undo_restores_the_model(name: str) -> None:
    model = BUILT[name]()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    batch = batches()[0]
    path = with_blocks(model, batch)
    assert_same_bits(dict(model.state_dict()), before)
    path.loss(model, batch, 10).backward()
    path.plan.undo()
    assert_same_bits(dict(model.state_dict()), before)
    for key, parameter in model.named_parameters():
        assert parameter.untyped_storage().nbytes() == parameter.nbytes, f"{key} holds on to the memory of others"


# peft takes a bias of its own for a matrix of which a part is missing.
@pytest.mark.filterwarnings("ignore:Adapter 'default'. .* LoRA tensor.s. have invalid shape")
@pytest.mark.parametrize("name", ["DoRA, qwen3", "two, qwen3", "bias, all layers"])
def test_a_run_says_that_its_layers_are_our_own(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    results = []
    for fast_path in (True, False):
        model = BUILT[name]()
        arguments = TrainingArguments(
            "out", max_steps=4, logging_steps=1, learning_rate=1e-3, fast_path=fast_path, report_to="none", seed=3
        )
        trainer = Trainer(model, arguments, train_dataset=language_rows(8), data_collator=Padded())
        trainer.train()
        said = "2 decoder layers with their own forward and backward pass" in capsys.readouterr().err
        assert said == fast_path
        results.append(adapter_of(model) | {"loss": torch.tensor([r["loss"] for r in trainer.state.log_history[:4]])})
    assert_equal(results[0], results[1], 1e-4)


@pytest.mark.parametrize("build", [with_two, with_bias])
def test_under_dropout_the_gradient_is_that_of_what_was_computed(build: Callable[..., nn.Module]) -> None:
    """Against differences along one direction in all adapters at once; peft draws other elements to drop."""
    model = build("llama, all biases", lora_dropout=0.4).double()
    with applied(model, torch.float64) as found:
        block, call = found.pairs()[0]
        trained = [p for p in block.layer.parameters() if p.requires_grad]
        weights = torch.randn(call.hidden.shape, dtype=torch.float64)

        def value() -> torch.Tensor:
            found.plan.refresh()
            torch.manual_seed(0)
            return (block.run(call.hidden, call.position_embeddings, **call.options) * weights).sum()

        gradients = torch.autograd.grad(value(), trained)
        directions = [torch.randn_like(p) for p in trained]
        slope = sum(float((g * d).sum()) for g, d in zip(gradients, directions, strict=True))
        values = []
        for step in (1e-6, -2e-6):
            with torch.no_grad():
                for parameter, direction in zip(trained, directions, strict=True):
                    parameter += step * direction
                values.append(float(value()))
        assert (values[0] - values[1]) / 2e-6 == pytest.approx(slope, rel=1e-6)


def test_a_change_of_the_active_adapters_is_noticed() -> None:
    model = with_two("llama")
    path = with_blocks(model, batches()[0])
    path.plan.require_unchanged()
    model.base_model.set_adapter("second")
    with pytest.raises(ModelError, match="otherwise than when training began"):
        path.plan.require_unchanged()


def why_not(model: nn.Module) -> str:
    found = block_of(decoder_of(causal_model(model)).layers[0], torch.float32)
    assert not isinstance(found, Block)
    return found


def test_what_peft_computes_in_turn_stays_with_peft() -> None:
    """Each DoRA rescales what those before it have made of the output."""
    assert why_not(with_two("llama", use_dora=True)) == "DoRA with another active adapter (q_proj)"


def with_three(**lora: Any) -> nn.Module:
    model = adapted("llama", **lora)
    for name in ("second", "third"):
        model.add_adapter(name, model.peft_config["default"])
    model.base_model.set_adapter(["default", "second", "third"])
    return model


def test_more_adapters_than_can_drop_apart() -> None:
    assert why_not(with_three(lora_dropout=0.1)) == "3 active adapters with dropout on a layer"
    model = with_three().double()
    with applied(model, torch.float64) as found:
        for block, call in found.pairs():
            assert_block_equals_layer(block, call, FLOAT32_NORMS)
