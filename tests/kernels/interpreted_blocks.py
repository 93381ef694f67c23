"""Decoder layers on the fused kernels, in Triton's interpreter: run by `test_fused` in a process of its own."""

from __future__ import annotations

import copy

import pytest
import torch
from test_block_adapters import (
    BUILT,
    DROPPING,
    agreed,
    dropped,
    seed_drawn,
)
from test_blocks import (
    ADAPTERS,
    KINDS,
    adapted,
    applied,
    assert_block_equals_layer,
    assert_equal,
    batches,
    loss_and_gradients,
    with_blocks,
)
from test_wide_residuals import prepared

from etude.kernels import block as block_module
from etude.kernels import fused
from etude.kernels import magnitude as magnitude_module
from etude.kernels import projection as projection_module
from etude.kernels.layers import compare


@pytest.fixture(autouse=True)
def fused_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (block_module, magnitude_module, projection_module):
        monkeypatch.setattr(module, "operations", lambda device: fused)


@pytest.mark.parametrize("kind", KINDS)
def test_a_block_of_fused_kernels_equals_its_layer(kind: str) -> None:
    model = adapted(kind, r=5, rank_pattern={"layers.1.mlp.down_proj": 40})
    with applied(model, torch.float32) as found:
        for block, call in found.pairs():
            assert_block_equals_layer(block, call, 1e-5)


@pytest.mark.parametrize("adapter", ["q and v", "down and k"])
def test_layers_without_an_adapter_beside_others(adapter: str) -> None:
    with applied(adapted("qwen2", **ADAPTERS[adapter]), torch.float32) as found:
        block, call = found.pairs()[0]
        assert_block_equals_layer(block, call, 1e-5)


@pytest.mark.parametrize("name", ["DoRA of zero, llama, all biases", "DoRA after LoRA, gemma3, window 4"])
def test_a_block_with_numbers_of_rows_equals_its_layer(name: str) -> None:
    with applied(BUILT[name](), torch.float32) as found:
        for block, call in found.pairs():
            assert_block_equals_layer(block, call, 1e-5)


def test_a_block_that_drops_equals_its_layer_that_drops_the_same() -> None:
    with applied(dropped(DROPPING["DoRA, down and k"]()), torch.float32) as found:
        block, call = found.pairs()[0]
        torch.manual_seed(0)
        agreed(block, seed_drawn())
        torch.manual_seed(0)
        assert_block_equals_layer(block, call, 1e-5)


@pytest.mark.parametrize("kind", ["qwen2", "gemma3, window 4"])
def test_gradients_added_in_place_are_those_of_autograd(kind: str) -> None:
    model = adapted(kind, rank_pattern={"q_proj": 4, "up_proj": 1}, alpha_pattern={"k_proj": 1})
    batch = batches()[0]
    path = with_blocks(model, batch)
    expected = loss_and_gradients(model, lambda: iter([path.loss(model, batch, 10)]))
    expected.pop("loss")
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for parameter in trained.values():
        parameter.grad = torch.ones_like(parameter)
    places = {name: p.grad for name, p in trained.items()}
    path.plan.accumulate_in_place()
    path.loss(model, batch, 10).backward()
    assert all(p.grad is places[name] for name, p in trained.items())
    assert_equal({name: p.grad - 1 for name, p in trained.items() if p.grad is not None}, expected, 1e-4)

    with torch.no_grad():  # an update, where they lie: all new adapters are taken over in one launch
        for parameter in trained.values():
            parameter.mul_(1.1)
    ours = path.loss(model, batch, 10).detach()
    torch.testing.assert_close(ours, model(**batch, num_items_in_batch=10).loss.detach(), rtol=1e-5, atol=0.0)

    other = copy.deepcopy(model)
    own = with_blocks(other, batch)
    before = {name: p.grad.clone() for name, p in trained.items() if p.grad is not None}
    own.loss(other, batch, 10).backward()
    assert all(torch.equal(p.grad, before[name]) for name, p in trained.items() if p.grad is not None)


def test_a_parameter_with_a_hook_keeps_autograd() -> None:
    model = adapted("llama")
    batch = batches()[0]
    path = with_blocks(model, batch)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    arrived: list[torch.Tensor] = []
    trained[0].register_post_accumulate_grad_hook(arrived.append)
    expected = loss_and_gradients(model, lambda: iter([path.loss(model, batch, 10)]))
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    path.plan.accumulate_in_place()
    path.loss(model, batch, 10).backward()
    assert len(arrived) == 2
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    expected.pop("loss")
    assert_equal(found, expected, 1e-5)


@pytest.mark.parametrize("way", ["everything kept", "gates made again"])
@pytest.mark.parametrize("kind", ["qwen3", "gemma3, window 4"])
def test_a_block_of_which_the_residuals_are_wider(kind: str, way: str) -> None:
    with torch.autocast("cpu", dtype=torch.float16), applied(prepared(kind, torch.float16), torch.float16) as found:
        for block, call in found.pairs():
            assert block.is_wide and call.hidden.dtype == torch.float32
            block.keeps_gates = way == "everything kept"
            assert compare(block, call) < 1e-2
