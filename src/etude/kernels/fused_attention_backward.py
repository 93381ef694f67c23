"""The backward pass of `fused_attention` as two Triton kernels: one for dQ, one for dK and dV, so that nothing is added up in
an order that changes from run to run. The legend is there."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from etude.kernels.fused_attention import (
    LOG2_E,
    Rule,
    Shape,
    constants_of,
    load_rows,
    load_tile,
    numbers_of,
    strides_of,
    tanh,
)

LARGE_HEADS_BYTES = 114_688
"""Shared memory that dK and dV of heads of 256 take by 32 rows at a time on an A100; cards for one's own desk have 101,376."""


def attend_backward(
    grad_THd: Tensor,
    query_THd: Tensor,
    key_TKd: Tensor,
    value_TKd: Tensor,
    attended_THd: Tensor,
    lse_HT: Tensor,
    tiles_N3: Tensor,
    rule: Rule,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, in their shapes; `attended_THd` and `lse_HT` are what `attend` returned."""
    (T, H, d), K, N = query_THd.shape, key_TKd.shape[1], len(tiles_N3)
    constants = constants_of(query_THd, key_TKd, rule)
    inputs = (query_THd, key_TKd, value_TKd, grad_THd)
    query_grad = torch.empty((T, H, d), dtype=query_THd.dtype, device=query_THd.device)
    delta_HT = torch.empty_like(lse_HT)
    _query_gradient[(H, N)](
        *inputs, attended_THd, lse_HT, delta_HT, tiles_N3, query_grad, *strides_of(*inputs, attended_THd, query_grad), T,
        *numbers_of(rule), **constants, **_query_shape(d).constants(),
    )  # fmt: skip
    key_grad, value_grad = (torch.empty((T, K, d), dtype=x.dtype, device=x.device) for x in (key_TKd, value_TKd))
    _key_value_gradients[(K, N)](
        *inputs, lse_HT, delta_HT, tiles_N3, key_grad, value_grad, *strides_of(*inputs), T, K, *numbers_of(rule), **constants,
        **_key_shape(d, key_TKd.device).constants(),
    )  # fmt: skip
    return query_grad, key_grad, value_grad


def _query_shape(d: int) -> Shape:
    if d > 128:
        return Shape(32, 8, 1)
    return Shape(64, 4, 2) if d <= 64 else Shape(32, 4, 3)


def _key_shape(d: int, device: torch.device) -> Shape:
    if d > 128:
        return Shape(32 if _shared_bytes(device) >= LARGE_HEADS_BYTES else 16, 8, 1)
    return Shape(32, 4, 3 if d <= 64 else 2)


@functools.cache
def _shared_bytes(device: torch.device) -> int:
    """Shared memory that a program may have."""
    if device.type != "cuda":
        return LARGE_HEADS_BYTES
    return int(getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 0))


@triton.jit(do_not_specialize=["T"])
def _query_gradient(
    query: tl.tensor,
    key: tl.tensor,
    value: tl.tensor,
    gradient: tl.tensor,
    attended: tl.tensor,
    lse: tl.tensor,
    delta: tl.tensor,
    tiles: tl.tensor,
    query_gradient: tl.tensor,
    query_stride: int,
    query_head_stride: int,
    key_stride: int,
    key_head_stride: int,
    value_stride: int,
    value_head_stride: int,
    gradient_stride: int,
    gradient_head_stride: int,
    attended_stride: int,
    attended_head_stride: int,
    out_stride: int,
    out_head_stride: int,
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
    gradient += start * gradient_stride + head * gradient_head_stride
    attended += start * attended_stride + head * attended_head_stride
    q = load_rows(query, rows, query_stride, length, SIZE, SIZE_BLOCK, False)
    do = load_rows(gradient, rows, gradient_stride, length, SIZE, SIZE_BLOCK, False)
    o = load_rows(attended, rows, attended_stride, length, SIZE, SIZE_BLOCK, False)
    row_delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    at_row = head * T + start + rows
    tl.store(delta + at_row, row_delta, mask=rows < length)
    row_lse = tl.load(lse + at_row, mask=rows < length, other=0.0)
    out = tl.zeros((OWN, SIZE_BLOCK), tl.float32)
    begin = 0
    if HAS_WINDOW:
        begin = tl.maximum(first - window + 1, 0) // OTHER * OTHER
    for near in tl.static_range(2):
        if near:
            lowest, highest = first, tl.minimum(first + OWN, length)
        else:
            lowest, highest = begin, first
        for column in range(lowest, highest, OTHER):
            at = column + columns
            k = load_rows(key, at, key_stride, length, SIZE, SIZE_BLOCK, not near)
            v = load_rows(value, at, value_stride, length, SIZE, SIZE_BLOCK, not near)
            scores = tl.dot(q, tl.trans(k), input_precision="ieee")
            if HAS_CAP:
                capped = tanh(scores * (scaling / softcap))
                scores = capped * (softcap * LOG2_E)
            else:
                scores *= scaling * LOG2_E
            weights = tl.exp2(scores - row_lse[:, None])
            if near or HAS_WINDOW:
                seen = rows[:, None] >= at[None, :]
                if HAS_WINDOW:
                    seen = seen & (rows[:, None] - at[None, :] < window)
                weights = tl.where(seen, weights, 0.0)
            change = weights * (tl.dot(do, tl.trans(v), input_precision="ieee") - row_delta[:, None])
            if HAS_CAP:
                change *= 1.0 - capped * capped
            out = tl.dot(change.to(k.dtype), k, out, input_precision="ieee")
    query_gradient += start * out_stride + head * out_head_stride
    out = (out * scaling).to(query_gradient.dtype.element_ty)
    tl.store(query_gradient + rows[:, None] * out_stride + sizes[None, :], out, mask=row_mask)


@triton.jit(do_not_specialize=["T"])
def _key_value_gradients(
    query: tl.tensor,
    key: tl.tensor,
    value: tl.tensor,
    gradient: tl.tensor,
    lse: tl.tensor,
    delta: tl.tensor,
    tiles: tl.tensor,
    key_gradient: tl.tensor,
    value_gradient: tl.tensor,
    query_stride: int,
    query_head_stride: int,
    key_stride: int,
    key_head_stride: int,
    value_stride: int,
    value_head_stride: int,
    gradient_stride: int,
    gradient_head_stride: int,
    T: int,
    K: int,
    scaling: float,
    softcap: float,
    window: int,
    GROUP: tl.constexpr,
    SIZE: tl.constexpr,
    SIZE_BLOCK: tl.constexpr,
    OWN: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_CAP: tl.constexpr,
    OTHER: tl.constexpr,
) -> None:
    start, length, tile = load_tile(tiles)
    if length == 0:
        return
    first = ((length + OWN - 1) // OWN - 1 - tile) * OWN  # from the end: the first keys are seen by the most rows
    key_head = tl.program_id(0)
    at, others, sizes = first + tl.arange(0, OWN), tl.arange(0, OTHER), tl.arange(0, SIZE_BLOCK)
    own_mask = (at < length)[:, None] & (sizes < SIZE)[None, :]
    key += start * key_stride + key_head * key_head_stride
    value += start * value_stride + key_head * value_head_stride
    k = load_rows(key, at, key_stride, length, SIZE, SIZE_BLOCK, False)
    v = load_rows(value, at, value_stride, length, SIZE, SIZE_BLOCK, False)
    key_out = tl.zeros((OWN, SIZE_BLOCK), tl.float32)
    value_out = tl.zeros((OWN, SIZE_BLOCK), tl.float32)
    last = length
    if HAS_WINDOW:
        last = tl.minimum(length, first + OWN - 1 + window)
    for head in range(key_head * GROUP, key_head * GROUP + GROUP):
        query_rows = query + start * query_stride + head * query_head_stride
        gradient_rows = gradient + start * gradient_stride + head * gradient_head_stride
        lse_rows, delta_rows = lse + head * T + start, delta + head * T + start
        for near in tl.static_range(2):
            if near:
                lowest, highest = first, tl.minimum(first + OWN, last)
            else:
                lowest, highest = first + OWN, last
            for row in range(lowest, highest, OTHER):
                rows = row + others
                # Beyond the end all of these are 0, and so is what they add.
                q = load_rows(query_rows, rows, query_stride, length, SIZE, SIZE_BLOCK, False)
                do = load_rows(gradient_rows, rows, gradient_stride, length, SIZE, SIZE_BLOCK, False)
                row_lse = tl.load(lse_rows + rows, mask=rows < length, other=0.0)
                row_delta = tl.load(delta_rows + rows, mask=rows < length, other=0.0)
                scores = tl.dot(k, tl.trans(q), input_precision="ieee")
                if HAS_CAP:
                    capped = tanh(scores * (scaling / softcap))
                    scores = capped * (softcap * LOG2_E)
                else:
                    scores *= scaling * LOG2_E
                weights = tl.exp2(scores - row_lse[None, :])
                if near or HAS_WINDOW:
                    seen = rows[None, :] >= at[:, None]
                    if HAS_WINDOW:
                        seen = seen & (rows[None, :] - at[:, None] < window)
                    weights = tl.where(seen, weights, 0.0)
                value_out = tl.dot(weights.to(do.dtype), do, value_out, input_precision="ieee")
                change = weights * (tl.dot(v, tl.trans(do), input_precision="ieee") - row_delta[None, :])
                if HAS_CAP:
                    change *= 1.0 - capped * capped
                key_out = tl.dot(change.to(q.dtype), q, key_out, input_precision="ieee")
    place = (start * K + key_head) * SIZE + at[:, None] * (K * SIZE) + sizes[None, :]
    key_out = (key_out * scaling).to(key_gradient.dtype.element_ty)
    tl.store(key_gradient + place, key_out, mask=own_mask)
    tl.store(value_gradient + place, value_out.to(value_gradient.dtype.element_ty), mask=own_mask)
