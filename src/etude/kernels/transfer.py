"""Many small copies in one launch: adapters into the products that use them, their gradients into `p.grad`.

A LoRA model has hundreds of small factors; a kernel for each would cost a small model more than its matrix products. Here
a table on the device lists the pieces, and one program copies one block of one piece. Importing this module needs Triton.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048
FIELDS = 6

SUM_BLOCK, SUM_UNROLLED = 512, 4
"""Of sums of parts: with so many loads under way, it takes as long as the memory does."""


class Piece(NamedTuple):
    """A matrix that is copied: `out[i, j] = scaling * source[i, j]`, rows as far apart as the strides say."""

    source: Tensor
    out: Tensor
    scaling: float


class Gather:
    """Copies pieces that stay where they are, from one type into another."""

    def __init__(self, pieces: list[Piece]) -> None:
        self.pieces = pieces  # kept, so that the addresses in the table stay theirs
        device = pieces[0].source.device
        rows = [
            (
                p.source.data_ptr(),
                p.out.data_ptr(),
                p.source.numel(),
                p.source.shape[1],
                p.source.stride(0),
                p.out.stride(0),
            )
            for p in pieces
        ]
        self.table = torch.tensor(rows, dtype=torch.int64, device=device)
        self.scalings = torch.tensor([p.scaling for p in pieces], dtype=torch.float32, device=device)
        self.grid = len(pieces), triton.cdiv(max(p.source.numel() for p in pieces), BLOCK)
        self.addresses = tuple(p.source.data_ptr() for p in pieces)

    def copy(self) -> None:
        first = self.pieces[0]
        _copy[self.grid](first.source, first.out, self.table, self.scalings, FIELDS, BLOCK)

    def is_current(self) -> bool:
        """Whether every source still lies where the table says."""
        return all(p.source.data_ptr() == address for p, address in zip(self.pieces, self.addresses, strict=True))


class Share(NamedTuple):
    """Where the gradient of one factor lies in a product, and where it is summed."""

    is_down: bool
    """Whether it is of A, not of B."""
    start: int
    """First element in the product, counted in elements."""
    stride: int
    """Between its rows in the product."""
    total: Tensor
    """(rows, columns), contiguous, float32."""
    scaling: float


class Accumulate:
    """total += scaling * [factor *] product, for the gradients of all factors of a projection; see `projection`."""

    def __init__(self, shares: list[Share]) -> None:
        device = shares[0].total.device
        self.totals = [share.total for share in shares]
        rows = [
            (int(s.is_down), s.total.data_ptr(), s.total.numel(), s.total.shape[1], s.start, s.stride) for s in shares
        ]
        self.table = torch.tensor(rows, dtype=torch.int64, device=device)
        self.scalings = torch.tensor([share.scaling for share in shares], dtype=torch.float32, device=device)
        self.grid = len(shares), triton.cdiv(max(total.numel() for total in self.totals), SUM_BLOCK)

    def add(self, all_A: Tensor, all_B: Tensor, column_factor: Tensor | None, offset: float) -> None:
        """`all_A` (R, I) and `all_B` (O, R), or parts of them (S, ..) that are summed here, hold the gradients of all
        factors; A's are multiplied by offset + factor (I)."""
        parts_A, parts_B = (1 if product.dim() == 2 else product.shape[0] for product in (all_A, all_B))
        _accumulate[self.grid](
            all_A, all_B, column_factor, self.totals[0], self.table, self.scalings, offset, parts_A, parts_B,
            all_A.numel() // parts_A, all_B.numel() // parts_B, FIELDS, SUM_BLOCK, SUM_UNROLLED,
        )  # fmt: skip


@triton.jit
def _copy(
    like_source: tl.tensor,
    like_out: tl.tensor,
    table: tl.tensor,
    scalings: tl.tensor,
    FIELDS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    piece = tl.program_id(0)
    entry = table + piece * FIELDS
    source = tl.load(entry).to(like_source.dtype)
    out = tl.load(entry + 1).to(like_out.dtype)
    # 32 bits, as dividing 64 takes ten times as long; no factor of an adapter has 2^31 elements.
    count, columns = tl.load(entry + 2).to(tl.int32), tl.load(entry + 3).to(tl.int32)
    source_stride, out_stride = tl.load(entry + 4), tl.load(entry + 5)
    first = tl.program_id(1) * BLOCK
    if first < count:
        index = first + tl.arange(0, BLOCK)
        row, column = index // columns, index % columns
        inside = index < count
        value = tl.load(source + row * source_stride + column, mask=inside, other=0.0).to(tl.float32)
        value *= tl.load(scalings + piece)
        tl.store(out + row * out_stride + column, value.to(like_out.dtype.element_ty), mask=inside)


@triton.jit
def _accumulate(
    all_A: tl.tensor,
    all_B: tl.tensor,
    column_factor: tl.tensor,
    like_total: tl.tensor,
    table: tl.tensor,
    scalings: tl.tensor,
    offset: float,
    parts_A: int,
    parts_B: int,
    part_A_size: int,
    part_B_size: int,
    FIELDS: tl.constexpr,
    BLOCK: tl.constexpr,
    UNROLLED: tl.constexpr,
) -> None:
    piece = tl.program_id(0)
    entry = table + piece * FIELDS
    of_A = tl.load(entry)
    total = tl.load(entry + 1).to(like_total.dtype)
    # 32 bits, as dividing 64 takes ten times as long; no factor of an adapter has 2^31 elements.
    count, columns = tl.load(entry + 2).to(tl.int32), tl.load(entry + 3).to(tl.int32)
    start, stride = tl.load(entry + 4), tl.load(entry + 5)
    first = tl.program_id(1) * BLOCK
    if first < count:
        index = first + tl.arange(0, BLOCK)
        row, column = index // columns, index % columns
        inside = index < count
        place = start + row * stride + column
        if of_A == 1:
            value = _sum_of_parts(all_A + place, inside, parts_A, part_A_size, BLOCK, UNROLLED)
            if column_factor is not None:
                value *= offset + tl.load(column_factor + column, mask=inside, other=0.0).to(tl.float32)
        else:
            value = _sum_of_parts(all_B + place, inside, parts_B, part_B_size, BLOCK, UNROLLED)
        value *= tl.load(scalings + piece)
        before = tl.load(total + index, mask=inside, other=0.0)
        tl.store(total + index, before + value, mask=inside)


@triton.jit
def _sum_of_parts(
    places: tl.tensor, inside: tl.tensor, parts: int, part_size: int, BLOCK: tl.constexpr, UNROLLED: tl.constexpr
) -> tl.tensor:
    """Of all parts at some places: a few of them are under way at a time, and added up in their order."""
    value = tl.zeros((BLOCK,), dtype=tl.float32)
    first = 0
    while first < parts:  # their number differs from batch to batch: not worth a kernel of its own
        for step in tl.static_range(UNROLLED):
            part = first + step
            value += tl.load(places + part * part_size, mask=inside & (part < parts), other=0.0).to(tl.float32)
        first += UNROLLED
    return value
