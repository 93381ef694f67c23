"""The gated product of a layer as Triton kernels, with the LoRA updates around it inside: one pass over memory.

    [g, u] = [Wg x, Wu x] + reduced B^T,   out = f(g) * u,   reduced of the next projection = out A^T

A tile of the gates is read once for the update, the product and what the next projection's A makes of it; in the backward
pass a tile of the gradient is written and, while it is at hand, multiplied by what the gradients of both adapters need.
What belongs to a whole row or column is summed in float32 over the tiles of one program, and over programs afterwards, in
an order that only the sizes decide.

The same signatures and results as in `reference`. Importing this module needs Triton. ROWS and COLUMNS are a tile, BLOCKs
are ranks rounded up to what the matrix units take.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from etude.kernels import reference
from etude.kernels.fused_tiles import columns_of, multiplied, rank_block, row_stride, rows_of, share_out
from etude.kernels.reference import SILU, Reduction, Update

GATE_COLUMNS, GATE_WARPS = 1024, 4
"""One 16-byte piece per thread and tensor: small programs fill the last block of an odd width best."""

MOST_RANKS = 64
"""Above it the sums of a tile do not fit the registers, and products of their own take over."""

TILE_ROWS, TILE_COLUMNS, TILE_WARPS, TILE_STAGES = 64, 64, 4, 3
FEW_RANKS, FEW_ROWS, FEW_WARPS = 16, 32, 2
"""Of 24 shapes the fastest on an H100, 14,336 columns, 8,192 rows and 16 ranks of each: without the next tiles on their way (one
stage) the passes take twice as long, larger tiles spill registers. The backward pass takes fewer rows up to so many ranks;
above them two warps spill registers."""

FORWARD_PROGRAMS, BACKWARD_PROGRAMS = 2112, 1056
"""Sixteen and eight for each multiprocessor of a large GPU, so that they end at about the same time; more of them in the
backward pass leave more sums to add."""

TOTAL_ROWS, TOTAL_WARPS = 64, 4


def gate(gate_up_T2F: Tensor, activation: str, out_TF: Tensor) -> None:
    """`reference.gate`."""
    T, F = gate_up_T2F.shape[0], gate_up_T2F.shape[1] // 2
    _gate[(T * triton.cdiv(F, GATE_COLUMNS),)](
        gate_up_T2F, out_TF, gate_up_T2F.stride(0), out_TF.stride(0), F, activation == SILU, GATE_COLUMNS,
        num_warps=GATE_WARPS,
    )  # fmt: skip


def gate_backward(grad_TF: Tensor, gate_up_T2F: Tensor, activation: str, out_T2F: Tensor, product_TF: Tensor) -> None:
    """`reference.gate_backward`; `product` may be `grad`, and `out` may be `gate_up`."""
    T, F = grad_TF.shape
    strides = (grad_TF.stride(0), gate_up_T2F.stride(0), out_T2F.stride(0), product_TF.stride(0))
    _gate_backward[(T * triton.cdiv(F, GATE_COLUMNS),)](
        grad_TF, gate_up_T2F, out_T2F, product_TF, *strides, F, activation == SILU, GATE_COLUMNS, num_warps=GATE_WARPS
    )


def gate_updated(
    gate_up_T2F: Tensor,
    update: Update,
    activation: str,
    out_TF: Tensor,
    A_RF: Tensor | None = None,
    room_TR: Tensor | None = None,
) -> Tensor | None:
    """`reference.gate_updated`."""
    ranks = update.ranks
    next_rank = 0 if A_RF is None else A_RF.shape[0]
    T, F = out_TF.shape
    if max(*ranks, next_rank) > MOST_RANKS:
        gate(update.of(gate_up_T2F), activation, out_TF)
        return None if A_RF is None else reference.reduced_product(out_TF, A_RF, room_TR)
    blocks = triton.cdiv(T, TILE_ROWS)
    tiles, splits = share_out(triton.cdiv(F, TILE_COLUMNS), blocks, FORWARD_PROGRAMS)
    partial = None if A_RF is None else torch.empty((splits, T, next_rank), dtype=torch.float32, device=out_TF.device)
    strides = (
        gate_up_T2F.stride(0), update.reduced.stride(0), row_stride(update.B), row_stride(A_RF),
        out_TF.stride(0),
    )  # fmt: skip
    _gate_updated[(blocks * splits,)](
        gate_up_T2F, update.reduced, update.B, A_RF, out_TF, partial, *strides, T, splits,
        tiles, F, *ranks, next_rank, rank_block(ranks[0]), rank_block(ranks[1]), rank_block(next_rank), activation == SILU,
        update.B is not None, TILE_ROWS, TILE_COLUMNS, TILE_STAGES, num_warps=TILE_WARPS,
    )  # fmt: skip
    if partial is None:
        return None
    total_TR = torch.empty((T, next_rank), dtype=out_TF.dtype, device=out_TF.device)
    room_stride = row_stride(room_TR)
    _total_rows[(triton.cdiv(T, TOTAL_ROWS),)](
        partial, total_TR, room_TR, room_stride, T, splits, next_rank, rank_block(next_rank), TOTAL_ROWS,
        num_warps=TOTAL_WARPS,
    )  # fmt: skip
    return total_TR


def gate_updated_backward(
    grad_TF: Tensor,
    gate_up_T2F: Tensor,
    update: Update,
    activation: str,
    out_T2F: Tensor,
    reduction: Reduction | None = None,
    product_TF: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`reference.gate_updated_backward`, its gradients in parts (S, ..); `product` may be `grad`."""
    ranks = update.ranks
    next_rank = 0 if reduction is None else reduction.A.shape[0]
    T, F = grad_TF.shape
    if max(*ranks, next_rank) > MOST_RANKS:
        return _backward_of_high_ranks(grad_TF, gate_up_T2F, update, activation, out_T2F, reduction, product_TF)
    blocks = triton.cdiv(F, TILE_COLUMNS)
    rows, warps = (FEW_ROWS, FEW_WARPS) if max(*ranks, next_rank) <= FEW_RANKS else (TILE_ROWS, TILE_WARPS)
    tiles, splits = share_out(triton.cdiv(T, rows), blocks, BACKWARD_PROGRAMS)
    all_B = torch.empty((splits, 2 * F, sum(ranks)), dtype=torch.float32, device=grad_TF.device)
    all_A = (
        None if reduction is None else torch.empty((splits, next_rank, F), dtype=torch.float32, device=grad_TF.device)
    )
    grad_reduced, A = (None, None) if reduction is None else reduction
    strides = (
        grad_TF.stride(0), gate_up_T2F.stride(0), update.reduced.stride(0), row_stride(update.B),
        row_stride(grad_reduced), row_stride(A),
        out_T2F.stride(0), row_stride(product_TF),
    )  # fmt: skip
    _gate_updated_backward[(blocks * splits,)](
        grad_TF, gate_up_T2F, update.reduced, update.B, grad_reduced, A, out_T2F, product_TF, all_B, all_A, *strides,
        T, splits, tiles, F, *ranks, next_rank, rank_block(ranks[0]), rank_block(ranks[1]), rank_block(next_rank),
        activation == SILU, update.B is not None, rows, TILE_COLUMNS, TILE_STAGES, num_warps=warps,
    )  # fmt: skip
    return all_B, all_A


