"""Our own attention kernel against attention written out in float64, on any device."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from etude.kernels.attention import PER_SEQUENCE, AttentionRule, Segments, fused_segments, segment_attention

SHARED_HEADS = [(2, 2), (4, 2), (4, 1), (6, 2)]
LENGTHS = [(1,), (5, 70, 1, 130), (64, 128), (63, 65, 64), (200,)]
RULES = {
    "plain": AttentionRule(),
    "scaled": AttentionRule(scaling=0.2),
    "window of 1": AttentionRule(sliding_window=1),
    "window of 7": AttentionRule(sliding_window=7),
    "window of 64": AttentionRule(sliding_window=64),
    "window of 100, capped": AttentionRule(sliding_window=100, softcap=1.5),
    "capped": AttentionRule(softcap=2.0),
    "sinks": AttentionRule(sinks=torch.empty(0)),  # filled in for the number of heads
    "sinks and a window": AttentionRule(sinks=torch.empty(0), sliding_window=9),
}


def check_attention(
    rule: AttentionRule,
    lengths: tuple[int, ...],
    num_heads: int,
    num_kv_heads: int,
    size: int,
    dtype: torch.dtype,
    device: str = "cpu",
    *,
    empty: int = 0,
) -> None:
    """Values and the three gradients; heads lie in a joint projection, as they do in a model. `empty`: segments of nothing
    behind the others."""
    generator = torch.Generator().manual_seed(sum(lengths) + size)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    num_tokens = sum(lengths)
    joint_TO = drawn(num_tokens, (num_heads + 2 * num_kv_heads) * size).requires_grad_()
    gradient_THd = drawn(num_tokens, num_heads, size)
    if rule.sinks is not None:
        rule = replace(rule, sinks=drawn(num_heads))
    offsets = torch.tensor([0, *lengths, *[0] * empty]).cumsum(0).to(device, torch.int32)
    ours = fused_segments(offsets, lengths, num_tokens, max(lengths))
    attended, joint_gradient = _attended(joint_TO, gradient_THd, ours, rule, num_heads, num_kv_heads)
    wide = replace(rule, sinks=None if rule.sinks is None else rule.sinks.double())
    reference = Segments(offsets, lengths, max(lengths), PER_SEQUENCE)
    joint64_TO = joint_TO.detach().double().requires_grad_()
    expected, expected_gradient = _attended(joint64_TO, gradient_THd.double(), reference, wide, num_heads, num_kv_heads)
    tolerance = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    assert attended.dtype == joint_gradient.dtype == dtype
    for found, wanted in ((attended, expected), (joint_gradient, expected_gradient)):
        difference = float((found.double() - wanted).norm() / wanted.norm().clamp_min(1e-30))
        assert difference < tolerance, f"{difference:.1e}"
        # No single row is wrong among many right ones.
        apart = (found.double() - wanted).flatten(1).norm(dim=1)
        assert bool((apart < 20 * tolerance * wanted.norm() / len(wanted) ** 0.5 + 1e-12).all())


def _attended(
    joint_TO: Tensor, gradient_THd: Tensor, segments: Segments, rule: AttentionRule, num_heads: int, num_kv_heads: int
) -> tuple[Tensor, Tensor]:
    size = gradient_THd.shape[2]
    heads = joint_TO.view(len(joint_TO), -1, size).split((num_heads, num_kv_heads, num_kv_heads), dim=1)
    query, key, value = (each.transpose(0, 1)[None] for each in heads)
    attended_THd = segment_attention(query, key, value, segments, rule)[0]
    (gradient,) = torch.autograd.grad(attended_THd, joint_TO, gradient_THd)
    return attended_THd.detach(), gradient
