"""Decoder layers between which float32 travels while their products are in half precision: what peft's
`prepare_model_for_kbit_training` makes of a model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from test_blocks import adapted, applied, batches, loss_and_gradients, num_items_of
from torch import Tensor, nn

from etude.kernels.layers import compare
from etude.model import paths
from etude.model.paths import PackedPath, choose_path

KINDS = ("llama, all biases", "qwen2", "qwen3", "gemma3, window 4", "gemma2, window 4, soft caps")
WAYS = ("everything kept", "gates made again", "run again")


@pytest.fixture(autouse=True)
def _blocks_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paths, "_why_no_block_on_cpu", lambda model: None)


def prepared(kind: str, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """The matrices of the layers in half precision; norms, biases, embeddings, head and adapters in float32."""
    model = adapted(kind)
    for name, parameter in model.named_parameters():
        if "layers" in name and "lora" not in name and parameter.dim() == 2:
            parameter.data = parameter.data.to(dtype)
    return model


def rounded(compute: Callable[[], Tensor]) -> Iterator[Tensor]:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = compute()
    yield loss


def path_of(model: nn.Module) -> PackedPath:
    path = choose_path(model, fast_path=True, overridden=(), sample_inputs=batches()[0], training_dtype=torch.bfloat16)
    assert isinstance(path, PackedPath) and len(path.plan.blocks) == 2, path.reasons
    return path


def distance(found: dict[str, Tensor], reference: dict[str, Tensor]) -> float:
    ours, exact = (torch.cat([tensors[name].flatten().float() for name in reference]) for tensors in (found, reference))
    return float((ours - exact).norm() / exact.norm())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_are_as_near_to_float32_as_stock(kind: str, way: str) -> None:
    model, batch = prepared(kind), batches()[0]
    num_items = num_items_of(batch)
    exact = copy.deepcopy(model).float()
    reference = loss_and_gradients(exact, lambda: iter([exact(**batch, num_items_in_batch=num_items).loss]))
    theirs = loss_and_gradients(model, lambda: rounded(lambda: model(**batch, num_items_in_batch=num_items).loss))
    path = path_of(model)
    for block in path.plan.blocks:
        block.keeps_gates, block.recomputes = way != "gates made again", way == "run again"
    ours = loss_and_gradients(model, lambda: rounded(lambda: path.loss(model, batch, num_items)))
    assert ours.keys() == theirs.keys() == reference.keys()
    assert 0.0 < distance(ours, reference) < 1.1 * distance(theirs, reference)
    assert float(ours["loss"]) == pytest.approx(float(reference["loss"]), rel=2**-8)  # half a digit of bfloat16


def test_what_travels_between_layers_is_not_rounded() -> None:
    model = prepared("llama")
    path = path_of(model)
    seen: list[Tensor] = []
    for block in path.plan.blocks:
        block.layer.register_forward_hook(lambda module, inputs, output: seen.extend((inputs[0], output)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        path.loss(model, batches()[0], 10)
    assert [tensor.dtype for tensor in seen] == [torch.float32] * 4
    assert all(block.is_wide for block in path.plan.blocks)
    assert not any(torch.equal(tensor, tensor.bfloat16().float()) for tensor in seen)


def test_the_plan_of_the_memory_counts_it() -> None:
    path = path_of(prepared("llama"))
    wide = path.plan.layer_bytes()
    for block in path.plan.blocks:
        block.is_wide = False
    width = path.plan.blocks[0].qkv.in_features
    kept, without_gates, recomputed, passing, passing_forward = path.plan.layer_bytes()
    assert wide == (kept + 4 * width, without_gates + 4 * width, 2 * recomputed, passing + 6 * width, passing_forward)
    assert recomputed == 2 * width


def test_without_autocast_float32_goes_to_the_layers_own_forward() -> None:
    """A product of types that differ is an error there as well: what a model cannot do, a block does not hide."""
    model = prepared("llama")
    path = path_of(model)
    with pytest.raises(RuntimeError, match="dtype"):
        path.loss(model, batches()[0], 10)


@pytest.mark.parametrize("kind", ["llama, all biases", "gemma3, window 4"])
def test_what_float16_does_not_hold_reaches_no_gradient(kind: str) -> None:
    """Massive activations (Sun et al., arXiv 2402.17762) pass between layers in float32; only their norm is rounded."""
    with torch.autocast("cpu", dtype=torch.float16), applied(prepared(kind, torch.float16), torch.float16) as found:
        for block, call in found.pairs():
            hidden = call.hidden.clone()
            hidden[:, 3] = 1e5
            assert compare(block, replace(call, hidden=hidden)) < 1e-2
