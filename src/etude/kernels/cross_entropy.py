"""Cross entropy of a frozen linear head, in chunks of rows, with its gradient computed in the forward pass.

    z = scale * (h W^T + b),   z <- c * tanh(z / c) where the model caps its logits at c,
    L = sum_n [logsumexp(z_n) - z_n,target(n)],   dL/dz_n = softmax(z_n) - onehot(target(n)).

The gradient with respect to h needs nothing but the logits, so it is taken while a chunk of them exists, and the whole
N x V matrix never does. Legend: N labelled rows, D hidden size, V vocabulary.

bfloat16 takes a shorter way: one softmax written over the logits serves both the loss and the gradient (a 262k
vocabulary and 256 rows on a CPU: 70 ms instead of 325 ms in float32). A probability near one has no digits left in
bfloat16, so there the loss is log1p of what the other words got, and the target's gradient is minus their sum: rows of
the gradient sum to zero as they should, and confident tokens keep theirs.

On a GPU one Triton kernel (`fused_cross_entropy`) does both, in float32 for all of these types.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from etude.errors import ModelError
from etude.kernels.availability import triton_is_there

GPU_ROWS = 2048
"""Enough rows for the head's two matrix products to be limited by arithmetic, not by reading the head."""

CPU_ROWS_MIN, CPU_ROWS_MAX, CPU_LOGITS = 256, 512, 64 * 2**20
"""Rows and logits of a chunk on a CPU: matrix products are efficient from 256 rows on, more only costs memory."""


def linear_cross_entropy(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    *,
    bias_V: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    weights_N: Tensor | None = None,
    rows_per_chunk: int | None = None,
) -> Tensor:
    """The summed cross entropy of `targets` under the head, a float32 scalar (float64 for float64 input).

    Every row counts, or as much as `weights` (float32) says: leave unlabelled rows out. The head is a constant: only `hidden` receives a gradient. Under
    autocast the head is cast once per call, and multiplied in the autocast type.

    Raises:
        ModelError: the head is trainable; its gradient would silently be missing.
    """
    if weight_VD.requires_grad or (bias_V is not None and bias_V.requires_grad):
        raise ModelError("linear_cross_entropy is for frozen heads: a trainable head needs the model's own logits")
    device_type = hidden_ND.device.type
    if torch.is_autocast_enabled(device_type):
        hidden_ND = hidden_ND.to(torch.get_autocast_dtype(device_type))
    weight_VD = weight_VD.to(hidden_ND.dtype)
    bias_V = None if bias_V is None else bias_V.to(hidden_ND.dtype)
    rows = rows_per_chunk or default_rows_per_chunk(hidden_ND.device, vocabulary=weight_VD.shape[0])
    with torch.autocast(device_type, enabled=False):
        apply: Callable[..., Tensor] = _LinearCrossEntropy.apply
        return apply(hidden_ND, weight_VD, targets_N, weights_N, bias_V, softcap, scale, rows)


def linear_logits(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    *,
    bias_V: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
) -> Tensor:
    """The logits that `linear_cross_entropy` scores, all at once; for comparing a head with the model's own."""
    logits_NV = functional.linear(hidden_ND, weight_VD, bias_V)
    return _shape_logits(logits_NV, softcap, scale)


