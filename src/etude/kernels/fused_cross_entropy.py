"""The softmax, its loss and its gradient of a chunk of logits as one Triton kernel: two reads and one write of the chunk.

A program takes a row and walks it twice. The first walk gathers what the words other than the target got,

    m = max z_j,   S = sum exp(z_j - m)   over j != target,      d = m + log S - z_target,

and everything else follows from d, the log odds against the target, without a difference of nearly equal numbers:

    loss = log(1 + exp d),   p_j = exp(z_j - m) * sigmoid(d) / S,   gradient at the target = -sigmoid(d),

so that a token whose probability is one in float32 still has a loss and a gradient. The second walk goes backwards, as
the end of the row is what the cache still holds. Importing this module needs Triton.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK, WARPS = 4096, 8
"""Columns of a step: 16 logits per thread, whose maxima and sums stay in registers until the row ends."""


def loss_and_gradient(logits_RV: Tensor, targets_R: Tensor, softcap: float | None, scale: float) -> Tensor:
    """Losses of the rows, (R, 1) in float32; the gradient of the raw logits takes their place.

    A target outside the vocabulary makes its row's loss and gradient NaN.
    """
    R, V = logits_RV.shape
    losses = torch.empty((R, 1), dtype=torch.float32, device=logits_RV.device)
    _loss_and_gradient[(R,)](
        logits_RV, targets_R, losses, logits_RV.stride(0), targets_R.stride(0), softcap, float(scale), V, BLOCK,
        num_warps=WARPS,
    )  # fmt: skip
    return losses


@triton.jit
def _loss_and_gradient(
    logits: tl.tensor,
    targets: tl.tensor,
    losses: tl.tensor,
    logits_stride: int,
    targets_stride: int,
    softcap: float | None,
    scale: float,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    logits += row * logits_stride
    target = tl.load(targets + row * targets_stride)
    target_logit = tl.load(logits + target, mask=(target >= 0) & (target < V), other=float("nan"))
    target_score, target_slope = _shape(target_logit.to(tl.float32), softcap, scale)
    target_score = tl.where(target_score == float("inf"), float("nan"), target_score)  # an overflow is no certainty
    target = target.to(tl.int32)

    # A maximum and a sum per lane. The smallest number instead of -inf: a logit of -inf is no difference of infinities.
    lane_maximum = tl.full((BLOCK,), -3.4028234663852886e38, tl.float32)
    lane_sum = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, V, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        scores, _ = _shape(tl.load(logits + columns, mask=columns < V, other=0.0).to(tl.float32), softcap, scale)
        scores = tl.where((columns < V) & (columns != target), scores, float("-inf"))
        # One exponential for both: of the two terms the larger has the factor one.
        smaller = tl.exp(-tl.abs(scores - lane_maximum))
        lane_sum = tl.where(scores > lane_maximum, lane_sum * smaller + 1.0, lane_sum + smaller)
        lane_maximum = tl.maximum(lane_maximum, scores)
    maximum = tl.max(lane_maximum)
    others = tl.sum(lane_sum * tl.exp(lane_maximum - maximum))

    log_odds = maximum - target_score + tl.log(others)
    small = tl.exp(-tl.abs(log_odds))
    tl.store(losses + row, tl.maximum(log_odds, 0.0) + _log_of_one_plus(small))
    share = tl.where(log_odds >= 0, 1.0, small) / (1.0 + small)
    factor = share / tl.where(others == 0.0, 1.0, others)

    blocks: tl.constexpr = (V + BLOCK - 1) // BLOCK
    for step in range(blocks):
        columns = (blocks - 1 - step) * BLOCK + tl.arange(0, BLOCK)
        # Neither what is read nor what is written is wanted again: both make room for the parts of rows that are.
        raw = tl.load(logits + columns, mask=columns < V, other=0.0, eviction_policy="evict_first")
        scores, slopes = _shape(raw.to(tl.float32), softcap, scale)
        # Only the target, which is replaced, may lie above the maximum of the others.
        gradient = tl.exp(tl.minimum(scores - maximum, 0.0)) * factor * slopes
        gradient = tl.where(columns == target, -share * target_slope, gradient)
        gradient = gradient.to(logits.dtype.element_ty)
        tl.store(logits + columns, gradient, mask=columns < V, eviction_policy="evict_first")


@triton.jit
def _shape(x: tl.tensor, softcap: float | None, scale: float) -> tuple[tl.tensor, tl.tensor]:
    """(z, dz/dx) of a raw logit; 1 - tanh^2 = 4e / (1 + e)^2 for e = exp(-2|u|) keeps its digits where tanh nears one."""
    if softcap is None:
        z = x * scale
        slope = scale
    else:
        u = x * (scale / softcap)
        e = tl.exp(-2.0 * tl.abs(u))
        inverse = 1.0 / (1.0 + e)
        tanh = (1.0 - e) * inverse
        z = softcap * tl.where(u < 0, -tanh, tanh)
        slope = (4.0 * scale) * e * inverse * inverse
    return z, slope


@triton.jit
def _log_of_one_plus(x: tl.tensor) -> tl.tensor:
    """log(1 + x): what rounding took from 1 + x is given back by the ratio of x and the x that the sum holds."""
    rounded = 1.0 + x
    held = rounded - 1.0
    return tl.where(held == 0.0, x, tl.log(rounded) * (x / tl.where(held == 0.0, 1.0, held)))
