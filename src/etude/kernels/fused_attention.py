"""Causal attention inside the segments of a packed row as Triton kernels, for segments of any length.

    P = softmax(mask(cap(scaling * Q K^T))),   O = P V
    dV = P^T dO,   dS = P * (dO V^T - rowsum(dO * O)),   dQ = scaling * dS K,   dK = scaling * dS^T Q

Online softmax and its recomputation in the backward pass as in FlashAttention-2 (Dao, arXiv 2307.08691, algorithms 1 and 2).
Different is how the work is cut: a program takes some rows of one segment, and programs are as many as there are such pieces,
not as many as the longest segment would need for every segment; short segments are what training data is made of. dQ and
dK, dV have a kernel each, so that nothing is added up in an order that changes from run to run: the same bits every time.

Legend: T tokens of the row, S segments, H heads, K key/value heads, d head size. Importing this module needs Triton.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = tl.constexpr(1.4426950408889634)


class Rule(NamedTuple):
    """What attention does besides being causal; 0 stands for nothing."""

    scaling: float
    window: int = 0
    """Keys that a query sees, itself included."""
    softcap: float = 0.0
    """Logits become softcap * tanh(logits / softcap)."""


class Shape(NamedTuple):
    """Rows that a kernel holds at a time beside its own ones, its warps and stages."""

    other: int
    num_warps: int
    num_stages: int

    def constants(self) -> dict[str, int]:
        return {"OTHER": self.other, "num_warps": self.num_warps, "num_stages": self.num_stages}


OWN = 64
"""Rows of a tile. With larger ones more of it lies beyond the diagonal: slower for every length measured, on an H100 with d
of 64 and 128."""


def cut(cu_seqlens: Tensor, T: int) -> Tensor:
    """The table of tiles, (N, 3) int32, of segments of T tokens in all: for each tile the first token and the length of its
    segment, and its number there. Sorted by that number, the largest first: the last rows see the most keys. Length 0 where
    there is nothing to do.

    N depends on T and the number of segments alone, so that a CUDA graph serves segments of other lengths.

    Args:
        cu_seqlens: first token of every segment and the end of the last, int32 (S + 1).
    """
    S = cu_seqlens.numel() - 1
    num_tiles = triton.cdiv(T, OWN) + S
    table = torch.empty((num_tiles, 3), dtype=torch.int32, device=cu_seqlens.device)
    _cut[(num_tiles,)](cu_seqlens, table, S, OWN=OWN, SEGMENTS=max(2, triton.next_power_of_2(S)), num_warps=1)
    return table


def attend(
    query_THd: Tensor, key_TKd: Tensor, value_TKd: Tensor, tiles_N3: Tensor, rule: Rule, sinks_H: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attended values (T, H, d) and, in float32, the base-2 logarithm of every row's softmax denominator (H, T).

    Args:
        sinks_H: logits that take part in the softmax and have no value.
    """
    T, H, d = query_THd.shape
    attended_THd = torch.empty((T, H, d), dtype=query_THd.dtype, device=query_THd.device)
    lse_HT = torch.empty((H, T), dtype=torch.float32, device=query_THd.device)
    inputs = (query_THd, key_TKd, value_TKd)
    _attend[(H, len(tiles_N3))](
        *inputs, sinks_H, tiles_N3, attended_THd, lse_HT, *strides_of(*inputs, attended_THd), T, *numbers_of(rule),
        **constants_of(query_THd, key_TKd, rule), HAS_SINKS=sinks_H is not None, **_shape(d).constants(),
    )  # fmt: skip
    return attended_THd, lse_HT


def _shape(d: int) -> Shape:
    if d > 128:
        return Shape(32, 4, 2)
    return Shape(64 if d <= 64 else 32, 4, 3)


def strides_of(*tensors: Tensor) -> list[int]:
    return [stride for tensor in tensors for stride in tensor.stride()[:2]]


def numbers_of(rule: Rule) -> tuple[float, float, int]:
    return rule.scaling, rule.softcap, rule.window


def constants_of(query_THd: Tensor, key_TKd: Tensor, rule: Rule) -> dict[str, Any]:
    _, H, d = query_THd.shape
    return {
        "GROUP": H // key_TKd.shape[1],
        "SIZE": d,
        "SIZE_BLOCK": max(16, triton.next_power_of_2(d)),
        "OWN": OWN,
        "HAS_WINDOW": rule.window > 0,
        "HAS_CAP": rule.softcap > 0.0,
    }


@triton.jit(do_not_specialize=["S"])
def _cut(cu_seqlens: tl.tensor, table: tl.tensor, S: int, OWN: tl.constexpr, SEGMENTS: tl.constexpr) -> None:
    number = tl.program_id(0)
    segments = tl.arange(0, SEGMENTS)
    starts = tl.load(cu_seqlens + segments, mask=segments < S, other=0)
    ends = tl.load(cu_seqlens + segments + 1, mask=segments < S, other=0)
    counts = (ends - starts + OWN - 1) // OWN
    are_before = (tl.cumsum(counts, 0) <= number) & (segments < S)
    segment = tl.sum(are_before.to(tl.int32), 0)  # S where all tiles are taken: its length is 0
    tile = number - tl.sum(tl.where(are_before, counts, 0), 0)
    start = tl.sum(tl.where(segments == segment, starts, 0), 0)
    length = tl.sum(tl.where(segments == segment, ends - starts, 0), 0)
    # Before it come the tiles with larger numbers, and those with the same one of the segments before.
    rank = tl.sum(tl.maximum(counts - 1 - tile, 0), 0) + tl.sum(
        ((counts > tile) & (segments < segment)).to(tl.int32), 0
    )
    row = table + 3 * tl.where(length > 0, rank, number)
    tl.store(row, start)
    tl.store(row + 1, length)
    tl.store(row + 2, tile)


