"""The operations of `reference` as Triton kernels: one pass over memory each, the same signatures and results.

They take bfloat16, float16 and float32, compute in float32 and round once. All are bound by memory, so what counts is
that every element is read and written once, in pieces of 16 bytes, with enough of them under way: 32 elements per thread
where a row or a token is one program (two kilobytes per warp and tensor), 8 where elements are independent.

An output may be the very view that is read: a program reads all of its elements before it writes them, and no other
program reads them. Importing this module needs Triton. Legend as in `reference`; BLOCK, HEADS and COLUMNS are what one
program covers, powers of two.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from etude.kernels.fused_factors import factor_gradients as factor_gradients
from etude.kernels.fused_gate import gate as gate
from etude.kernels.fused_gate import gate_backward as gate_backward
from etude.kernels.fused_gate import gate_updated as gate_updated
from etude.kernels.fused_gate import gate_updated_backward as gate_updated_backward
from etude.kernels.fused_heads import rotate_heads as rotate_heads
from etude.kernels.fused_heads import rotate_heads_backward as rotate_heads_backward
from etude.kernels.fused_norm import ELEMENTS_PER_WARP as ELEMENTS_PER_WARP
from etude.kernels.fused_norm import rms_norm as rms_norm
from etude.kernels.fused_norm import rms_norm_backward as rms_norm_backward
from etude.kernels.fused_norm import rms_norm_reduced as rms_norm_reduced

ELEMENT_COLUMNS, ELEMENT_WARPS = 1024, 4
"""One 16-byte piece per thread and tensor: small programs fill the last block of an odd width best."""

COPY_ELEMENTS = 4096

PRODUCT_ROWS, PRODUCT_COLUMNS, MOST_RANKS = 64, 128, 128
"""A tile of `add_product`: a row of it is 256 bytes of memory; its factors come out of the cache. Above this rank the
matrix units are what takes time."""


def drop(x_TI: Tensor, seed: Tensor, stream: int, share: float, out_TI: Tensor) -> None:
    """`reference.drop`, with Philox as its source of randomness: other elements, as many."""
    T, columns = x_TI.shape
    strides = (x_TI.stride(0), out_TI.stride(0))
    _drop[(T * triton.cdiv(columns, ELEMENT_COLUMNS),)](
        x_TI, out_TI, seed, stream, *strides, share, columns, ELEMENT_COLUMNS, num_warps=ELEMENT_WARPS
    )


def add_product(out_TI: Tensor, left_TR: Tensor, right_RI: Tensor, residual_TI: Tensor | None = None) -> None:
    """`reference.add_product`, also for rows that are further apart than wide, which `addmm_` would copy there and back."""
    T, columns = out_TI.shape
    rank = right_RI.shape[0]
    if rank > MOST_RANKS:
        out_TI.addmm_(left_TR, right_RI)
        if residual_TI is not None:
            out_TI.add_(residual_TI)
        return
    residual_stride = 0 if residual_TI is None else residual_TI.stride(0)
    strides = (out_TI.stride(0), left_TR.stride(0), *right_RI.stride(), residual_stride)
    rank_block = max(triton.next_power_of_2(rank), 16)
    _add_product[(triton.cdiv(T, PRODUCT_ROWS) * triton.cdiv(columns, PRODUCT_COLUMNS),)](
        out_TI, left_TR, right_RI, residual_TI, *strides, T, columns, rank, rank_block, PRODUCT_ROWS, PRODUCT_COLUMNS,
        num_warps=ELEMENT_WARPS,
    )  # fmt: skip


def copy_rows(source_TR: Tensor, out_TR: Tensor) -> None:
    """`reference.copy_rows`."""
    T, R = source_TR.shape
    block = triton.next_power_of_2(R)
    rows = max(COPY_ELEMENTS // block, 1)
    strides = (source_TR.stride(0), out_TR.stride(0))
    _copy_rows[(triton.cdiv(T, rows),)](source_TR, out_TR, *strides, T, R, rows, block, num_warps=ELEMENT_WARPS)


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
    residual: tl.tensor,
    out_stride: int,
    left_stride: int,
    right_stride: int,
    right_column_stride: int,
    residual_stride: int,
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
    before = tl.load(places, mask=inside, other=0.0).to(tl.float32)
    if residual is not None:
        before += tl.load(residual + rows * residual_stride + columns, mask=inside, other=0.0).to(tl.float32)
    left_mask = (rows < T) & (ranks < RANK)[None, :]
    left_tile = tl.load(left + rows * left_stride + ranks[None, :], mask=left_mask, other=0.0)
    right_mask = (ranks < RANK)[:, None] & (columns < COLUMNS)
    right_places = right + ranks[:, None] * right_stride + columns * right_column_stride
    right_tile = tl.load(right_places, mask=right_mask, other=0.0)
    product = tl.dot(left_tile, right_tile, input_precision="ieee")
    tl.store(places, (before + product).to(out.dtype.element_ty), mask=inside)


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
