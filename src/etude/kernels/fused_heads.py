"""What lies between a joint projection and attention as Triton kernels: heads that are normed, rotated and moved.

    [q, k, v] = rows of (H + 2K) d,   q and k: rotate([norm of] heads),   v: as it is

All three in one launch, in which a program does some heads of one token: which, and whether to rotate or to copy them, says
its second index. On the way back three gradients become one again. The same signatures and results as in `reference`.
Importing this module needs Triton. HEADS and HALF_BLOCK (half a head) are what one program covers, powers of two.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from etude.kernels.fused_norm import ELEMENTS_PER_WARP
from etude.kernels.reference import HeadNorm, NormedHeads

ROTATE_ELEMENTS = 4096
"""Elements of one program of `rotate_heads`: 32 heads of 128 by four warps, so that cos and sin are read once for them."""


def rotate_heads(
    qkv_TO: Tensor,
    cos_Td: Tensor,
    sin_Td: Tensor,
    query_THd: Tensor,
    key_TKd: Tensor,
    value_TKd: Tensor,
    query_norm: HeadNorm | None = None,
    key_norm: HeadNorm | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """`reference.rotate_heads`."""
    T, H, d = query_THd.shape
    K = key_TKd.shape[1]
    query_weight, *query_numbers = (None, 0.0, 0.0) if query_norm is None else query_norm
    key_weight, *key_numbers = (None, 0.0, 0.0) if key_norm is None else key_norm
    query_scale, key_scale = (
        None if norm is None else torch.empty((T, heads), dtype=torch.float32, device=qkv_TO.device)
        for norm, heads in ((query_norm, H), (key_norm, K))
    )
    outputs = (query_THd, key_TKd, value_TKd)
    strides = (stride for out in outputs for stride in out.stride()[:2])
    query_heads, half_block, num_warps = _head_shape(H, d)
    key_heads = _head_shape(K, d)[0]
    _rotate_heads[(T, triton.cdiv(H, query_heads) + 2 * triton.cdiv(K, key_heads))](
        qkv_TO, cos_Td, sin_Td, *outputs, query_weight, key_weight, query_scale, key_scale, qkv_TO.stride(0), *strides,
        cos_Td.stride(0), sin_Td.stride(0), *query_numbers, *key_numbers, H, K, d // 2, query_heads, key_heads,
        half_block, num_warps=num_warps,
    )  # fmt: skip
    return query_scale, key_scale


def rotate_heads_backward(
    query_grad_THd: Tensor,
    key_grad_TKd: Tensor,
    value_grad_TKd: Tensor,
    cos_Td: Tensor,
    sin_Td: Tensor,
    out_TO: Tensor,
    query: NormedHeads | None = None,
    key: NormedHeads | None = None,
) -> None:
    """`reference.rotate_heads_backward`."""
    T, H, d = query_grad_THd.shape
    K = key_grad_TKd.shape[1]
    query_x, query_weight, query_offset, query_scale = (None, None, 0.0, None) if query is None else query
    key_x, key_weight, key_offset, key_scale = (None, None, 0.0, None) if key is None else key
    gradients = (query_grad_THd, key_grad_TKd, value_grad_TKd)
    strides = (
        stride for heads in (*gradients, query_x, key_x) for stride in ((0, 0) if heads is None else heads.stride()[:2])
    )
    query_heads, half_block, num_warps = _head_shape(H, d)
    key_heads = _head_shape(K, d)[0]
    _rotate_heads_backward[(T, triton.cdiv(H, query_heads) + 2 * triton.cdiv(K, key_heads))](
        *gradients, cos_Td, sin_Td, out_TO, query_x, key_x, query_weight, key_weight, query_scale, key_scale, *strides,
        out_TO.stride(0), cos_Td.stride(0), sin_Td.stride(0), query_offset, key_offset, H, K, d // 2, query_heads,
        key_heads, half_block, num_warps=num_warps,
    )  # fmt: skip


def _head_shape(H: int, d: int) -> tuple[int, int, int]:
    """(HEADS, HALF_BLOCK, warps) of a program that holds heads of one token in registers."""
    half_block = triton.next_power_of_2(d // 2)
    heads = min(triton.next_power_of_2(H), max(ROTATE_ELEMENTS // (2 * half_block), 1))
    return heads, half_block, max(heads * 2 * half_block // ELEMENTS_PER_WARP, 1)


@triton.jit
def _rotate_heads(
    qkv: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    query: tl.tensor,
    key: tl.tensor,
    value: tl.tensor,
    query_weight: tl.tensor,
    key_weight: tl.tensor,
    query_scale: tl.tensor,
    key_scale: tl.tensor,
    qkv_stride: int,
    query_stride: int,
    query_head_stride: int,
    key_stride: int,
    key_head_stride: int,
    value_stride: int,
    value_head_stride: int,
    cos_stride: int,
    sin_stride: int,
    query_offset: float,
    query_eps: float,
    key_offset: float,
    key_eps: float,
    H: tl.constexpr,
    K: tl.constexpr,
    HALF: tl.constexpr,
    QUERY_HEADS: tl.constexpr,
    KEY_HEADS: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
) -> None:
    QUERY_BLOCKS: tl.constexpr = (H + QUERY_HEADS - 1) // QUERY_HEADS
    KEY_BLOCKS: tl.constexpr = (K + KEY_HEADS - 1) // KEY_HEADS
    d: tl.constexpr = 2 * HALF
    token, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if block < QUERY_BLOCKS:
        _rotate(
            token, block, qkv, cos, sin, query, query_weight, query_scale, qkv_stride, d, query_stride,
            query_head_stride, cos_stride, sin_stride, query_offset, query_eps, H, HALF, QUERY_HEADS, HALF_BLOCK,
        )  # fmt: skip
    elif block < QUERY_BLOCKS + KEY_BLOCKS:
        _rotate(
            token, block - QUERY_BLOCKS, qkv + H * d, cos, sin, key, key_weight, key_scale, qkv_stride, d, key_stride,
            key_head_stride, cos_stride, sin_stride, key_offset, key_eps, K, HALF, KEY_HEADS, HALF_BLOCK,
        )  # fmt: skip
    else:
        _copy(
            token, block - QUERY_BLOCKS - KEY_BLOCKS, qkv + (H + K) * d, value, qkv_stride, d, value_stride,
            value_head_stride, K, HALF, KEY_HEADS, HALF_BLOCK,
        )  # fmt: skip


@triton.jit
def _rotate_heads_backward(
    query_grad: tl.tensor,
    key_grad: tl.tensor,
    value_grad: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    out: tl.tensor,
    query: tl.tensor,
    key: tl.tensor,
    query_weight: tl.tensor,
    key_weight: tl.tensor,
    query_scale: tl.tensor,
    key_scale: tl.tensor,
    query_grad_stride: int,
    query_grad_head_stride: int,
    key_grad_stride: int,
    key_grad_head_stride: int,
    value_grad_stride: int,
    value_grad_head_stride: int,
    query_stride: int,
    query_head_stride: int,
    key_stride: int,
    key_head_stride: int,
    out_stride: int,
    cos_stride: int,
    sin_stride: int,
    query_offset: float,
    key_offset: float,
    H: tl.constexpr,
    K: tl.constexpr,
    HALF: tl.constexpr,
    QUERY_HEADS: tl.constexpr,
    KEY_HEADS: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
) -> None:
    QUERY_BLOCKS: tl.constexpr = (H + QUERY_HEADS - 1) // QUERY_HEADS
    KEY_BLOCKS: tl.constexpr = (K + KEY_HEADS - 1) // KEY_HEADS
    d: tl.constexpr = 2 * HALF
    token, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if block < QUERY_BLOCKS:
        _rotate_backward(
            token, block, query_grad, cos, sin, out, query, query_weight, query_scale, query_grad_stride,
            query_grad_head_stride, query_stride, query_head_stride, out_stride, d, cos_stride, sin_stride,
            query_offset, H, HALF, QUERY_HEADS, HALF_BLOCK,
        )  # fmt: skip
    elif block < QUERY_BLOCKS + KEY_BLOCKS:
        _rotate_backward(
            token, block - QUERY_BLOCKS, key_grad, cos, sin, out + H * d, key, key_weight, key_scale, key_grad_stride,
            key_grad_head_stride, key_stride, key_head_stride, out_stride, d, cos_stride, sin_stride, key_offset, K,
            HALF, KEY_HEADS, HALF_BLOCK,
        )  # fmt: skip
    else:
        _copy(
            token, block - QUERY_BLOCKS - KEY_BLOCKS, value_grad, out + (H + K) * d, value_grad_stride,
            value_grad_head_stride, out_stride, d, K, HALF, KEY_HEADS, HALF_BLOCK,
        )  # fmt: skip


@triton.jit
def _rotate(
    token: tl.tensor,
    block: tl.tensor,
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
    heads = block.to(tl.int64) * HEADS + tl.arange(0, HEADS)
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
    token: tl.tensor,
    block: tl.tensor,
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
    heads = block.to(tl.int64) * HEADS + tl.arange(0, HEADS)
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
def _copy(
    token: tl.tensor,
    block: tl.tensor,
    source: tl.tensor,
    out: tl.tensor,
    source_stride: int,
    source_head_stride: int,
    out_stride: int,
    out_head_stride: int,
    H: tl.constexpr,
    HALF: tl.constexpr,
    HEADS: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
) -> None:
    heads = (block.to(tl.int64) * HEADS + tl.arange(0, HEADS))[:, None]
    columns = tl.arange(0, 2 * HALF_BLOCK)[None, :]
    inside = (heads < H) & (columns < 2 * HALF)
    value = tl.load(source + token * source_stride + heads * source_head_stride + columns, mask=inside)
    tl.store(out + token * out_stride + heads * out_head_stride + columns, value, mask=inside)


@triton.jit
def _factor(weight: tl.tensor, columns: tl.tensor, offset: float, within: tl.tensor) -> tl.tensor:
    """offset + weight, for all heads."""
    return (offset + tl.load(weight + columns, mask=within, other=0.0).to(tl.float32))[None, :]
