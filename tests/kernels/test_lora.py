"""The LoRA layer that a CPU computes in bfloat16 as one operation, against the formula in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora import Linear
from torch import Tensor, nn

from etude.kernels.lora import lean_forward

SHAPE, OUTPUTS, RANK, SCALING = (2, 9, 48), 32, 4, 2.0


def layer_of(*, bias: bool = False, dropout: float = 0.0) -> Any:
    torch.manual_seed(0)
    config = LoraConfig(r=RANK, lora_alpha=int(RANK * SCALING), lora_dropout=dropout, init_lora_weights=False)
    base = nn.Linear(SHAPE[-1], OUTPUTS, bias=bias).to(torch.bfloat16).requires_grad_(False)
    layer: Any = Linear(base, "default", config, RANK, int(RANK * SCALING))
    for part in (layer.lora_A, layer.lora_B):  # as get_peft_model leaves them
        part["default"].float()
    return layer


def results_of(layer: Any, x: Tensor) -> list[Tensor]:
    """The output, and the gradients of x, A and B."""
    output = lean_forward(layer, x)
    direction = torch.linspace(-1, 1, output.numel()).view_as(output).to(output.dtype)
    gradients = torch.autograd.grad(
        output, [x, layer.lora_A["default"].weight, layer.lora_B["default"].weight], direction
    )
    return [output.detach(), *gradients]


def input_of() -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16).requires_grad_()


@pytest.mark.parametrize("autocast", [False, True], ids=["own type", "autocast"])
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
def test_output_and_gradients_are_those_of_the_formula(bias: bool, autocast: bool) -> None:
    layer, x = layer_of(bias=bias), input_of()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        ours = results_of(layer, x)
    wide = x.detach().double().requires_grad_()
    A, B = (part["default"].weight.detach().double().requires_grad_() for part in (layer.lora_A, layer.lora_B))
    output = nn.functional.linear(wide, layer.base_layer.weight.double()) + SCALING * wide @ A.t() @ B.t()
    if bias:
        output = output + layer.base_layer.bias.double()
    direction = torch.linspace(-1, 1, output.numel()).view_as(output).to(torch.bfloat16).double()
    theirs = [output.detach(), *torch.autograd.grad(output, [wide, A, B], direction)]
    for our_tensor, their_tensor, dtype in zip(ours, theirs, [torch.bfloat16] * 2 + [torch.float32] * 2, strict=True):
        assert our_tensor.dtype == dtype and our_tensor.shape == their_tensor.shape
        assert float((our_tensor.double() - their_tensor).norm() / their_tensor.norm()) <= 6e-3


def test_a_hook_on_the_frozen_layer_is_called() -> None:
    layer, calls = layer_of(), []
    layer.base_layer.register_forward_hook(lambda *arguments: calls.append(arguments))
    lean_forward(layer, input_of())
    assert len(calls) == 1


def test_what_is_dropped_reaches_the_adapter_alone() -> None:
    layer, x = layer_of(dropout=0.5).train(), input_of()
    torch.manual_seed(3)
    dropped = layer.lora_dropout["default"](x)
    expected = layer.base_layer(x).double() + SCALING * dropped.double() @ layer.lora_A[
        "default"
    ].weight.double().t() @ (layer.lora_B["default"].weight.double().t())
    torch.manual_seed(3)
    ours = lean_forward(layer, x).double()
    assert float(((ours - expected).norm() / expected.norm()).detach()) <= 8e-3