@triton.jit
def load_tile(tiles: tl.tensor) -> tl.tensor:
    """First token and length of the segment of this program, and the number of its tile there."""
    row = tiles + 3 * tl.program_id(1)
    return tl.load(row).to(tl.int64), tl.load(row + 1), tl.load(row + 2)


@triton.jit
def load_rows(
    pointer: tl.tensor,
    rows: tl.tensor,
    stride: int,
    length: int,
    SIZE: tl.constexpr,
    SIZE_BLOCK: tl.constexpr,
    ARE_INSIDE: tl.constexpr,
) -> tl.tensor:
    """Rows of a segment, 0 where there is nothing; `ARE_INSIDE`: all of them are below its length."""
    sizes = tl.arange(0, SIZE_BLOCK)
    pointers = pointer + rows[:, None] * stride + sizes[None, :]
    if ARE_INSIDE and SIZE == SIZE_BLOCK:
        return tl.load(pointers)
    mask = (sizes < SIZE)[None, :]
    if not ARE_INSIDE:
        mask = mask & (rows < length)[:, None]
    return tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def tanh(x: tl.tensor) -> tl.tensor:
    return 1.0 - 2.0 / (1.0 + tl.exp2(x * 2.885390081777927))


@triton.jit(do_not_specialize=["T"])
def _attend(
    query: tl.tensor,
    key: tl.tensor,
    value: tl.tensor,
    sinks: tl.tensor,
    tiles: tl.tensor,
    attended: tl.tensor,
    lse: tl.tensor,
    query_stride: int,
    query_head_stride: int,
    key_stride: int,
    key_head_stride: int,
    value_stride: int,
    value_head_stride: int,
    attended_stride: int,
    attended_head_stride: int,
    T: int,
    scaling: float,
    softcap: float,
    window: int,
    GROUP: tl.constexpr,
    SIZE: tl.constexpr,
    SIZE_BLOCK: tl.constexpr,
    OWN: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    OTHER: tl.constexpr,
) -> None:
    start, length, tile = load_tile(tiles)
    if length == 0:
        return
    first = tile * OWN
    head = tl.program_id(0)
    rows, columns, sizes = first + tl.arange(0, OWN), tl.arange(0, OTHER), tl.arange(0, SIZE_BLOCK)
    row_mask = (rows < length)[:, None] & (sizes < SIZE)[None, :]
    query += start * query_stride + head * query_head_stride
    key += start * key_stride + head // GROUP * key_head_stride
    value += start * value_stride + head // GROUP * value_head_stride
    q = load_rows(query, rows, query_stride, length, SIZE, SIZE_BLOCK, False)
    largest = tl.full((OWN,), float("-inf"), tl.float32)
    total = tl.zeros((OWN,), tl.float32)
    if HAS_SINKS:
        largest = tl.zeros((OWN,), tl.float32) + tl.load(sinks + head).to(tl.float32) * LOG2_E
        total += 1.0
    out = tl.zeros((OWN, SIZE_BLOCK), tl.float32)
    begin = 0
    if HAS_WINDOW:
        begin = tl.maximum(first - window + 1, 0) // OTHER * OTHER
    # Keys before the first row are seen by all rows, but for a window; those from there on need a mask.
    for near in tl.static_range(2):
        if near:
            lowest, highest = first, tl.minimum(first + OWN, length)
        else:
            lowest, highest = begin, first
        for column in range(lowest, highest, OTHER):
            at = column + columns
            k = load_rows(key, at, key_stride, length, SIZE, SIZE_BLOCK, not near)
            scores = tl.dot(q, tl.trans(k), input_precision="ieee")
            if HAS_CAP:
                scores = softcap * tanh(scores * (scaling / softcap)) * LOG2_E
            else:
                scores *= scaling * LOG2_E
            if near or HAS_WINDOW:
                seen = rows[:, None] >= at[None, :]
                if HAS_WINDOW:
                    seen = seen & (rows[:, None] - at[None, :] < window)
                scores = tl.where(seen, scores, float("-inf"))
            above = tl.maximum(largest, tl.max(scores, 1))
            floor = above
            if HAS_WINDOW:
                floor = tl.where(above == float("-inf"), 0.0, above)  # a row that has seen no key yet
            weights = tl.exp2(scores - floor[:, None])
            shrink = tl.exp2(largest - floor)
            total = total * shrink + tl.sum(weights, 1)
            v = load_rows(value, at, value_stride, length, SIZE, SIZE_BLOCK, not near)
            out = tl.dot(weights.to(v.dtype), v, out * shrink[:, None], input_precision="ieee")
            largest = above
    out = out / total[:, None]
    attended += start * attended_stride + head * attended_head_stride
    tl.store(
        attended + rows[:, None] * attended_stride + sizes[None, :], out.to(attended.dtype.element_ty), mask=row_mask
    )
    tl.store(lse + head * T + start + rows, largest + tl.log2(total), mask=rows < length)
