"""The chunked head against torch's cross entropy of all logits: loss and gradient, in every number format."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from etude.errors import ModelError
from etude.kernels.cross_entropy import CPU_ROWS_MAX, CPU_ROWS_MIN, default_rows_per_chunk, linear_cross_entropy

N, D, V = 37, 19, 101


def problem(
    num_rows: int = N, dtype: torch.dtype = torch.float64, spread: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    hidden = (torch.randn(num_rows, D, dtype=torch.float64) * spread).to(dtype).requires_grad_()
    weight = torch.randn(V, D, dtype=torch.float64).to(dtype)
    return hidden, weight, torch.randint(0, V, (num_rows,))


def reference(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Loss and gradient in float64 from all logits at once."""
    hidden = hidden.detach().double().requires_grad_()
    logits = functional.linear(hidden, weight.double(), None if bias is None else bias.double()) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    loss = functional.cross_entropy(logits, targets, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, hidden)
    return loss.detach(), gradient


@pytest.mark.parametrize("rows_per_chunk", [1, 7, 36, 37, 38, 1000])
def test_float64_equals_torch_wherever_the_chunks_end(rows_per_chunk: int) -> None:
    hidden, weight, targets = problem()
    loss = linear_cross_entropy(hidden, weight, targets, rows_per_chunk=rows_per_chunk)
    (gradient,) = torch.autograd.grad(loss, hidden)
    expected_loss, expected_gradient = reference(hidden, weight, targets)
    assert loss.dtype == torch.float64
    torch.testing.assert_close(loss.detach(), expected_loss, rtol=1e-13, atol=0)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("options", [{"softcap": 5.0}, {"scale": 0.0625}, {"scale": 3.0, "softcap": 7.0}], ids=str)
def test_capped_and_scaled_logits(options: dict[str, Any]) -> None:
    hidden, weight, targets = problem()
    bias = torch.randn(V, dtype=torch.float64)
    loss = linear_cross_entropy(hidden, weight, targets, bias_V=bias, rows_per_chunk=10, **options)
    (gradient,) = torch.autograd.grad(loss, hidden)
    expected_loss, expected_gradient = reference(hidden, weight, targets, bias, **options)
    torch.testing.assert_close(loss.detach(), expected_loss, rtol=1e-13, atol=0)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-11, atol=1e-13)


def test_gradcheck() -> None:
    hidden, weight, targets = problem(num_rows=3)
    assert torch.autograd.gradcheck(
        lambda h: linear_cross_entropy(h, weight, targets, softcap=4.0, rows_per_chunk=2), (hidden,)
    )


def test_float32_is_within_rounding_of_torch() -> None:
    hidden, weight, targets = problem(dtype=torch.float32)
    loss = linear_cross_entropy(hidden, weight, targets, rows_per_chunk=8)
    (gradient,) = torch.autograd.grad(loss, hidden)
    expected_loss, expected_gradient = reference(hidden, weight, targets)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.detach().double(), expected_loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"softcap": 30.0}, {"scale": 0.5}], ids=str)
def test_bfloat16_is_as_close_as_torch_in_bfloat16(options: dict[str, Any]) -> None:
    hidden, weight, targets = problem(num_rows=400, dtype=torch.bfloat16)
    loss = linear_cross_entropy(hidden, weight, targets, rows_per_chunk=64, **options)
    (gradient,) = torch.autograd.grad(loss, hidden)
    expected_loss, expected_gradient = reference(hidden, weight, targets, **options)
    assert loss.dtype == torch.float32
    assert gradient.dtype == torch.bfloat16
    assert float((loss.detach().double() - expected_loss).abs() / expected_loss) < 2e-3
    error = (gradient.double() - expected_gradient).norm() / expected_gradient.norm()
    assert float(error) < 1.5e-2


