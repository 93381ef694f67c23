"""Tiles of matrices with low ranks, as several Triton kernels read, multiply and share them out.

Importing this module needs Triton. BLOCKs are ranks rounded up to what the matrix units take.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


def share_out(tiles: int, blocks: int, programs: int) -> tuple[int, int]:
    """(tiles of one program, programs of a block) for the tiles of each of so many blocks: a power of two, so that kernels
    for few numbers have to be compiled."""
    of_program = max(triton.next_power_of_2(triton.cdiv(tiles * blocks, programs)), 1)
    return of_program, triton.cdiv(tiles, of_program)


def rank_block(rank: int) -> int:
    """What the matrix units take: 16 or more, a power of two; 0 where there is nothing to multiply."""
    return max(triton.next_power_of_2(rank), 16) if rank else 0


def row_stride(matrix: Tensor | None) -> int:
    return 0 if matrix is None else matrix.stride(0)


@triton.jit
def columns_of(starts: tl.tensor, inside: tl.tensor, RANK: tl.constexpr, BLOCK: tl.constexpr) -> tl.tensor:
    """(len(starts), BLOCK): the first RANK numbers from every start on, zeros after them."""
    ranks = tl.arange(0, BLOCK)[None, :]
    return tl.load(starts[:, None] + ranks, mask=inside[:, None] & (ranks < RANK), other=0.0)


@triton.jit
def rows_of(
    A: tl.tensor, stride: int, columns: tl.tensor, inside: tl.tensor, RANK: tl.constexpr, BLOCK: tl.constexpr
) -> tl.tensor:
    """(BLOCK, len(columns)) of the first RANK rows of A, zeros below them."""
    ranks = tl.arange(0, BLOCK)[:, None]
    return tl.load(A + ranks * stride + columns[None, :], mask=(ranks < RANK) & inside[None, :], other=0.0)


@triton.jit
def multiplied(left: tl.tensor, right: tl.tensor) -> tl.tensor:
    return tl.dot(left, right, input_precision="ieee")
