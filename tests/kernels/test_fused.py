"""The elementwise operations of a layer: their gradients against autograd, and the fused kernels against them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from etude.kernels import reference
from etude.kernels.reference import GELU_TANH, SILU
from interpreted import needs_triton, run_interpreted

INTERPRETED = Path(__file__).with_name("interpreted_fused.py")
INTERPRETED_BLOCKS = Path(__file__).with_name("interpreted_blocks.py")


def values(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def plain_norm(h: Tensor, factor: Tensor) -> Tensor:
    return factor * h / (h.square().mean(dim=-1, keepdim=True) + 1e-3).sqrt()


def plain_rotation(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x * cos[:, None] + torch.cat((-x[..., half:], x[..., :half]), dim=-1) * sin[:, None]


def plain_gate(gates: Tensor, up: Tensor, activation: str) -> Tensor:
    return (functional.silu(gates) if activation == SILU else functional.gelu(gates, approximate="tanh")) * up


@needs_triton
def test_the_kernels_in_the_interpreter() -> None:
    run_interpreted(INTERPRETED)


@needs_triton
@pytest.mark.nightly
def test_whole_layers_in_the_interpreter() -> None:
    run_interpreted(INTERPRETED_BLOCKS)


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("with_residual", [False, True])
def test_the_gradient_of_rms_norm(offset: float, with_residual: bool) -> None:
    h, weight, grad = values(5, 12, seed=0).requires_grad_(), values(12, seed=1), values(5, 12, seed=2)
    around = values(5, 12, seed=3) if with_residual else None
    plain = plain_norm(h, offset + weight)
    (theirs,) = torch.autograd.grad(plain, h, grad)

    out = torch.empty(5, 12, dtype=torch.float64)
    scale = reference.rms_norm(h.detach(), weight, offset, 1e-3, out, around)
    torch.testing.assert_close(out, plain.detach() if around is None else around + plain.detach())
    ours = reference.rms_norm_backward(grad, h.detach(), weight, offset, scale, around)
    torch.testing.assert_close(ours, theirs if around is None else around + theirs)


def test_the_gradient_of_a_norm_before_an_adapter() -> None:
    """The output reaches the loss twice: as it is, and through A."""
    h, weight, grad = values(5, 12, seed=0).requires_grad_(), values(12, seed=1), values(5, 12, seed=2)
    update = reference.Reduction(values(5, 3, seed=3), values(3, 12, seed=4))
    plain = plain_norm(h, weight)
    (theirs,) = torch.autograd.grad((plain, plain @ update.A.t()), h, (grad, update.grad_reduced))

    scale = reference.rms_norm(h.detach(), weight, 0.0, 1e-3, torch.empty(5, 12, dtype=torch.float64))
    ours = reference.rms_norm_backward(grad, h.detach(), weight, 0.0, scale, grad, update)
    torch.testing.assert_close(ours, grad + theirs)


@pytest.mark.parametrize("normed", [False, True])
def test_the_gradient_of_rotate(normed: bool) -> None:
    x, grad = values(4, 3, 10, seed=0).requires_grad_(), values(4, 3, 10, seed=1)
    # Not a real rotation's cos and sin, whose halves are alike: each half has to meet its own.
    cos, sin, weight = values(4, 10, seed=2), values(4, 10, seed=3), values(10, seed=4) if normed else None
    plain = plain_rotation(x if weight is None else plain_norm(x, 1.0 + weight), cos, sin)
    (theirs,) = torch.autograd.grad(plain, x, grad)

    out = x.detach().clone()
    scale = reference.rotate(out, cos, sin, out, weight, 1.0, 1e-3)
    torch.testing.assert_close(out, plain.detach())
    reference.rotate_backward(grad, cos, sin, grad, x.detach(), weight, 1.0, scale)
    torch.testing.assert_close(grad, theirs)


@pytest.mark.parametrize("normed", [False, True])
def test_the_gradient_of_rotated_heads(normed: bool) -> None:
    """Three heads of queries, two of keys and values, in this order in every row."""
    qkv, cos, sin = values(4, 7 * 10, seed=0).requires_grad_(), values(4, 10, seed=1), values(4, 10, seed=2)
    norms = [reference.HeadNorm(values(10, seed=seed), 1.0, 1e-3) if normed else None for seed in (3, 4)]
    x = [part.unflatten(1, (-1, 10)) for part in qkv.split([30, 20, 20], dim=1)]
    query, key = (
        plain_rotation(heads if norm is None else plain_norm(heads, 1.0 + norm.weight), cos, sin)
        for heads, norm in zip(x, norms, strict=False)
    )
    grads = [values(4, heads, 10, seed=5 + heads) for heads in (3, 2, 2)]
    (theirs,) = torch.autograd.grad((query, key, x[2]), qkv, grads)

    outputs = [torch.empty(4, heads, 10, dtype=torch.float64) for heads in (3, 2, 2)]
    scales = reference.rotate_heads(qkv.detach(), cos, sin, *outputs, *norms)
    for ours, plain in zip(outputs, (query, key, x[2]), strict=True):
        torch.testing.assert_close(ours, plain.detach())
    undone = [
        None if norm is None or scale is None else reference.NormedHeads(heads.detach(), *norm[:2], scale)
        for heads, norm, scale in zip(x, norms, scales, strict=False)
    ]
    gradient = torch.empty(4, 70, dtype=torch.float64)
    reference.rotate_heads_backward(*grads, cos, sin, gradient, *undone)
    torch.testing.assert_close(gradient, theirs)


@pytest.mark.parametrize("activation", [SILU, GELU_TANH])
def test_the_gradient_of_gate(activation: str) -> None:
    gate_up, grad = values(4, 22, seed=0) * 4, values(4, 11, seed=1)
    gate_up[0, :4] = torch.tensor([-100.0, 100.0, -20.0, 0.0])
    gate_up.requires_grad_()
    plain = plain_gate(*gate_up.chunk(2, dim=1), activation)
    (theirs,) = torch.autograd.grad(plain, gate_up, grad)

    product, out = torch.empty(4, 11, dtype=torch.float64), torch.empty(4, 22, dtype=torch.float64)
    reference.gate(gate_up.detach(), activation, product)
    torch.testing.assert_close(product, plain.detach())
    reference.gate_backward(grad, gate_up.detach(), activation, out, grad)
    torch.testing.assert_close(out, theirs)
    torch.testing.assert_close(grad, plain.detach())
