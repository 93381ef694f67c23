"""The gradients of LoRA's two factors as one Triton kernel: sums over tokens, each tensor read once.

Both are few columns times many, so tiles of the many go to one program each with some of the rows, and what the programs
found is summed by whoever takes the gradients. Two matrix products, which split the rows as well, add up what they found and
round it, take 3 to 20% longer on an H100.

The same signature and results as in `reference`. Importing this module needs Triton. ROWS and COLUMNS are a tile, BLOCKs
are ranks rounded up to what the matrix units take.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from etude.kernels import reference
from etude.kernels.fused_tiles import columns_of, multiplied, rank_block, row_stride, share_out
from etude.kernels.reference import Outer

MOST_RANKS = 64
"""Above it the sums of a tile do not fit the registers, and matrix products are as fast."""

HALF_TILE, WIDE_TILE, TILE_WARPS, TILE_STAGES = (64, 128), (32, 32), 4, 3
"""Rows and columns. Of eight shapes within 6% of the fastest on an H100 in bfloat16, 2,048 and 4,096 columns; the one for
float32 is as large as fits the registers."""

PROGRAMS = 264
"""Two for each multiprocessor of a large GPU: more of them leave more sums to add."""


def factor_gradients(of_A: Outer | None, of_B: Outer | None) -> tuple[Tensor | None, Tensor | None]:
    """`reference.factor_gradients`, in parts (S, ..)."""
    present = [outer for outer in (of_A, of_B) if outer is not None]
    if any(outer.few.shape[1] > MOST_RANKS for outer in present):
        return reference.factor_gradients(of_A, of_B)
    if not present:
        return None, None
    T = present[0].few.shape[0]
    sizes = [(0, 0) if outer is None else (outer.few.shape[1], outer.many.shape[1]) for outer in (of_A, of_B)]
    (A_rank, A_columns), (B_rank, B_columns) = sizes
    rows, columns = HALF_TILE if present[0].many.element_size() <= 2 else WIDE_TILE
    blocks = triton.cdiv(A_columns, columns) + triton.cdiv(B_columns, columns)
    tiles, splits = share_out(triton.cdiv(T, rows), blocks, PROGRAMS)

    def room(*shape: int) -> Tensor:
        return torch.empty((splits, *shape), dtype=torch.float32, device=present[0].few.device)

    all_A = None if of_A is None else room(A_rank, A_columns)
    all_B = None if of_B is None else room(B_columns, B_rank)
    A_few, A_many, A_scale = _parts(of_A)
    B_few, B_many, B_scale = _parts(of_B)
    strides = (row_stride(A_few), row_stride(A_many), row_stride(B_few), row_stride(B_many))
    _factor_gradients[(blocks * splits,)](
        A_few, A_many, A_scale, all_A, B_few, B_many, B_scale, all_B, *strides, T, splits, A_columns, A_rank,
        rank_block(A_rank), B_columns, B_rank, rank_block(B_rank), tiles, rows, columns, TILE_STAGES,
        num_warps=TILE_WARPS,
    )  # fmt: skip
    return all_A, all_B


def _parts(outer: Outer | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    if outer is None:
        return None, None, None
    few, many = (rows if rows.stride(1) == 1 else rows.contiguous() for rows in outer[:2])
    return few, many, outer.scale


@triton.jit
def _factor_gradients(
    A_few: tl.tensor,
    A_many: tl.tensor,
    A_scale: tl.tensor,
    all_A: tl.tensor,
    B_few: tl.tensor,
    B_many: tl.tensor,
    B_scale: tl.tensor,
    all_B: tl.tensor,
    A_few_stride: int,
    A_many_stride: int,
    B_few_stride: int,
    B_many_stride: int,
    T: int,
    splits: int,
    A_COLUMNS: tl.constexpr,
    A_RANK: tl.constexpr,
    A_BLOCK: tl.constexpr,
    B_COLUMNS: tl.constexpr,
    B_RANK: tl.constexpr,
    B_BLOCK: tl.constexpr,
    TILES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    split, block = tl.program_id(0) % splits, tl.program_id(0) // splits
    A_BLOCKS: tl.constexpr = tl.cdiv(A_COLUMNS, COLUMNS)
    if A_RANK:  # noqa: SIM102, known when the kernel is compiled, unlike the block
        if block < A_BLOCKS:
            columns = block * COLUMNS + tl.arange(0, COLUMNS)
            total = _summed(
                A_few, A_many, A_scale, A_few_stride, A_many_stride, columns, split, T, A_COLUMNS, A_RANK, A_BLOCK,
                TILES, ROWS, COLUMNS, STAGES,
            )  # fmt: skip
            ranks = tl.arange(0, A_BLOCK)[:, None]
            places = all_A + (split.to(tl.int64) * A_RANK + ranks) * A_COLUMNS + columns[None, :]
            tl.store(places, total.T, mask=(ranks < A_RANK) & (columns < A_COLUMNS)[None, :])
    if B_RANK:  # noqa: SIM102
        if block >= A_BLOCKS:
            columns = (block - A_BLOCKS) * COLUMNS + tl.arange(0, COLUMNS)
            total = _summed(
                B_few, B_many, B_scale, B_few_stride, B_many_stride, columns, split, T, B_COLUMNS, B_RANK, B_BLOCK,
                TILES, ROWS, COLUMNS, STAGES,
            )  # fmt: skip
            ranks = tl.arange(0, B_BLOCK)[None, :]
            places = all_B + (split.to(tl.int64) * B_COLUMNS + columns)[:, None] * B_RANK + ranks
            tl.store(places, total, mask=(columns < B_COLUMNS)[:, None] & (ranks < B_RANK))


@triton.jit
def _summed(
    few: tl.tensor,
    many: tl.tensor,
    scale: tl.tensor,
    few_stride: int,
    many_stride: int,
    columns: tl.tensor,
    split: int,
    T: int,
    WIDTH: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
) -> tl.tensor:
    """(COLUMNS, BLOCK): many^T [scale *] few over the rows of one program."""
    total = tl.zeros((COLUMNS, BLOCK), dtype=tl.float32)
    for step in tl.range(TILES, num_stages=STAGES):  # those of the last split may lie outside
        rows = (split * TILES + step).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        inside = rows < T
        left = columns_of(few + rows * few_stride, inside, RANK, BLOCK)
        if scale is not None:
            factor = tl.load(scale + rows, mask=inside, other=0.0)[:, None]
            left = (left.to(tl.float32) * factor).to(few.dtype.element_ty)
        places = many + rows[:, None] * many_stride + columns[None, :]
        right = tl.load(places, mask=inside[:, None] & (columns < WIDTH)[None, :], other=0.0)
        total += multiplied(right.T, left)
    return total
