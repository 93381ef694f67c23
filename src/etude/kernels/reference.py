"""The elementwise operations of a decoder layer in plain torch: what the fused kernels are tested against, and what runs
where there is no GPU.

Every function computes in float32 (float64 for float64 input) and rounds once, into `out`. The last dimension of every
tensor is contiguous, rows may be further apart than they are wide. Legend: T tokens, D hidden size, F width of the gated
layer, H heads, d head size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

SILU, GELU_TANH = "silu", "gelu_tanh"


def rms_norm(
    h_TD: Tensor, weight_D: Tensor, offset: float, eps: float, out_TD: Tensor, residual_TD: Tensor | None = None
) -> Tensor:
    """out = [residual +] h * s * (offset + weight), s = 1 / sqrt(mean(h^2) + eps); returns s (T), float32.

    Source: Zhang and Sennrich, arXiv 1910.07467, equation 4. `offset` is 1 for models that store weight - 1.
    """
    wide = _wide(h_TD)
    scale_T = torch.rsqrt(wide.square().mean(dim=1) + eps)
    result = wide * scale_T[:, None] * (offset + _wide(weight_D))
    out_TD.copy_(result if residual_TD is None else _wide(residual_TD) + result)
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
    """`rms_norm`, and out A^T (T, R), also copied to `room`."""
    scale_T = rms_norm(h_TD, weight_D, offset, eps, out_TD)
    return scale_T, reduced_product(out_TD, A_RD, room_TR)


def rms_norm_backward(
    grad_TD: Tensor,
    h_TD: Tensor,
    weight_D: Tensor,
    offset: float,
    scale_T: Tensor,
    residual_TD: Tensor | None = None,
    update: Reduction | None = None,
) -> Tensor:
    """The gradient of h (T, D): [residual +] s * (g - n * mean(g * n)), n = h * s, g = grad * (offset + weight).

    `residual` is the gradient that reaches h around the norm. `update` is what an adapter adds to `grad`, which is then
    grad + grad_reduced A: that sum is nowhere written, or over `grad` where the ranks are many.
    """
    normed, grad = _wide(h_TD) * scale_T[:, None], _wide(grad_TD)
    if update is not None:
        grad = grad + _wide(update.grad_reduced) @ _wide(update.A)
    weighted = grad * (offset + _wide(weight_D))
    result = scale_T[:, None] * (weighted - normed * (weighted * normed).mean(dim=1, keepdim=True))
    return (result if residual_TD is None else _wide(residual_TD) + result).to(h_TD.dtype)


def rotate(
    x_THd: Tensor,
    cos_Td: Tensor,
    sin_Td: Tensor,
    out_THd: Tensor,
    weight_d: Tensor | None = None,
    offset: float = 0.0,
    eps: float = 0.0,
) -> Tensor | None:
    """Rotary positions, out = y * cos + [-y2, y1] * sin with y = [y1, y2] in halves; y is x, or with `weight` its RMS norm.

    `out` may be x. Returns the scales s of the norm (T, H), float32, or None. Source: Su et al., arXiv 2104.09864.
    """
    y, scale_TH = _wide(x_THd), None
    if weight_d is not None:
        scale_TH = torch.rsqrt(y.square().mean(dim=2) + eps)
        y = y * scale_TH[..., None] * (offset + _wide(weight_d))
    cos, sin = _wide(cos_Td)[:, None], _wide(sin_Td)[:, None]
    first, second = y.chunk(2, dim=2)
    out_THd.copy_(y * cos + torch.cat((-second, first), dim=2) * sin)
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
    """Write the gradient of `rotate`'s x into `out`, which may be `grad`; x, weight and scales only where it normed."""
    grad, cos, sin = _wide(grad_THd), _wide(cos_Td)[:, None], _wide(sin_Td)[:, None]
    first, second = (grad * sin).chunk(2, dim=2)
    grad = grad * cos + torch.cat((second, -first), dim=2)
    if x_THd is not None and weight_d is not None and scale_TH is not None:
        scale = scale_TH[..., None]
        normed, weighted = _wide(x_THd) * scale, grad * (offset + _wide(weight_d))
        grad = scale * (weighted - normed * (weighted * normed).mean(dim=2, keepdim=True))
    out_THd.copy_(grad)


class HeadNorm(NamedTuple):
    """The RMS norm of a head before it is rotated: x * s * (offset + weight)."""

    weight: Tensor
    """(d)"""
    offset: float
    eps: float


