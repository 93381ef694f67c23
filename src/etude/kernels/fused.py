"""The operations of `reference` as Triton kernels: one pass over memory each, the same signatures and results.

They take bfloat16, float16 and float32, compute in float32 and round once. All are bound by memory, so what counts is
that every element is read and written once, in pieces of 16 bytes, with enough of them under way: 32 elements per thread
where a row or a token is one program (two kilobytes per warp and tensor), 8 where elements are independent.

An output may be the very view that is read: a program reads all of its elements before it writes them, and no other
program reads them. Importing this module needs Triton. Legend as in `reference`; BLOCK, HEADS and COLUMNS are what one
program covers, powers of two.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from etude.kernels.fused_gate import gate as gate
from etude.kernels.fused_gate import gate_backward as gate_backward
from etude.kernels.fused_gate import gate_updated as gate_updated
from etude.kernels.fused_gate import gate_updated_backward as gate_updated_backward

ELEMENTS_PER_WARP = 1024
"""32 per thread: in bfloat16 four loads of 16 bytes under way per thread and tensor, and still no register is spilled."""

MAX_ROW_WARPS = 16
"""A row of 16,384 takes them all; longer ones take more registers instead, more warps wait too long for each other."""

ROTATE_ELEMENTS = 4096
"""Elements of one program of `rotate`: 32 heads of 128 by four warps, so that cos and sin are read once for them."""

ELEMENT_COLUMNS, ELEMENT_WARPS = 1024, 4
"""One 16-byte piece per thread and tensor: small programs fill the last block of an odd width best."""

COPY_ELEMENTS = 4096

PRODUCT_ROWS, PRODUCT_COLUMNS, MOST_RANKS = 64, 128, 128
"""A tile of `add_product`: a row of it is 256 bytes of memory; its factors come out of the cache. Above this rank the
matrix units are what takes time."""


def rms_norm(
    h_TD: Tensor, weight_D: Tensor, offset: float, eps: float, out_TD: Tensor, residual_TD: Tensor | None = None
) -> Tensor:
    """`reference.rms_norm`; `out` may be `h` or `residual`."""
    T, D = h_TD.shape
    scale_T = torch.empty(T, dtype=torch.float32, device=h_TD.device)
    residual_stride = 0 if residual_TD is None else residual_TD.stride(0)
    strides = (h_TD.stride(0), residual_stride, out_TD.stride(0))
    block, num_warps = _row_shape(D)
    _rms_norm[(T,)](h_TD, weight_D, residual_TD, out_TD, scale_T, *strides, offset, eps, D, block, num_warps=num_warps)
    return scale_T


def rms_norm_backward(
    grad_TD: Tensor, h_TD: Tensor, weight_D: Tensor, offset: float, scale_T: Tensor, residual_TD: Tensor | None = None
) -> Tensor:
    """`reference.rms_norm_backward`."""
    T, D = h_TD.shape
    out_TD = torch.empty((T, D), dtype=h_TD.dtype, device=h_TD.device)
    residual_stride = 0 if residual_TD is None else residual_TD.stride(0)
    strides = (grad_TD.stride(0), h_TD.stride(0), residual_stride)
    block, num_warps = _row_shape(D)
    _rms_norm_backward[(T,)](
        grad_TD, h_TD, weight_D, residual_TD, scale_T, out_TD, *strides, offset, D, block, num_warps=num_warps
    )
    return out_TD


def rotate(
    x_THd: Tensor,
    cos_Td: Tensor,
    sin_Td: Tensor,
    out_THd: Tensor,
    weight_d: Tensor | None = None,
    offset: float = 0.0,
    eps: float = 0.0,
) -> Tensor | None:
    """`reference.rotate`; `out` may be `x`."""
    T, H, d = x_THd.shape
    scale_TH = None if weight_d is None else torch.empty((T, H), dtype=torch.float32, device=x_THd.device)
    strides = (*x_THd.stride()[:2], *out_THd.stride()[:2], cos_Td.stride(0), sin_Td.stride(0))
    heads, half_block, num_warps = _head_shape(H, d)
    _rotate[(T, triton.cdiv(H, heads))](
        x_THd, cos_Td, sin_Td, out_THd, weight_d, scale_TH, *strides, offset, eps, H, d // 2, heads, half_block,
        num_warps=num_warps,
    )  # fmt: skip
    return scale_TH


def rotate_backward(
    grad_THd: Tensor,
    cos_Td: Tensor,
    sin_Td: Tensor,
    out_THd: Tensor,
    x_THd: Tensor | None = None,
    weight_d: Tensor | None = None,
    offset: float = 0.0,
    scale_TH: Tensor | None = None,
) -> None:
    """`reference.rotate_backward`; `out` may be `grad`."""
    T, H, d = grad_THd.shape
    if x_THd is None or weight_d is None or scale_TH is None:
        x_THd = weight_d = scale_TH = None
    x_strides = (0, 0) if x_THd is None else x_THd.stride()[:2]
    strides = (*grad_THd.stride()[:2], *x_strides, *out_THd.stride()[:2], cos_Td.stride(0), sin_Td.stride(0))
    heads, half_block, num_warps = _head_shape(H, d)
    _rotate_backward[(T, triton.cdiv(H, heads))](
        grad_THd, cos_Td, sin_Td, out_THd, x_THd, weight_d, scale_TH, *strides, offset, H, d // 2, heads, half_block,
        num_warps=num_warps,
    )  # fmt: skip


def drop(x_TI: Tensor, seed: Tensor, stream: int, share: float, out_TI: Tensor) -> None:
    """`reference.drop`, with Philox as its source of randomness: other elements, as many."""
    T, columns = x_TI.shape
    strides = (x_TI.stride(0), out_TI.stride(0))
    _drop[(T * triton.cdiv(columns, ELEMENT_COLUMNS),)](
        x_TI, out_TI, seed, stream, *strides, share, columns, ELEMENT_COLUMNS, num_warps=ELEMENT_WARPS
    )


def add_product(out_TI: Tensor, left_TR: Tensor, right_RI: Tensor) -> None:
    """`reference.add_product`, also for rows that are further apart than wide, which `addmm_` would copy there and back."""
    T, columns = out_TI.shape
    rank = right_RI.shape[0]
    if rank > MOST_RANKS:
        out_TI.addmm_(left_TR, right_RI)
        return
    strides = (out_TI.stride(0), left_TR.stride(0), right_RI.stride(0))
    rank_block = max(triton.next_power_of_2(rank), 16)
    _add_product[(triton.cdiv(T, PRODUCT_ROWS) * triton.cdiv(columns, PRODUCT_COLUMNS),)](
        out_TI, left_TR, right_RI, *strides, T, columns, rank, rank_block, PRODUCT_ROWS, PRODUCT_COLUMNS,
        num_warps=ELEMENT_WARPS,
    )  # fmt: skip


def copy_rows(source_TR: Tensor, out_TR: Tensor) -> None:
    """`reference.copy_rows`."""
    T, R = source_TR.shape
    block = triton.next_power_of_2(R)
    rows = max(COPY_ELEMENTS // block, 1)
    strides = (source_TR.stride(0), out_TR.stride(0))
    _copy_rows[(triton.cdiv(T, rows),)](source_TR, out_TR, *strides, T, R, rows, block, num_warps=ELEMENT_WARPS)


def _row_shape(D: int) -> tuple[int, int]:
    """(BLOCK, warps) of a program that holds a row in registers: short rows go without barriers between warps."""
    block = triton.next_power_of_2(D)
    return block, min(max(block // ELEMENTS_PER_WARP, 1), MAX_ROW_WARPS)


def _head_shape(H: int, d: int) -> tuple[int, int, int]:
    """(HEADS, HALF_BLOCK, warps) of a program that holds heads of one token in registers."""
    half_block = triton.next_power_of_2(d // 2)
    heads = min(triton.next_power_of_2(H), max(ROTATE_ELEMENTS // (2 * half_block), 1))
    return heads, half_block, max(heads * 2 * half_block // ELEMENTS_PER_WARP, 1)


@triton.jit
def _rms_norm(
    h: tl.tensor,
    weight: tl.tensor,
    residual: tl.tensor,
    out: tl.tensor,
    scale: tl.tensor,
    h_stride: int,
    residual_stride: int,
    out_stride: int,
    offset: float,
    eps: float,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < D
    wide = tl.load(h + row * h_stride + columns, mask=inside, other=0.0).to(tl.float32)
    factor = offset + tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    if residual is not None:
        around = tl.load(residual + row * residual_stride + columns, mask=inside, other=0.0).to(tl.float32)
    row_scale = tl.rsqrt(tl.sum(wide * wide) / D + eps)
    tl.store(scale + row, row_scale)
    result = wide * row_scale * factor
    if residual is not None:
        result = around + result
    tl.store(out + row * out_stride + columns, result.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _rms_norm_backward(
    grad: tl.tensor,
    h: tl.tensor,
    weight: tl.tensor,
    residual: tl.tensor,
    scale: tl.tensor,
    out: tl.tensor,
    grad_stride: int,
    h_stride: int,
    residual_stride: int,
    offset: float,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < D
    row_scale = tl.load(scale + row)
    normed = tl.load(h + row * h_stride + columns, mask=inside, other=0.0).to(tl.float32) * row_scale
    weighted = tl.load(grad + row * grad_stride + columns, mask=inside, other=0.0).to(tl.float32)
    weighted *= offset + tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    if residual is not None:
        around = tl.load(residual + row * residual_stride + columns, mask=inside, other=0.0).to(tl.float32)
    result = row_scale * (weighted - normed * (tl.sum(weighted * normed) / D))
    if residual is not None:
        result = around + result
    tl.store(out + row * D + columns, result.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _rotate(
    x: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    out: tl.tensor,
    weight: tl.tensor,
    scale: tl.tensor,
    x_stride: int,
    x_head_stride: int,
    out_stride: int,
    out_head_stride: int,
    cos_stride: int,
    sin_stride: int,
    offset: float,
    eps: float,
    H: tl.constexpr,
    HALF: tl.constexpr,
    HEADS: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1).to(tl.int64) * HEADS + tl.arange(0, HEADS)
    columns = tl.arange(0, HALF_BLOCK)
    within = columns < HALF
    inside = (heads < H)[:, None] & within[None, :]
    places = x + token * x_stride + heads[:, None] * x_head_stride + columns[None, :]
    first = tl.load(places, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(places + HALF, mask=inside, other=0.0).to(tl.float32)
    cosines, sines = cos + token * cos_stride + columns, sin + token * sin_stride + columns
    first_cos = tl.load(cosines, mask=within, other=0.0).to(tl.float32)[None, :]
    second_cos = tl.load(cosines + HALF, mask=within, other=0.0).to(tl.float32)[None, :]
    first_sin = tl.load(sines, mask=within, other=0.0).to(tl.float32)[None, :]
    second_sin = tl.load(sines + HALF, mask=within, other=0.0).to(tl.float32)[None, :]
    if weight is not None:
        squares = tl.sum(first * first + second * second, axis=1)
        head_scale = tl.rsqrt(squares / (2 * HALF) + eps)
        tl.store(scale + token * H + heads, head_scale, mask=heads < H)
        first *= head_scale[:, None] * _factor(weight, columns, offset, within)
        second *= head_scale[:, None] * _factor(weight + HALF, columns, offset, within)
    places = out + token * out_stride + heads[:, None] * out_head_stride + columns[None, :]
    first_out = first * first_cos - second * first_sin
    second_out = second * second_cos + first * second_sin
    tl.store(places, first_out.to(out.dtype.element_ty), mask=inside)
    tl.store(places + HALF, second_out.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _rotate_backward(
    grad: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    out: tl.tensor,
    x: tl.tensor,
    weight: tl.tensor,
    scale: tl.tensor,
    grad_stride: int,
    grad_head_stride: int,
    x_stride: int,
    x_head_stride: int,
    out_stride: int,
    out_head_stride: int,
    cos_stride: int,
    sin_stride: int,
    offset: float,
    H: tl.constexpr,
    HALF: tl.constexpr,
    HEADS: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1).to(tl.int64) * HEADS + tl.arange(0, HEADS)
    columns = tl.arange(0, HALF_BLOCK)
    within = columns < HALF
    inside = (heads < H)[:, None] & within[None, :]
    places = grad + token * grad_stride + heads[:, None] * grad_head_stride + columns[None, :]
    first = tl.load(places, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(places + HALF, mask=inside, other=0.0).to(tl.float32)
    cosines, sines = cos + token * cos_stride + columns, sin + token * sin_stride + columns
    first_cos = tl.load(cosines, mask=within, other=0.0).to(tl.float32)[None, :]
    second_cos = tl.load(cosines + HALF, mask=within, other=0.0).to(tl.float32)[None, :]
    first_sin = tl.load(sines, mask=within, other=0.0).to(tl.float32)[None, :]
    second_sin = tl.load(sines + HALF, mask=within, other=0.0).to(tl.float32)[None, :]
    first_out = first * first_cos + second * second_sin
    second_out = second * second_cos - first * first_sin
    if weight is not None:
        places = x + token * x_stride + heads[:, None] * x_head_stride + columns[None, :]
        head_scale = tl.load(scale + token * H + heads, mask=heads < H, other=0.0)[:, None]
        first_normed = tl.load(places, mask=inside, other=0.0).to(tl.float32) * head_scale
        second_normed = tl.load(places + HALF, mask=inside, other=0.0).to(tl.float32) * head_scale
        first_out *= _factor(weight, columns, offset, within)
        second_out *= _factor(weight + HALF, columns, offset, within)
        along = tl.sum(first_out * first_normed + second_out * second_normed, axis=1)[:, None] / (2 * HALF)
        first_out = head_scale * (first_out - first_normed * along)
        second_out = head_scale * (second_out - second_normed * along)
    places = out + token * out_stride + heads[:, None] * out_head_stride + columns[None, :]
    tl.store(places, first_out.to(out.dtype.element_ty), mask=inside)
    tl.store(places + HALF, second_out.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _factor(weight: tl.tensor, columns: tl.tensor, offset: float, within: tl.tensor) -> tl.tensor:
    """offset + weight, for all heads."""
    return (offset + tl.load(weight + columns, mask=within, other=0.0).to(tl.float32))[None, :]


@triton.jit
def _drop(
    x: tl.tensor,
    out: tl.tensor,
    seed: tl.tensor,
    stream: int,
    x_stride: int,
    out_stride: int,
    share: float,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    blocks = tl.cdiv(WIDTH, COLUMNS)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    columns = (tl.program_id(0) % blocks) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < WIDTH
    value = tl.load(x + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
    is_kept = tl.rand(tl.load(seed) * 64 + stream, (row * WIDTH + columns).to(tl.int32)) >= share
    value = tl.where(is_kept, value / (1.0 - share), 0.0)
    tl.store(out + row * out_stride + columns, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _add_product(
    out: tl.tensor,
    left: tl.tensor,
    right: tl.tensor,
    out_stride: int,
    left_stride: int,
    right_stride: int,
    T: int,
    COLUMNS: tl.constexpr,
    RANK: tl.constexpr,
    RANK_BLOCK: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
    COLUMN_BLOCK: tl.constexpr,
) -> None:
    blocks = tl.cdiv(COLUMNS, COLUMN_BLOCK)
    rows = (tl.program_id(0) // blocks).to(tl.int64) * ROW_BLOCK + tl.arange(0, ROW_BLOCK)[:, None]
    columns = (tl.program_id(0) % blocks) * COLUMN_BLOCK + tl.arange(0, COLUMN_BLOCK)[None, :]
    ranks = tl.arange(0, RANK_BLOCK)
    inside = (rows < T) & (columns < COLUMNS)
    places = out + rows * out_stride + columns
    before = tl.load(places, mask=inside, other=0.0)
    left_mask = (rows < T) & (ranks < RANK)[None, :]
    left_tile = tl.load(left + rows * left_stride + ranks[None, :], mask=left_mask, other=0.0)
    right_mask = (ranks < RANK)[:, None] & (columns < COLUMNS)
    right_tile = tl.load(right + ranks[:, None] * right_stride + columns, mask=right_mask, other=0.0)
    product = tl.dot(left_tile, right_tile, input_precision="ieee")
    tl.store(places, (before.to(tl.float32) + product).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _copy_rows(
    source: tl.tensor,
    out: tl.tensor,
    source_stride: int,
    out_stride: int,
    T: int,
    R: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    columns = tl.arange(0, BLOCK)[None, :]
    inside = (rows < T) & (columns < R)
    value = tl.load(source + rows * source_stride + columns, mask=inside)
    tl.store(out + rows * out_stride + columns, value, mask=inside)