def default_rows_per_chunk(device: torch.device, *, vocabulary: int) -> int:
    if device.type != "cpu":
        return GPU_ROWS
    return min(max(CPU_LOGITS // vocabulary, CPU_ROWS_MIN), CPU_ROWS_MAX)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        targets_N: Tensor,
        weights_N: Tensor | None,
        bias_V: Tensor | None,
        softcap: float | None,
        scale: float,
        rows_per_chunk: int,
    ) -> Tensor:
        wants_gradient = ctx.needs_input_grad[0]
        num_rows = hidden_ND.shape[0]
        # One buffer for all chunks: fresh pages for every chunk cost a CPU as much as the softmax itself.
        buffer = hidden_ND.new_empty(min(rows_per_chunk, num_rows), weight_VD.shape[0])
        gradient_ND = torch.empty_like(hidden_ND) if wants_gradient else None
        loss_sum = hidden_ND.new_zeros((), dtype=_accumulator(hidden_ND.dtype))
        for start in range(0, num_rows, rows_per_chunk):
            chunk = slice(start, min(start + rows_per_chunk, num_rows))
            logits = buffer[: chunk.stop - chunk.start]
            torch.mm(hidden_ND[chunk], weight_VD.t(), out=logits)
            if bias_V is not None:
                logits += bias_V
            losses, logits_gradient = _loss_and_gradient(logits, targets_N[chunk], softcap, scale)
            loss_sum += (losses if weights_N is None else losses[:, 0] * weights_N[chunk]).sum()
            if gradient_ND is not None:
                torch.mm(logits_gradient, weight_VD, out=gradient_ND[chunk])
        if gradient_ND is not None and weights_N is not None:
            gradient_ND.mul_(weights_N[:, None])
        ctx.save_for_backward(gradient_ND)
        return loss_sum

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, loss_gradient: Tensor) -> tuple[Tensor | None, ...]:
        (gradient_ND,) = ctx.saved_tensors
        # The product is taken in the scalar's float32: a loss scale of 65,536 has no float16.
        hidden_gradient = (gradient_ND * loss_gradient.to(_accumulator(gradient_ND.dtype))).to(gradient_ND.dtype)
        return hidden_gradient, None, None, None, None, None, None, None


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _shape_logits(logits: Tensor, softcap: float | None, scale: float) -> Tensor:
    if scale != 1.0:
        logits = logits * scale
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    return logits


def _loss_and_gradient(logits: Tensor, targets: Tensor, softcap: float | None, scale: float) -> tuple[Tensor, Tensor]:
    """Losses of a chunk, (rows, 1), and the gradient of its raw logits; the memory of `logits` is used up."""
    if logits.device.type == "cuda" and logits.dtype != torch.float64 and triton_is_there():
        from etude.kernels import fused_cross_entropy

        return fused_cross_entropy.loss_and_gradient(logits, targets, softcap, scale), logits
    if scale != 1.0:
        logits.mul_(scale)
    if softcap is None:
        losses, gradient = _softmax_cross_entropy(logits, targets)
    else:
        tanh = logits.div_(softcap).tanh_()
        losses, gradient = _softmax_cross_entropy(tanh * softcap, targets)
        gradient.mul_(tanh.square_().neg_().add_(1.0))
    if scale != 1.0:
        gradient.mul_(scale)
    return losses, gradient


def _softmax_cross_entropy(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Losses of the rows and softmax - onehot, which takes the place of `logits`."""
    if logits.dtype == torch.bfloat16:
        return _bfloat16_cross_entropy(logits, targets)
    at_target = _at(targets)
    # float16 cannot hold a small probability, so its chunk, and only that, is widened.
    scores = logits.float() if logits.dtype == torch.float16 else logits
    log_probabilities = torch.log_softmax(scores, dim=1, out=_in_place(scores))
    losses = -log_probabilities[at_target][:, None]
    gradient = log_probabilities.exp_()
    gradient[at_target] -= 1.0
    return losses, gradient.to(logits.dtype)


def _bfloat16_cross_entropy(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    probabilities, at_target = torch.softmax(logits, dim=1, out=_in_place(logits)), _at(targets)
    target = probabilities[at_target][:, None].float()
    probabilities[at_target] = 0.0
    others = probabilities.sum(dim=1, keepdim=True)  # added in float32 by the kernel, rounded once
    smallest = torch.finfo(torch.float32).tiny
    losses = torch.where(target < 0.5, -target.clamp_min(smallest).log(), -torch.log1p(-others.float()))
    probabilities[at_target] = -others[:, 0]
    return losses, probabilities


def _at(targets: Tensor) -> tuple[Tensor, Tensor]:
    """The place of every row's target. `scatter_` would copy the whole matrix on a CPU, for twice the time of a softmax."""
    return torch.arange(len(targets), device=targets.device), targets


def _in_place(logits: Tensor) -> Tensor | None:
    """Where the softmax may be written: over its own input on a CPU, whose kernels finish reading a row first."""
    return logits if logits.device.type == "cpu" else None
