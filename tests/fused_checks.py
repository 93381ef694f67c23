"""The fused kernels against the reference in float64, on any device: what the interpreter and a GPU both have to pass.

Every check builds its inputs from a seed as views into wider buffers (rows that lie apart, as the model's are), and asks
for a result that is rounded once. Legend as in `etude.kernels.reference`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from torch import Tensor

from etude.kernels import fused, reference

NOISE = 4e-6
"""Of float32 arithmetic, relative to the largest term: sums of a row, exponentials of numbers up to 30."""

VANISHED = 1e-12
"""Activations far below it are exponentials of numbers so large that float32 cannot give them to `NOISE`."""


@dataclass(frozen=True)
class Inputs:
    """Where the tensors of a check lie and what they are."""

    device: str
    dtype: torch.dtype

    def rows(self, *shape: int, seed: int, apart: int = 16) -> Tensor:
        """Normal values in rows that are wider apart than they are wide, for every seed by another multiple of `apart`."""
        apart *= seed + 1
        generator = torch.Generator(self.device).manual_seed(seed)
        wide = torch.randn((shape[0], *shape[1:-1], shape[-1] + apart), device=self.device, generator=generator)
        return wide.to(self.dtype)[..., apart // 2 : apart // 2 + shape[-1]]

    def vector(self, size: int, *, seed: int) -> Tensor:
        return self.rows(1, size, seed=seed, apart=0)[0]


def assert_rounded_once(ours: Tensor, exact: Tensor, magnitude: Tensor) -> None:
    """`ours` is `exact` to half a step of its type (a whole one where the interpreter cuts bfloat16 off), and noise."""
    limits = torch.finfo(ours.dtype)
    steps = 1.0 if ours.dtype == torch.bfloat16 and os.environ.get("TRITON_INTERPRET") == "1" else 0.5
    allowed = steps * limits.eps * exact.abs() + NOISE * magnitude + limits.tiny * limits.eps
    excess = (ours.double() - exact).abs() - allowed
    assert bool((excess <= 0).all()), f"off by {float(excess.max()):.3g} more than rounding allows"


def row_magnitude(exact: Tensor) -> Tensor:
    return exact.abs().amax(dim=-1, keepdim=True)


def check_rms_norm(
    inputs: Inputs, T: int, D: int, *, offset: float, residual: bool, in_place: bool, apart: int
) -> None:
    h, weight = inputs.rows(T, D, seed=0, apart=apart) * 3, inputs.vector(D, seed=1)
    around = inputs.rows(T, D, seed=2, apart=apart) if residual else None
    exact = torch.empty(T, D, dtype=torch.float64, device=h.device)
    exact_scale = reference.rms_norm(
        h.double(), weight.double(), offset, 1e-6, exact, None if around is None else around.double()
    )
    out = (h if around is None else around) if in_place else inputs.rows(T, D, seed=3, apart=apart)
    scale = fused.rms_norm(h, weight, offset, 1e-6, out, around)
    assert scale.dtype == torch.float32
    torch.testing.assert_close(scale.double(), exact_scale, rtol=NOISE, atol=0.0)
    assert_rounded_once(out, exact, row_magnitude(exact))


def check_rms_norm_backward(inputs: Inputs, T: int, D: int, *, offset: float, residual: bool, apart: int) -> None:
    h, grad = inputs.rows(T, D, seed=0, apart=apart) * 3, inputs.rows(T, D, seed=1, apart=apart)
    weight = inputs.vector(D, seed=2)
    around = inputs.rows(T, D, seed=3, apart=apart) if residual else None
    scale = torch.rsqrt(h.double().square().mean(dim=1) + 1e-6).float()
    exact = reference.rms_norm_backward(
        grad.double(), h.double(), weight.double(), offset, scale.double(), None if around is None else around.double()
    )
    ours = fused.rms_norm_backward(grad, h, weight, offset, scale, around)
    assert ours.dtype == h.dtype
    assert_rounded_once(ours, exact, row_magnitude(exact))


def check_rotate(inputs: Inputs, T: int, H: int, d: int, *, norm: bool, in_place: bool, table: torch.dtype) -> None:
    """Forward and backward; the heads are a slice of a wider buffer, as queries are of the joint projection."""
    x, grad = (inputs.rows(T, (H + 2) * d, seed=seed)[:, d:-d].unflatten(1, (H, d)) for seed in (0, 1))
    cos, sin = (Inputs(inputs.device, table).rows(T, d, seed=seed) for seed in (2, 3))
    weight = inputs.vector(d, seed=4) if norm else None
    exact_weight = None if weight is None else weight.double()
    offset, eps = (1.0, 1e-6) if norm else (0.0, 0.0)

    exact = torch.empty(T, H, d, dtype=torch.float64, device=x.device)
    exact_scale = reference.rotate(x.double(), cos.double(), sin.double(), exact, exact_weight, offset, eps)
    kept = x.transpose(0, 1).contiguous().transpose(0, 1)  # heads first in memory, as attention hands them back
    out = x if in_place else torch.empty_like(x)
    scale = fused.rotate(x, cos, sin, out, weight, offset, eps)
    assert_rounded_once(out, exact, row_magnitude(exact))
    assert (scale is None) == (weight is None)
    if scale is not None and exact_scale is not None:
        assert scale.dtype == torch.float32
        torch.testing.assert_close(scale.double(), exact_scale, rtol=NOISE, atol=0.0)

    exact_arguments = (kept.double(), exact_weight, offset, None if scale is None else scale.double())
    reference.rotate_backward(grad.double(), cos.double(), sin.double(), exact, *exact_arguments)
    out = grad if in_place else torch.empty_like(grad)
    fused.rotate_backward(grad, cos, sin, out, kept, weight, offset, scale)
    assert_rounded_once(out, exact, row_magnitude(exact))


def check_gate(inputs: Inputs, T: int, F: int, *, activation: str, in_place: bool, apart: int) -> None:
    """Forward and backward, with gates from -100 to 100 in every row that has room for them."""
    gate_up, grad = inputs.rows(T, 2 * F, seed=0, apart=apart), inputs.rows(T, F, seed=1, apart=apart)
    extremes = torch.tensor([-100.0, 100.0, -30.0, 30.0, -9.0, 9.0, 0.0, -0.0], device=grad.device)[:F]
    gate_up[:, : len(extremes)] = extremes.to(inputs.dtype)
    gates, up = gate_up.double().chunk(2, dim=1)
    exact = torch.empty(T, F, dtype=torch.float64, device=grad.device)
    exact_gradients = torch.empty(T, 2 * F, dtype=torch.float64, device=grad.device)
    reference.gate(gate_up.double(), activation, exact)
    out = inputs.rows(T, F, seed=2, apart=apart)
    fused.gate(gate_up, activation, out)
    assert_rounded_once(out, exact, exact.abs() + VANISHED)

    exact_product = torch.empty_like(exact)
    reference.gate_backward(grad.double(), gate_up.double(), activation, exact_gradients, exact_product)
    sizes = torch.cat((grad.double() * up, grad.double() * gates), dim=1).abs()
    gradients = gate_up if in_place else inputs.rows(T, 2 * F, seed=3, apart=apart)
    product = grad if in_place else inputs.rows(T, F, seed=4, apart=apart)
    fused.gate_backward(grad, gate_up, activation, gradients, product)
    assert_rounded_once(gradients, exact_gradients, sizes)
    assert_rounded_once(product, exact_product, exact_product.abs() + VANISHED)