class NormedHeads(NamedTuple):
    """What undoing the norm of heads needs: the heads (T, H, d) before it and their scales (T, H)."""

    heads: Tensor
    weight: Tensor
    offset: float
    scale: Tensor


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
    """Heads out of the rows of a joint projection, O = (H + 2K) d: queries and keys [normed and] rotated, values as they are.

    Returns the scales of the queries' norm (T, H) and of the keys' (T, K), float32, or None.
    """
    of_query, of_key, of_value = _heads_of(qkv_TO, query_THd.shape[1], key_TKd.shape[1])
    query_scale_TH = rotate(of_query, cos_Td, sin_Td, query_THd, *(query_norm or ()))
    key_scale_TK = rotate(of_key, cos_Td, sin_Td, key_TKd, *(key_norm or ()))
    value_TKd.copy_(of_value)
    return query_scale_TH, key_scale_TK


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
    """Write the gradient of `rotate_heads`'s rows into `out` (T, O); `query` and `key` only where it normed them."""
    of_query, of_key, of_value = _heads_of(out_TO, query_grad_THd.shape[1], key_grad_TKd.shape[1])
    rotate_backward(query_grad_THd, cos_Td, sin_Td, of_query, *(query or ()))
    rotate_backward(key_grad_TKd, cos_Td, sin_Td, of_key, *(key or ()))
    of_value.copy_(value_grad_TKd)


def _heads_of(rows_TO: Tensor, H: int, K: int) -> tuple[Tensor, Tensor, Tensor]:
    """Views (T, H, d), (T, K, d) and (T, K, d) of rows of (H + 2K) d."""
    query, key, value = torch.split(rows_TO.view(rows_TO.shape[0], H + 2 * K, -1), [H, K, K], dim=1)
    return query, key, value


def gate(gate_up_T2F: Tensor, activation: str, out_TF: Tensor) -> None:
    """out = f(gate) * up for the halves of `gate_up`; f is "silu" or "gelu_tanh". Source: Shazeer, arXiv 2002.05202."""
    gate_TF, up_TF = _wide(gate_up_T2F).chunk(2, dim=1)
    out_TF.copy_(_activate(gate_TF, activation) * up_TF)


def gate_backward(grad_TF: Tensor, gate_up_T2F: Tensor, activation: str, out_T2F: Tensor, product_TF: Tensor) -> None:
    """Write the gradient of `gate_up` into `out`, and what `gate` had computed into `product`.

    `out` may be `gate_up`, and `product` may be `grad`.
    """
    gate_TF, up_TF = _wide(gate_up_T2F).chunk(2, dim=1)
    grad, activated = _wide(grad_TF), _activate(gate_TF, activation)
    slope = _slope(gate_TF, activation)
    product = activated * up_TF
    out_T2F.copy_(torch.cat((grad * up_TF * slope, grad * activated), dim=1))
    product_TF.copy_(product)


class Update(NamedTuple):
    """What LoRA adds to the stacked gates: reduced B^T, where the first ranks and the last belong to one half each."""

    reduced: Tensor
    """(T, R)"""
    B: Tensor | None
    """(2F, R), zero where a half meets the ranks of the other; None where the gates hold their update already."""
    ranks: tuple[int, int]
    """How many of the R are of gate and of up."""

    def of(self, gate_up_T2F: Tensor) -> Tensor:
        """The gates with their update."""
        if self.B is None:
            return gate_up_T2F
        return torch.addmm(gate_up_T2F, self.reduced.to(gate_up_T2F.dtype), self.B.t().to(gate_up_T2F.dtype))


class Reduction(NamedTuple):
    """What an adapter adds to the gradient of its input x, grad_reduced A: the gradient of x A^T (T, r), and A (r, I)."""

    grad_reduced: Tensor
    A: Tensor


def gate_updated(
    gate_up_T2F: Tensor,
    update: Update,
    activation: str,
    out_TF: Tensor,
    A_RF: Tensor | None = None,
    room_TR: Tensor | None = None,
) -> Tensor | None:
    """`gate` of gate_up + reduced B^T, which is nowhere written; returns out A^T (T, r) where A is given, also copied to
    `room`."""
    gate(update.of(_wide(gate_up_T2F)), activation, out_TF)
    return None if A_RF is None else reduced_product(out_TF, A_RF, room_TR)