def _backward_of_high_ranks(
    grad_TF: Tensor,
    gate_up_T2F: Tensor,
    update: Update,
    activation: str,
    out_T2F: Tensor,
    reduction: Reduction | None,
    product_TF: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    updated = update.of(gate_up_T2F)
    if reduction is not None:
        grad_TF = torch.addmm(grad_TF, *reduction)
    product = torch.empty_like(grad_TF) if product_TF is None else product_TF
    gate_backward(grad_TF, updated, activation, out_T2F, product)
    all_A = None if reduction is None else torch.mm(reduction.grad_reduced.t(), product)
    return reference.gradient_of_factor(out_T2F, update), all_A


@triton.jit
def _gate_updated(
    gate_up: tl.tensor,
    reduced: tl.tensor,
    B: tl.tensor,
    A: tl.tensor,
    out: tl.tensor,
    partial: tl.tensor,
    gate_up_stride: int,
    reduced_stride: int,
    B_stride: int,
    A_stride: int,
    out_stride: int,
    T: int,
    splits: int,
    TILES: tl.constexpr,
    F: tl.constexpr,
    GATE_RANK: tl.constexpr,
    UP_RANK: tl.constexpr,
    NEXT_RANK: tl.constexpr,
    GATE_BLOCK: tl.constexpr,
    UP_BLOCK: tl.constexpr,
    NEXT_BLOCK: tl.constexpr,
    IS_SILU: tl.constexpr,
    UPDATES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    split = tl.program_id(0) % splits
    rows = (tl.program_id(0) // splits).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    rows_inside = rows < T
    if UPDATES and GATE_RANK:
        gate_left = columns_of(reduced + rows * reduced_stride, rows_inside, GATE_RANK, GATE_BLOCK)
    if UPDATES and UP_RANK:
        up_left = columns_of(reduced + rows * reduced_stride + GATE_RANK, rows_inside, UP_RANK, UP_BLOCK)
    if NEXT_RANK:
        total = tl.zeros((ROWS, NEXT_BLOCK), dtype=tl.float32)
    for step in tl.range(TILES, num_stages=STAGES):  # those of the last split may lie outside
        tile = split * TILES + step
        columns = tile * COLUMNS + tl.arange(0, COLUMNS)
        columns_inside = columns < F
        inside = rows_inside[:, None] & columns_inside[None, :]
        places = gate_up + rows[:, None] * gate_up_stride + columns[None, :]
        x = tl.load(places, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(places + F, mask=inside, other=0.0).to(tl.float32)
        if UPDATES and GATE_RANK:
            x += multiplied(gate_left, columns_of(B + columns * B_stride, columns_inside, GATE_RANK, GATE_BLOCK).T)
        if UPDATES and UP_RANK:
            up_B = B + (columns + F) * B_stride + GATE_RANK
            up += multiplied(up_left, columns_of(up_B, columns_inside, UP_RANK, UP_BLOCK).T)
        share, _ = _shares(x, IS_SILU)
        result = (x * share * up).to(out.dtype.element_ty)
        tl.store(out + rows[:, None] * out_stride + columns[None, :], result, mask=inside)
        if NEXT_RANK:
            total += multiplied(result, rows_of(A, A_stride, columns, columns_inside, NEXT_RANK, NEXT_BLOCK).T)
    if NEXT_RANK:
        ranks = tl.arange(0, NEXT_BLOCK)[None, :]
        places = partial + (split.to(tl.int64) * T + rows)[:, None] * NEXT_RANK + ranks
        tl.store(places, total, mask=rows_inside[:, None] & (ranks < NEXT_RANK))


@triton.jit
def _total_rows(
    partial: tl.tensor,
    total: tl.tensor,
    room: tl.tensor,
    room_stride: int,
    T: int,
    splits: int,
    RANK: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    ranks = tl.arange(0, BLOCK)[None, :]
    inside = (rows < T) & (ranks < RANK)
    value = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    split = 0
    while split < splits:
        value += tl.load(partial + (split * T + rows) * RANK + ranks, mask=inside, other=0.0)
        split += 1
    rounded = value.to(total.dtype.element_ty)
    tl.store(total + rows * RANK + ranks, rounded, mask=inside)
    if room is not None:
        tl.store(room + rows * room_stride + ranks, rounded, mask=inside)


@triton.jit
def _gate_updated_backward(
    grad: tl.tensor,
    gate_up: tl.tensor,
    reduced: tl.tensor,
    B: tl.tensor,
    grad_reduced: tl.tensor,
    A: tl.tensor,
    out: tl.tensor,
    product: tl.tensor,
    all_B: tl.tensor,
    all_A: tl.tensor,
    grad_stride: int,
    gate_up_stride: int,
    reduced_stride: int,
    B_stride: int,
    grad_reduced_stride: int,
    A_stride: int,
    out_stride: int,
    product_stride: int,
    T: int,
    splits: int,
    TILES: tl.constexpr,
    F: tl.constexpr,
    GATE_RANK: tl.constexpr,
    UP_RANK: tl.constexpr,
    NEXT_RANK: tl.constexpr,
    GATE_BLOCK: tl.constexpr,
    UP_BLOCK: tl.constexpr,
    NEXT_BLOCK: tl.constexpr,
    IS_SILU: tl.constexpr,
    UPDATES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    split = tl.program_id(0) % splits
    columns = (tl.program_id(0) // splits) * COLUMNS + tl.arange(0, COLUMNS)
    columns_inside = columns < F
    if UPDATES and GATE_RANK:
        gate_B = columns_of(B + columns * B_stride, columns_inside, GATE_RANK, GATE_BLOCK).T
    if UPDATES and UP_RANK:
        up_B = columns_of(B + (columns + F) * B_stride + GATE_RANK, columns_inside, UP_RANK, UP_BLOCK).T
    if GATE_RANK:
        gate_total = tl.zeros((COLUMNS, GATE_BLOCK), dtype=tl.float32)
    if UP_RANK:
        up_total = tl.zeros((COLUMNS, UP_BLOCK), dtype=tl.float32)
    if NEXT_RANK:
        next_A = rows_of(A, A_stride, columns, columns_inside, NEXT_RANK, NEXT_BLOCK)
        next_total = tl.zeros((NEXT_BLOCK, COLUMNS), dtype=tl.float32)
    for step in tl.range(TILES, num_stages=STAGES):  # those of the last split may lie outside
        tile = split * TILES + step
        rows = tile.to(tl.int64) * ROWS + tl.arange(0, ROWS)
        rows_inside = rows < T
        inside = rows_inside[:, None] & columns_inside[None, :]
        places = gate_up + rows[:, None] * gate_up_stride + columns[None, :]
        x = tl.load(places, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(places + F, mask=inside, other=0.0).to(tl.float32)
        places = grad + rows[:, None] * grad_stride + columns[None, :]
        gradient = tl.load(places, mask=inside, other=0.0).to(tl.float32)
        if GATE_RANK:
            gate_left = columns_of(reduced + rows * reduced_stride, rows_inside, GATE_RANK, GATE_BLOCK)
            if UPDATES:
                x += multiplied(gate_left, gate_B)
        if UP_RANK:
            up_left = columns_of(reduced + rows * reduced_stride + GATE_RANK, rows_inside, UP_RANK, UP_BLOCK)
            if UPDATES:
                up += multiplied(up_left, up_B)
        if NEXT_RANK:
            next_left = columns_of(grad_reduced + rows * grad_reduced_stride, rows_inside, NEXT_RANK, NEXT_BLOCK)
            gradient += multiplied(next_left, next_A)
        share, rest = _shares(x, IS_SILU)
        activated = x * share
        if IS_SILU:
            slope = share * (1.0 + x * rest)
        else:
            slope = share * (1.0 + x * rest * (1.5957691216057308 * (1.0 + 3 * 0.044715 * x * x)))
        gate_gradient = (gradient * up * slope).to(out.dtype.element_ty)
        up_gradient = (gradient * activated).to(out.dtype.element_ty)
        places = out + rows[:, None] * out_stride + columns[None, :]
        tl.store(places, gate_gradient, mask=inside)
        tl.store(places + F, up_gradient, mask=inside)
        if GATE_RANK:
            gate_total += multiplied(gate_gradient.T, gate_left)
        if UP_RANK:
            up_total += multiplied(up_gradient.T, up_left)
        made = (activated * up).to(out.dtype.element_ty)
        if product is not None:
            tl.store(product + rows[:, None] * product_stride + columns[None, :], made, mask=inside)
        if NEXT_RANK:
            next_total += multiplied(next_left.T, made)
    WIDTH: tl.constexpr = GATE_RANK + UP_RANK
    of_gate = all_B + (split.to(tl.int64) * 2 * F + columns)[:, None] * WIDTH
    of_up = of_gate + F * WIDTH
    if GATE_RANK:
        ranks = tl.arange(0, GATE_BLOCK)[None, :]
        inside = columns_inside[:, None] & (ranks < GATE_RANK)
        tl.store(of_gate + ranks, gate_total, mask=inside)
        tl.store(of_up + ranks, tl.zeros((COLUMNS, GATE_BLOCK), dtype=tl.float32), mask=inside)
    if UP_RANK:
        ranks = tl.arange(0, UP_BLOCK)[None, :]
        inside = columns_inside[:, None] & (ranks < UP_RANK)
        tl.store(of_gate + GATE_RANK + ranks, tl.zeros((COLUMNS, UP_BLOCK), dtype=tl.float32), mask=inside)
        tl.store(of_up + GATE_RANK + ranks, up_total, mask=inside)
    if NEXT_RANK:
        ranks = tl.arange(0, NEXT_BLOCK)[:, None]
        places = all_A + (split.to(tl.int64) * NEXT_RANK + ranks) * F + columns[None, :]
        tl.store(places, next_total, mask=(ranks < NEXT_RANK) & columns_inside[None, :])


@triton.jit
def _gate(
    gate_up: tl.tensor,
    out: tl.tensor,
    gate_up_stride: int,
    out_stride: int,
    F: tl.constexpr,
    IS_SILU: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    # One axis for rows and blocks of columns, as the second one ends at 65,535: neighbours lie next to each other.
    blocks = tl.cdiv(F, COLUMNS)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    columns = (tl.program_id(0) % blocks) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < F
    places = gate_up + row * gate_up_stride + columns
    x = tl.load(places, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(places + F, mask=inside, other=0.0).to(tl.float32)
    share, _ = _shares(x, IS_SILU)
    tl.store(out + row * out_stride + columns, (x * share * up).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _gate_backward(
    grad: tl.tensor,
    gate_up: tl.tensor,
    out: tl.tensor,
    product: tl.tensor,
    grad_stride: int,
    gate_up_stride: int,
    out_stride: int,
    product_stride: int,
    F: tl.constexpr,
    IS_SILU: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    blocks = tl.cdiv(F, COLUMNS)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    columns = (tl.program_id(0) % blocks) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < F
    places = gate_up + row * gate_up_stride + columns
    x = tl.load(places, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(places + F, mask=inside, other=0.0).to(tl.float32)
    gradient = tl.load(grad + row * grad_stride + columns, mask=inside, other=0.0).to(tl.float32)
    share, rest = _shares(x, IS_SILU)
    activated = x * share
    if IS_SILU:
        slope = share * (1.0 + x * rest)
    else:
        slope = share * (1.0 + x * rest * (1.5957691216057308 * (1.0 + 3 * 0.044715 * x * x)))
    places = out + row * out_stride + columns
    tl.store(places, (gradient * up * slope).to(out.dtype.element_ty), mask=inside)
    tl.store(places + F, (gradient * activated).to(out.dtype.element_ty), mask=inside)
    tl.store(product + row * product_stride + columns, (activated * up).to(product.dtype.element_ty), mask=inside)


@triton.jit
def _shares(x: tl.tensor, IS_SILU: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """(p, 1 - p) of an activation x * p: p is sigmoid(x), or 0.5 (1 + tanh u) = sigmoid(2u), u = sqrt(2/pi) (x + 0.044715 x^3).

    Both have all their digits however large x is: nothing is subtracted, and p below 1e-34 is none the smaller.
    """
    argument = x if IS_SILU else 1.5957691216057308 * (x + 0.044715 * x * x * x)
    exponential = tl.exp(-tl.maximum(argument, -80.0))
    share = 1.0 / (1.0 + exponential)
    return share, share * exponential