def test_bfloat16_keeps_the_gradient_of_confident_tokens() -> None:
    """p = 0.999 rounds to 1 in bfloat16: softmax - onehot alone would say that nothing is left to learn."""
    hidden = torch.tensor([[1.0]], dtype=torch.bfloat16, requires_grad=True)
    weight = torch.tensor([[7.0], [0.0]], dtype=torch.bfloat16)
    loss = linear_cross_entropy(hidden, weight, torch.tensor([0]))
    (gradient,) = torch.autograd.grad(loss, hidden)
    expected_loss, expected_gradient = reference(hidden, weight, torch.tensor([0]))
    torch.testing.assert_close(loss.detach().double(), expected_loss, rtol=5e-3, atol=0)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-2, atol=0)


def test_bfloat16_hopeless_tokens_give_a_finite_loss() -> None:
    hidden = torch.tensor([[1.0]], dtype=torch.bfloat16)
    weight = torch.tensor([[200.0], [0.0]], dtype=torch.bfloat16)
    assert 80 < float(linear_cross_entropy(hidden, weight, torch.tensor([1]))) < 250


def test_float16_survives_a_loss_scale_beyond_its_range() -> None:
    hidden, weight, targets = problem(num_rows=5, dtype=torch.float16, spread=0.1)
    loss = linear_cross_entropy(hidden, weight, targets)
    (gradient,) = torch.autograd.grad(loss / 2**20, hidden, torch.tensor(2.0**17))
    _, expected = reference(hidden, weight, targets)
    torch.testing.assert_close(gradient.double() * 8, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nan_is_not_hidden(dtype: torch.dtype) -> None:
    hidden, weight, targets = problem(num_rows=3, dtype=dtype)
    with torch.no_grad():
        hidden[1, 0] = float("nan")
    assert torch.isnan(linear_cross_entropy(hidden, weight, targets)).item()


def test_no_rows_give_a_zero_loss_and_zero_gradients() -> None:
    hidden, weight, targets = problem(num_rows=0)
    loss = linear_cross_entropy(hidden, weight, targets)
    loss.backward()
    assert loss.item() == 0.0
    assert hidden.grad is not None
    assert hidden.grad.shape == (0, D)


def test_without_gradients_only_the_loss_is_computed() -> None:
    hidden, weight, targets = problem()
    with torch.no_grad():
        loss = linear_cross_entropy(hidden, weight, targets)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, reference(hidden, weight, targets)[0])


def test_the_graph_can_be_walked_twice() -> None:
    hidden, weight, targets = problem()
    loss = linear_cross_entropy(hidden, weight, targets)
    (first,) = torch.autograd.grad(loss, hidden, retain_graph=True)
    (second,) = torch.autograd.grad(2 * loss, hidden)
    torch.testing.assert_close(second, 2 * first)


def test_under_autocast_the_head_works_in_the_autocast_type() -> None:
    hidden, weight, targets = problem(num_rows=64, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, targets)
    (gradient,) = torch.autograd.grad(loss, hidden)
    rounded = hidden.detach().bfloat16()
    assert gradient.dtype == torch.float32
    assert loss.item() == linear_cross_entropy(rounded, weight.bfloat16(), targets).item()


def test_a_trainable_head_is_refused() -> None:
    hidden, weight, targets = problem()
    with pytest.raises(ModelError, match="trainable head"):
        linear_cross_entropy(hidden, weight.requires_grad_(), targets)


def test_never_are_all_logits_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every matrix product of the head writes into a buffer of one chunk."""
    written = []
    multiply = torch.mm

    def watched(left: Tensor, right: Tensor, *, out: Tensor) -> Tensor:
        written.append(tuple(out.shape))
        return multiply(left, right, out=out)

    monkeypatch.setattr(torch, "mm", watched)
    hidden, weight, targets = problem()
    linear_cross_entropy(hidden, weight, targets, rows_per_chunk=16)
    assert [shape for shape in written if shape[1] == V] == [(16, V), (16, V), (5, V)]


def test_chunks_of_a_cpu_shrink_with_the_vocabulary() -> None:
    cpu = torch.device("cpu")
    assert default_rows_per_chunk(cpu, vocabulary=1000) == CPU_ROWS_MAX
    assert default_rows_per_chunk(cpu, vocabulary=262_144) == CPU_ROWS_MIN
    assert CPU_ROWS_MIN < default_rows_per_chunk(cpu, vocabulary=151_936) < CPU_ROWS_MAX
