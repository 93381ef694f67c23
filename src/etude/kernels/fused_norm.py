"""RMS norms as Triton kernels: alone or added to a residual, and their gradient with the LoRA update before it inside.

One program holds a row in registers: a row is read once and written once. The gradient that an adapter adds to before it
reaches the norm, grad + dU A, is made where it is read: there a program has several rows, so that A comes out of the cache
once for all of them, and walks over them in tiles, once for the mean of every row and once for the result.

The same signatures and results as in `reference`. Importing this module needs Triton. BLOCK is a row, ROWS and COLUMNS are a
tile, powers of two.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from etude.kernels import reference
from etude.kernels.fused_tiles import multiplied, rank_block, row_stride, rows_of
from etude.kernels.reference import Reduction

ELEMENTS_PER_WARP = 1024
"""32 per thread: in bfloat16 four loads of 16 bytes under way per thread and tensor, and still no register is spilled."""

MAX_ROW_WARPS = 16
"""A row of 16,384 takes them all; longer ones take more registers instead, more warps wait too long for each other."""

MOST_RANKS = 64
"""Above it A, which every program reads twice, is much more to read than the pass over the gradient that is saved."""

FEW_RANKS, TILE_OF_FEW, TILE_OF_MANY, TILE_WARPS, TILE_STAGES = 32, (16, 512), (32, 128), 8, 3
"""Rows and columns of `rms_norm_backward` with an update of up to so many ranks and of more, in half precision; wider numbers
take fewer columns. Of ten shapes each the fastest on an H100, 4,096 columns and 8,192 rows: fewer rows leave more of the second
walk's reads in the cache, more read A less often."""

SHARED_BYTES = 190 * 2**10
"""What the tile of few ranks needs, with the next ones on their way; a multiprocessor that has less takes that of many."""

REDUCED_ROWS, REDUCED_COLUMNS, REDUCED_WARPS, REDUCED_STAGES = 16, 128, 2, 3
"""Of `rms_norm_reduced` in half precision; wider numbers take fewer columns."""


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