def reduced_product(x_TF: Tensor, A_RF: Tensor, room_TR: Tensor | None) -> Tensor:
    """x A^T (T, r), also copied to `room`."""
    reduced = torch.mm(x_TF, A_RF.t())
    if room_TR is not None:
        copy_rows(reduced, room_TR)
    return reduced


def gate_updated_backward(
    grad_TF: Tensor,
    gate_up_T2F: Tensor,
    update: Update,
    activation: str,
    out_T2F: Tensor,
    reduction: Reduction | None = None,
    product_TF: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The backward pass of `gate_updated`: its gradient into `out`, and those of B (2F, R) and of A (r, F), or parts
    (S, 2F, R) and (S, r, F) that add up to them.

    With `reduction` the gradient of the product is grad + grad_reduced A, and A's own is returned. `product`, which may be
    `grad`, receives what `gate_updated` had computed.
    """
    updated = update.of(_wide(gate_up_T2F))
    grad = _wide(grad_TF)
    if reduction is not None:
        grad = grad + _wide(reduction.grad_reduced) @ _wide(reduction.A)
    product = torch.empty(grad_TF.shape, dtype=grad_TF.dtype, device=grad_TF.device)
    gate_backward(grad, updated, activation, out_T2F, product)
    all_B = gradient_of_factor(out_T2F, update)
    if product_TF is not None:
        product_TF.copy_(product)
    return all_B, None if reduction is None else torch.mm(reduction.grad_reduced.t(), product)


def gradient_of_factor(grad_T2F: Tensor, update: Update) -> Tensor:
    """grad^T reduced (2F, R), zero where a half meets the ranks of the other."""
    all_B = torch.mm(grad_T2F.t(), update.reduced)
    half, gate_rank = grad_T2F.shape[1] // 2, update.ranks[0]
    all_B[:half, gate_rank:] = 0
    all_B[half:, :gate_rank] = 0
    return all_B


class Outer(NamedTuple):
    """What is summed over tokens to the gradient of a factor."""

    few: Tensor
    """(T, R)"""
    many: Tensor
    """(T, C)"""
    scale: Tensor | None = None
    """(T), by which `few` is still to be multiplied."""


def factor_gradients(of_A: Outer | None, of_B: Outer | None) -> tuple[Tensor | None, Tensor | None]:
    """few^T many (R, C) for A and many^T few (C, R) for B, each with its own; or parts (S, ..) that add up to them."""
    all_A = None if of_A is None else torch.mm(_scaled(of_A).t(), of_A.many)
    return all_A, None if of_B is None else torch.mm(of_B.many.t(), _scaled(of_B))


def _scaled(outer: Outer) -> Tensor:
    if outer.scale is None:
        return outer.few
    return (_wide(outer.few) * outer.scale[:, None]).to(outer.few.dtype)


def drop(x_TI: Tensor, seed: Tensor, stream: int, share: float, out_TI: Tensor) -> None:
    """out = x with a share of its elements zero and the others divided by 1 - share: which, is a function of seed, stream
    and place. Source: Srivastava et al., JMLR 15 (2014)."""
    generator = torch.Generator().manual_seed((int(seed) << 6) + stream)
    is_kept = torch.rand(x_TI.shape, generator=generator) >= share
    out_TI.copy_(_wide(x_TI) * is_kept.to(x_TI.device) / (1.0 - share))


def add_product(out_TI: Tensor, left_TR: Tensor, right_RI: Tensor, residual_TI: Tensor | None = None) -> None:
    """out += [residual +] left right, of a rank so low that reading and writing `out` is what takes time."""
    product = _wide(left_TR) @ _wide(right_RI)
    out_TI.copy_(_wide(out_TI) + (product if residual_TI is None else _wide(residual_TI) + product))


def copy_rows(source_TR: Tensor, out_TR: Tensor) -> None:
    """out = source: a few columns of wide rows."""
    out_TR.copy_(source_TR)


def _activate(x: Tensor, activation: str) -> Tensor:
    return functional.silu(x) if activation == SILU else functional.gelu(x, approximate="tanh")


def _slope(x: Tensor, activation: str) -> Tensor:
    if activation == SILU:
        sigmoid = torch.sigmoid(x)
        return sigmoid * (1 + x * (1 - sigmoid))
    inner = 0.7978845608028654 * (x + 0.044715 * x**3)
    tanh = torch.tanh(inner)
    return 0.5 * (1 + tanh) + 0.5 * x * (1 - tanh.square()) * 0.7978845608028654 * (1 + 3 * 0.044715 * x.square())


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
