"""A mixture of experts with LoRA on its stacked weights, as grouped products with a backward pass written by hand.

    y_t = sum over k of w_tk * E(x_t, e_tk),    E(x, e) = (f(g) * u) W_down,e^T,    [g, u] = x W_gate_up,e^T

The T k rows are sorted by expert on the device; nothing is read back, and every shape is a function of T and k alone. The
update of rank r is added in its factors: no update of the size of the frozen weights is ever made. The gradient of w_tk
is taken from the gradient of the gated product, so the experts' outputs are not kept. Sums over k follow the order of k.

Legend: T tokens, S = T k rows, E experts, D hidden size, F width of an expert, I and O input and output size, r rank.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from etude.kernels.projection import operations


class Rows(NamedTuple):
    """Which rows belong to which expert."""

    token: Tensor
    """(S), the token of each row."""
    order: Tensor
    """(S), the place of each row before sorting."""
    place: Tensor
    """(S), where each (token, k) went: the inverse of `order`."""
    ends: Tensor
    """(E), int32: one past the last row of each expert."""


def sorted_rows(index_Tk: Tensor, num_experts: int) -> Rows:
    """Rows sorted by expert, tokens in order within each."""
    chosen, order = torch.sort(index_Tk.flatten(), stable=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(order.numel(), device=order.device)
    experts = torch.arange(num_experts, device=order.device, dtype=chosen.dtype)
    ends = torch.searchsorted(chosen, experts, right=True, out_int32=True)
    return Rows(order // index_Tk.shape[1], order, place, ends)


def grouped_product(x_SI: Tensor, weight_EIO: Tensor, ends_E: Tensor) -> Tensor:
    """Each row times the matrix of its expert: (S, O). On a GPU in bfloat16, with sizes that are multiples of 8."""
    if x_SI.device.type == "cuda":
        return torch._grouped_mm(x_SI, weight_EIO, offs=ends_E)
    out = x_SI.new_empty(x_SI.shape[0], weight_EIO.shape[2])
    start = 0
    for weight_IO, end in zip(weight_EIO, ends_E.tolist(), strict=True):
        torch.mm(x_SI[start:end], weight_IO, out=out[start:end])
        start = end
    return out


def grouped_gradient(grad_SO: Tensor, x_SI: Tensor, ends_E: Tensor) -> Tensor:
    """grad^T x over the rows of each expert: (E, O, I), zero for one without rows."""
    if x_SI.device.type == "cuda":
        return torch._grouped_mm(grad_SO.t(), x_SI, offs=ends_E)
    starts = [0, *ends_E.tolist()]
    return torch.stack([grad_SO[start:end].t() @ x_SI[start:end] for start, end in itertools.pairwise(starts)])


def factors_of(A: Tensor, B: Tensor, scaling: float, num_experts: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A (E, r, I) and s B (E, O, r) of peft's factors of a stacked weight, (E r, I) and (O, r E) with E innermost."""
    A_ErI = A.view(num_experts, -1, A.shape[1])
    B_EOr = B.view(B.shape[0], -1, num_experts).permute(2, 0, 1)
    return A_ErI.to(dtype), (B_EOr * scaling).to(dtype).contiguous()


def mixture(
    x_TD: Tensor,
    score_Tk: Tensor,
    index_Tk: Tensor,
    gate_up: Tensor,
    down: Tensor,
    activation: str,
    gate_up_factors: tuple[Tensor, Tensor] | None = None,
    down_factors: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """The weighted sum of the chosen experts' outputs (T, D), differentiable in x, scores and factors.

    `gate_up` (E, 2F, D) and `down` (E, D, F) are frozen; factors are those of `factors_of`.
    """
    rows = sorted_rows(index_Tk, gate_up.shape[0])
    factors = (*(gate_up_factors or (None, None)), *(down_factors or (None, None)))
    result: Tensor = _Mixture.apply(rows, gate_up.detach(), down.detach(), activation, x_TD, score_Tk, *factors)  # type: ignore[no-untyped-call]
    return result


def _forward(x: Tensor, weight: Tensor, A: Tensor | None, B: Tensor | None, ends: Tensor) -> tuple[Tensor, Any]:
    """x W^T + (x A^T) B^T, and x A^T."""
    y = grouped_product(x, weight.transpose(1, 2), ends)
    if A is None or B is None:
        return y, None
    reduced = grouped_product(x, A.transpose(1, 2), ends)
    return y.add_(grouped_product(reduced, B.transpose(1, 2), ends)), reduced


def _backward(grad: Tensor, weight: Tensor, A: Tensor | None, B: Tensor | None, ends: Tensor) -> tuple[Tensor, Any]:
    """The gradients of x and of x A^T."""
    grad_x = grouped_product(grad, weight, ends)
    if A is None or B is None:
        return grad_x, None
    grad_reduced = grouped_product(grad, B, ends)
    return grad_x.add_(grouped_product(grad_reduced, A, ends)), grad_reduced


class _Mixture(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Rows, gate_up: Tensor, down: Tensor, activation: str, x_TD: Tensor, score_Tk: Tensor,
        A1: Tensor | None, B1: Tensor | None, A2: Tensor | None, B2: Tensor | None,
    ) -> Tensor:  # fmt: skip
        gates, reduced1 = _forward(x_TD[rows.token], gate_up, A1, B1, rows.ends)
        gated = gates.new_empty(gates.shape[0], down.shape[2])
        operations(x_TD.device).gate(gates, activation, gated)
        y_SD, reduced2 = _forward(gated, down, A2, B2, rows.ends)
        # Frozen weights are no part of what autograd watches: peft touches them whenever its own forward runs.
        ctx.weights, ctx.activation = (gate_up, down), activation
        ctx.save_for_backward(*rows, x_TD, score_Tk, A1, B1, A2, B2, gates, reduced1, reduced2)
        y_TkD = y_SD[rows.place].view(*score_Tk.shape, -1)
        return (y_TkD * score_Tk[..., None]).sum(dim=1).to(x_TD.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        *found, x_TD, score_Tk, A1, B1, A2, B2, gates, reduced1, reduced2 = ctx.saved_tensors
        (gate_up, down), rows, kernels = ctx.weights, Rows(*found), operations(grad_TD.device)
        score_S1 = score_Tk.flatten()[rows.order][:, None]
        grad_SD = grad_TD[rows.token]
        plain, plain_reduced = _backward(grad_SD, down, A2, B2, rows.ends)
        gates_grad, gated = torch.empty_like(gates), torch.empty_like(plain)
        kernels.gate_backward((plain * score_S1).to(plain.dtype), gates, ctx.activation, gates_grad, gated)
        score_grad = (plain * gated).sum(dim=1, dtype=score_Tk.dtype)[rows.place].view(score_Tk.shape)
        A1_grad = B1_grad = A2_grad = B2_grad = None
        if A2 is not None:
            weighted_reduced = (reduced2 * score_S1).to(reduced2.dtype)
            B2_grad = grouped_gradient(grad_SD, weighted_reduced, rows.ends)
            A2_grad = grouped_gradient((plain_reduced * score_S1).to(gated.dtype), gated, rows.ends)
        x_grad, grad_reduced = _backward(gates_grad, gate_up, A1, B1, rows.ends)
        if A1 is not None:
            B1_grad = grouped_gradient(gates_grad, reduced1, rows.ends)
            A1_grad = grouped_gradient(grad_reduced, x_TD[rows.token], rows.ends)
        x_grad = x_grad[rows.place].view(*score_Tk.shape, -1).sum(dim=1)
        return None, None, None, None, x_grad, score_grad, A1_grad, B1_grad, A2_grad, B2_grad