def rms_norm_reduced(
    h_TD: Tensor,
    weight_D: Tensor,
    offset: float,
    eps: float,
    out_TD: Tensor,
    A_RD: Tensor,
    room_TR: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`reference.rms_norm_reduced`."""
    (T, D), rank = h_TD.shape, A_RD.shape[0]
    if rank > MOST_RANKS:
        scale_T = rms_norm(h_TD, weight_D, offset, eps, out_TD)
        return scale_T, reference.reduced_product(out_TD, A_RD, room_TR)
    scale_T = torch.empty(T, dtype=torch.float32, device=h_TD.device)
    reduced_TR = torch.empty((T, rank), dtype=out_TD.dtype, device=h_TD.device)
    strides = (h_TD.stride(0), out_TD.stride(0), A_RD.stride(0), row_stride(room_TR))
    _rms_norm_reduced[(triton.cdiv(T, REDUCED_ROWS),)](
        h_TD, weight_D, A_RD, out_TD, scale_T, reduced_TR, room_TR, *strides, offset, eps, T, D, rank,
        rank_block(rank), REDUCED_ROWS, REDUCED_COLUMNS * 2 // out_TD.element_size(), REDUCED_STAGES,
        num_warps=REDUCED_WARPS,
    )  # fmt: skip
    return scale_T, reduced_TR


def rms_norm_backward(
    grad_TD: Tensor,
    h_TD: Tensor,
    weight_D: Tensor,
    offset: float,
    scale_T: Tensor,
    residual_TD: Tensor | None = None,
    update: Reduction | None = None,
) -> Tensor:
    """`reference.rms_norm_backward`; with an update of more than `MOST_RANKS` ranks `grad` is overwritten."""
    T, D = h_TD.shape
    if update is not None and update.A.shape[0] > MOST_RANKS:
        from etude.kernels.fused import add_product

        add_product(grad_TD, *update)
        update = None
    out_TD = torch.empty((T, D), dtype=h_TD.dtype, device=h_TD.device)
    residual_stride = 0 if residual_TD is None else residual_TD.stride(0)
    strides = (grad_TD.stride(0), h_TD.stride(0), residual_stride)
    if update is not None and update.A.shape[0] > 0:
        rank = update.A.shape[0]
        ranks = rank_block(rank)
        rows, columns = TILE_OF_FEW if ranks <= FEW_RANKS and _has_room(h_TD.device) else TILE_OF_MANY
        _rms_norm_updated_backward[(triton.cdiv(T, rows),)](
            grad_TD, h_TD, weight_D, residual_TD, scale_T, update.grad_reduced, update.A, out_TD, *strides,
            update.grad_reduced.stride(0), update.A.stride(0), offset, T, D, rank, ranks, rows,
            columns * 2 // h_TD.element_size(), TILE_STAGES, num_warps=TILE_WARPS,
        )  # fmt: skip
        return out_TD
    block, num_warps = _row_shape(D)
    _rms_norm_backward[(T,)](
        grad_TD, h_TD, weight_D, residual_TD, scale_T, out_TD, *strides, offset, D, block, num_warps=num_warps
    )
    return out_TD


@functools.cache
def _has_room(device: torch.device) -> bool:
    """Whether a multiprocessor has the shared memory for the tile of few ranks, as Hopper has; elsewhere nothing runs in it."""
    if device.type != "cuda":
        return True
    return int(getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 0)) >= SHARED_BYTES


def _row_shape(D: int) -> tuple[int, int]:
    """(BLOCK, warps) of a program that holds a row in registers: short rows go without barriers between warps."""
    block = triton.next_power_of_2(D)
    return block, min(max(block // ELEMENTS_PER_WARP, 1), MAX_ROW_WARPS)


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
def _rms_norm_reduced(
    h: tl.tensor,
    weight: tl.tensor,
    A: tl.tensor,
    out: tl.tensor,
    scale: tl.tensor,
    reduced: tl.tensor,
    room: tl.tensor,
    h_stride: int,
    out_stride: int,
    A_stride: int,
    room_stride: int,
    offset: float,
    eps: float,
    T: int,
    D: tl.constexpr,
    RANK: tl.constexpr,
    RANK_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    rows_inside = rows < T
    of_h = h + rows[:, None] * h_stride
    squares = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)  # summed over its columns once, at the end
    for start in tl.range(0, D, COLUMNS, num_stages=STAGES):
        columns = start + tl.arange(0, COLUMNS)
        inside = rows_inside[:, None] & (columns < D)[None, :]
        wide = tl.load(of_h + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        squares += wide * wide
    row_scale = tl.rsqrt(tl.sum(squares, axis=1) / D + eps)
    tl.store(scale + rows, row_scale, mask=rows_inside)
    total = tl.zeros((ROWS, RANK_BLOCK), dtype=tl.float32)
    for start in tl.range(0, D, COLUMNS, num_stages=STAGES):
        columns = start + tl.arange(0, COLUMNS)
        columns_inside = columns < D
        inside = rows_inside[:, None] & columns_inside[None, :]
        wide = tl.load(of_h + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        factor = offset + tl.load(weight + columns, mask=columns_inside, other=0.0).to(tl.float32)
        normed = (wide * row_scale[:, None] * factor[None, :]).to(out.dtype.element_ty)
        tl.store(out + rows[:, None] * out_stride + columns[None, :], normed, mask=inside)
        total += multiplied(normed, rows_of(A, A_stride, columns, columns_inside, RANK, RANK_BLOCK).T)
    ranks = tl.arange(0, RANK_BLOCK)[None, :]
    inside = rows_inside[:, None] & (ranks < RANK)
    rounded = total.to(reduced.dtype.element_ty)
    tl.store(reduced + rows[:, None] * RANK + ranks, rounded, mask=inside)
    if room is not None:
        tl.store(room + rows[:, None] * room_stride + ranks, rounded, mask=inside)


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
def _rms_norm_updated_backward(
    grad: tl.tensor,
    h: tl.tensor,
    weight: tl.tensor,
    residual: tl.tensor,
    scale: tl.tensor,
    grad_reduced: tl.tensor,
    A: tl.tensor,
    out: tl.tensor,
    grad_stride: int,
    h_stride: int,
    residual_stride: int,
    grad_reduced_stride: int,
    A_stride: int,
    offset: float,
    T: int,
    D: tl.constexpr,
    RANK: tl.constexpr,
    RANK_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    rows_inside = rows < T
    row_scale = tl.load(scale + rows, mask=rows_inside, other=0.0)[:, None]
    ranks = tl.arange(0, RANK_BLOCK)[None, :]
    places = grad_reduced + rows[:, None] * grad_reduced_stride + ranks
    left = tl.load(places, mask=rows_inside[:, None] & (ranks < RANK), other=0.0)
    of_grad, of_h = grad + rows[:, None] * grad_stride, h + rows[:, None] * h_stride
    along = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)  # summed over its columns once, at the end
    for start in tl.range(0, D, COLUMNS, num_stages=STAGES):
        weighted, normed = _weighted_and_normed(
            of_grad, of_h, weight, A, left, row_scale, rows_inside, start, A_stride, offset, D, RANK, RANK_BLOCK,
            COLUMNS,
        )  # fmt: skip
        along += weighted * normed
    mean = (tl.sum(along, axis=1) / D)[:, None]
    for start in tl.range(0, D, COLUMNS, num_stages=STAGES):
        weighted, normed = _weighted_and_normed(
            of_grad, of_h, weight, A, left, row_scale, rows_inside, start, A_stride, offset, D, RANK, RANK_BLOCK,
            COLUMNS,
        )  # fmt: skip
        columns = start + tl.arange(0, COLUMNS)[None, :]
        inside = rows_inside[:, None] & (columns < D)
        result = row_scale * (weighted - normed * mean)
        if residual is not None:
            around = tl.load(residual + rows[:, None] * residual_stride + columns, mask=inside, other=0.0)
            result = around.to(tl.float32) + result
        into = out + rows[:, None] * D + columns
        # Not kept in the cache, where the second walk is to find the rows.
        tl.store(into, result.to(out.dtype.element_ty), mask=inside, eviction_policy="evict_first")


@triton.jit
def _weighted_and_normed(
    of_grad: tl.tensor,
    of_h: tl.tensor,
    weight: tl.tensor,
    A: tl.tensor,
    left: tl.tensor,
    row_scale: tl.tensor,
    rows_inside: tl.tensor,
    start: int,
    A_stride: int,
    offset: float,
    D: tl.constexpr,
    RANK: tl.constexpr,
    RANK_BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """A tile of (grad + dU A) * (offset + weight), and one of h * s."""
    columns = start + tl.arange(0, COLUMNS)[None, :]
    inside = rows_inside[:, None] & (columns < D)
    weighted = tl.load(of_grad + columns, mask=inside, other=0.0).to(tl.float32)
    normed = tl.load(of_h + columns, mask=inside, other=0.0).to(tl.float32) * row_scale
    ranks = tl.arange(0, RANK_BLOCK)[:, None]
    right = tl.load(A + ranks * A_stride + columns, mask=(ranks < RANK) & (columns < D), other=0.0)
    weighted += tl.dot(left, right, input_precision="ieee")
    weighted *= offset + tl.load(weight + columns, mask=columns < D, other=0.0).to(tl.float32)
    return weighted, normed
