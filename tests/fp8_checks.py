"""The fused kernels in e4m3 against their definition, on any device: what the interpreter and a GPU both have to pass."""

from __future__ import annotations

import torch
from torch import Tensor

from etude.kernels import fused_fp8, reference
from etude.kernels.fp8 import LARGEST, Quantised
from fused_checks import NOISE, Inputs, assert_rounded_once, row_magnitude


def check_nearest_codes(inputs: Inputs, T: int, D: int, *, apart: int) -> None:
    """Rows made of e4m3 numbers times a power of two, each a quarter of a step further from zero: those are the codes.

    No number lies where rounding carries into the exponent, which Triton's interpreter gets wrong for this type.
    """
    exponents = (inputs.rows(T, D, seed=0, apart=apart).float() * 3).round().clamp(-6, 7)
    eighths = (inputs.rows(T, D, seed=1).float().abs() * 4).floor().clamp(0, 7)
    signs = torch.where(inputs.rows(T, D, seed=2) < 0, -1.0, 1.0)
    codes = signs * (1 + eighths / 8) * torch.exp2(exponents)
    further = signs * (1 + eighths / 8 + 1 / 32) * torch.exp2(exponents)
    codes[:, 0], further[:, 0] = LARGEST, LARGEST
    codes[:, D // 2], further[:, D // 2] = 0.0, 0.0
    row_scales = torch.exp2(torch.arange(T, device=codes.device) % 7 - 5.0)[:, None]
    x = inputs.rows(T, D, seed=3, apart=apart)
    x.copy_(further * row_scales)
    quantised = fused_fp8.quantise_rows(x)
    assert quantised.codes.shape[0] % 16 == quantised.scales.shape[0] % 16 == 0
    torch.testing.assert_close(quantised.scales[:T], row_scales, rtol=1e-6, atol=0.0)
    torch.testing.assert_close(quantised.codes[:T].float(), codes, rtol=0.0, atol=0.0)


def check_zero_rows(inputs: Inputs) -> None:
    x = inputs.rows(3, 40, seed=0)
    x[1] = 0.0
    quantised = fused_fp8.quantise_rows(x)
    assert not bool(quantised.codes[1].float().any())
    assert bool((quantised.scales[:3] > 0).all())


def check_rms_norm(inputs: Inputs, T: int, D: int, *, offset: float, apart: int) -> None:
    h, weight = inputs.rows(T, D, seed=0, apart=apart) * 3, inputs.vector(D, seed=1)
    exact = torch.empty(T, D, dtype=torch.float64, device=h.device)
    exact_scale = reference.rms_norm(h.double(), weight.double(), offset, 1e-6, exact)
    out = inputs.rows(T, D, seed=3, apart=apart)
    quantised, scale = fused_fp8.rms_norm_quantised(h, weight, offset, 1e-6, out)
    torch.testing.assert_close(scale.double(), exact_scale, rtol=NOISE, atol=0.0)
    assert_rounded_once(out, exact, row_magnitude(exact))
    assert_same_codes(quantised, out)


def assert_same_codes(quantised: Quantised, x: Tensor) -> None:
    """What a pass of its own makes of x, bit for bit."""
    separate, rows = fused_fp8.quantise_rows(x), slice(0, x.shape[0])
    assert torch.equal(quantised.codes[rows].view(torch.uint8), separate.codes[rows].view(torch.uint8))
    assert torch.equal(quantised.scales[rows], separate.scales[rows])
