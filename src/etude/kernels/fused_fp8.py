"""The operations of `fp8` as Triton kernels: rows are rounded where they are made, and read once where they are not.

One program holds one row in registers, finds its largest number and writes it in e4m3; the norm before it is rounded to its
own type first, so that the result is the one of a pass of its own. Importing this module needs Triton. Legend as in
`reference`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from etude.kernels import fused
from etude.kernels.fp8 import LARGEST, SMALLEST_ROW, Quantised

MAX_ROW_WARPS = 16
"""A row of 32,768 in 16 warps is 64 numbers per thread: it still fits the registers."""


def quantise_rows(x_TD: Tensor) -> Quantised:
    """`fp8.quantise_rows`; rows may lie apart."""
    T, D = x_TD.shape
    quantised = Quantised.empty(T, D, x_TD.device)
    block, num_warps = _row_shape(D)
    _quantise_rows[(T,)](
        x_TD, quantised.codes, quantised.scales, x_TD.stride(0), LARGEST, SMALLEST_ROW, D, block, num_warps=num_warps
    )
    return quantised


def rms_norm_quantised(
    h_TD: Tensor, weight_D: Tensor, offset: float, eps: float, out_TD: Tensor
) -> tuple[Quantised, Tensor]:
    """`fp8.rms_norm_quantised`."""
    T, D = h_TD.shape
    quantised = Quantised.empty(T, D, h_TD.device)
    scale_T = torch.empty(T, dtype=torch.float32, device=h_TD.device)
    block, num_warps = _row_shape(D)
    _rms_norm_quantised[(T,)](
        h_TD, weight_D, out_TD, scale_T, quantised.codes, quantised.scales, h_TD.stride(0), out_TD.stride(0),
        offset, eps, LARGEST, SMALLEST_ROW, D, block, num_warps=num_warps,
    )  # fmt: skip
    return quantised, scale_T


def _row_shape(D: int) -> tuple[int, int]:
    """(BLOCK, warps) of a program that holds a row in registers."""
    block = triton.next_power_of_2(D)
    return block, min(max(block // fused.ELEMENTS_PER_WARP, 1), MAX_ROW_WARPS)


@triton.jit
def _quantise_rows(
    x: tl.tensor,
    codes: tl.tensor,
    scales: tl.tensor,
    x_stride: int,
    largest: float,
    smallest_row: float,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    wide = tl.load(x + row * x_stride + columns, mask=columns < D, other=0.0).to(tl.float32)
    _store_row(wide, codes, scales, row, largest, smallest_row, D, BLOCK)


@triton.jit
def _rms_norm_quantised(
    h: tl.tensor,
    weight: tl.tensor,
    out: tl.tensor,
    scale: tl.tensor,
    codes: tl.tensor,
    scales: tl.tensor,
    h_stride: int,
    out_stride: int,
    offset: float,
    eps: float,
    largest: float,
    smallest_row: float,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < D
    wide = tl.load(h + row * h_stride + columns, mask=inside, other=0.0).to(tl.float32)
    factor = offset + tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    row_scale = tl.rsqrt(tl.sum(wide * wide) / D + eps)
    tl.store(scale + row, row_scale)
    result = (wide * row_scale * factor).to(out.dtype.element_ty)
    tl.store(out + row * out_stride + columns, result, mask=inside)
    # A masked lane is 0 * (offset + 0): it takes no part in the largest number.
    _store_row(result.to(tl.float32), codes, scales, row, largest, smallest_row, D, BLOCK)


@triton.jit
def _store_row(
    wide: tl.tensor,
    codes: tl.tensor,
    scales: tl.tensor,
    row: tl.tensor,
    largest: float,
    smallest_row: float,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Write a row in e4m3, with its scale. A NaN or an infinity ends as NaN among the codes."""
    columns = tl.arange(0, BLOCK)
    peak = tl.maximum(tl.max(tl.abs(wide)), smallest_row)
    tl.store(scales + row, peak / largest)
    scaled = wide * (largest / peak)
    tl.store(codes + row * D + columns, scaled.to(codes.dtype.element_ty), mask=columns < D)
