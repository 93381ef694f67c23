"""Attention over segments against attention over each sample alone, written out in float64."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from etude.errors import ModelError
from etude.kernels import attention
from etude.kernels.attention import (
    FLEX,
    FUSED,
    PER_SEQUENCE,
    VARLEN,
    AttentionRule,
    Segments,
    kernels_for,
    segment_attention,
)
from interpreted import needs_triton, run_interpreted

LENGTHS = (5, 1, 9, 3)
H, K, D = 4, 2, 8


def packed_row(lengths: tuple[int, ...] = LENGTHS, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    num_tokens = sum(lengths)
    shapes = ((1, H, num_tokens, D), (1, K, num_tokens, D), (1, K, num_tokens, D))
    query, key, value = (torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes)
    return query, key, value


def segments_of(lengths: tuple[int, ...], kernel: str = PER_SEQUENCE) -> Segments:
    ends = torch.tensor((0, *lengths)).cumsum(0).to(torch.int32)
    return Segments(ends, lengths, max(lengths), kernel=kernel)


def reference(query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...], rule: AttentionRule) -> Tensor:
    """One softmax per query and head, key by key."""
    scaling = 1 / math.sqrt(D) if rule.scaling is None else rule.scaling
    rows, start = [], 0
    for length in lengths:
        for q in range(start, start + length):
            first = start if rule.sliding_window is None else max(start, q - rule.sliding_window + 1)
            heads = []
            for head in range(H):
                shared = head // (H // K)
                scores = key[0, shared, first : q + 1] @ query[0, head, q] * scaling
                if rule.softcap is not None:
                    scores = rule.softcap * torch.tanh(scores / rule.softcap)
                if rule.sinks is not None:
                    scores = torch.cat([scores, rule.sinks[head : head + 1]])
                weights = torch.softmax(scores, 0)[: q + 1 - first]
                heads.append(weights @ value[0, shared, first : q + 1])
            rows.append(torch.stack(heads))
        start += length
    return torch.stack(rows)[None]


RULES = {
    "plain": AttentionRule(),
    "scaled": AttentionRule(scaling=0.7),
    "window": AttentionRule(sliding_window=3),
    "window of one": AttentionRule(sliding_window=1),
    "window longer than the samples": AttentionRule(sliding_window=64),
    "softcap": AttentionRule(softcap=1.5),
    "softcap and window": AttentionRule(softcap=1.5, sliding_window=3, scaling=0.5),
    "sinks": AttentionRule(sinks=torch.randn(H, dtype=torch.float64, generator=torch.Generator().manual_seed(1))),
}


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_every_segment_is_attended_on_its_own(rule: AttentionRule) -> None:
    inputs = packed_row()
    ours = segment_attention(*inputs, segments_of(LENGTHS), rule)
    theirs = reference(*inputs, LENGTHS, rule)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7 if rule.softcap or rule.sinks is not None else 1e-12)
    direction = torch.randn(ours.shape, dtype=ours.dtype, generator=torch.Generator().manual_seed(2))
    for our_gradient, their_gradient in zip(
        torch.autograd.grad(ours, inputs, direction), torch.autograd.grad(theirs, inputs, direction), strict=True
    ):
        torch.testing.assert_close(our_gradient, their_gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rule", [RULES["plain"], RULES["softcap and window"]], ids=["plain", "softcap"])
def test_bfloat16_is_within_rounding(rule: AttentionRule) -> None:
    inputs = packed_row(dtype=torch.bfloat16)
    ours = segment_attention(*inputs, segments_of(LENGTHS), rule)
    theirs = reference(*(tensor.double() for tensor in inputs), LENGTHS, rule)
    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=4e-2)


@pytest.mark.parametrize("name", ["plain", "scaled", "window", "window of one"])
def test_products_in_bfloat16_have_the_gradients_of_the_kernel_in_float64(name: str) -> None:
    lengths = (37, 1, 64)
    inputs = packed_row(lengths, dtype=torch.bfloat16)
    ours = segment_attention(*inputs, segments_of(lengths), RULES[name])
    wide = [tensor.detach().double().requires_grad_() for tensor in inputs]
    theirs = segment_attention(*wide, segments_of(lengths), RULES[name])
    direction = torch.randn(ours.shape, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(2))
    our_gradients = torch.autograd.grad(ours, inputs, direction)
    their_gradients = torch.autograd.grad(theirs, wide, direction.double())
    for our_tensor, their_tensor in zip((ours, *our_gradients), (theirs, *their_gradients), strict=True):
        difference = (our_tensor.double() - their_tensor).detach().norm() / their_tensor.detach().norm().clamp_min(1e-3)
        assert our_tensor.dtype == torch.bfloat16 and float(difference) <= 8e-3


def test_changing_one_segment_leaves_the_bits_of_the_others() -> None:
    query, key, value = (tensor.detach() for tensor in packed_row(dtype=torch.float32))
    before = segment_attention(query, key, value, segments_of(LENGTHS), AttentionRule())
    other_key, other_value = key.clone(), value.clone()
    other_key[:, :, 6:15] += 1.0
    other_value[:, :, 6:15] -= 1.0
    after = segment_attention(query, other_key, other_value, segments_of(LENGTHS), AttentionRule())
    assert torch.equal(before[:, :6], after[:, :6])
    assert torch.equal(before[:, 15:], after[:, 15:])
    assert not torch.equal(before[:, 6:15], after[:, 6:15])


def test_dropout_drops_weights_of_attention() -> None:
    query, key, value = (tensor.detach() for tensor in packed_row((64,)))
    kept = segment_attention(query, key, value, segments_of((64,)), AttentionRule())
    for rule in (AttentionRule(dropout=0.5), AttentionRule(dropout=0.5, softcap=50.0)):
        torch.manual_seed(0)
        dropped = segment_attention(query, key, value, segments_of((64,)), rule)
        # A token that sees only itself is kept twice as strong, or dropped whole.
        first = dropped[0, 0] / kept[0, 0]
        assert set(first.mean(dim=-1).round(decimals=3).tolist()) <= {0.0, 2.0}
        assert not torch.allclose(dropped, kept)


def test_mixed_types_meet_in_the_autocast_type() -> None:
    query, key, value = (tensor.detach().float() for tensor in packed_row())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        attended = segment_attention(query, key, value.bfloat16(), segments_of(LENGTHS), AttentionRule())
    assert attended.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("kernel", "rule"),
    [
        (FUSED, AttentionRule(dropout=0.1)),
        (FUSED, AttentionRule(sinks=torch.zeros(H, requires_grad=True))),
        (VARLEN, AttentionRule(softcap=1.0)),
        (VARLEN, AttentionRule(dropout=0.1)),
        (VARLEN, AttentionRule(sinks=torch.zeros(H))),
        (FLEX, AttentionRule(dropout=0.1)),
        (FLEX, AttentionRule(sinks=torch.zeros(H))),
    ],
)
def test_a_kernel_refuses_what_it_cannot_do(kernel: str, rule: Any) -> None:
    with pytest.raises(ModelError, match=r"without|no logit cap"):
        segment_attention(*packed_row(), segments_of(LENGTHS, kernel), rule)


@needs_triton
def test_rows_beyond_32_bits_go_to_torchs_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    from etude.kernels import attention_operator

    monkeypatch.setattr(attention, "_varlen", lambda query, *others: query.shape[2])
    for num_tokens in (131_072, 131_073):
        heads = torch.empty(1, 128, num_tokens, 128, dtype=torch.bfloat16, device="meta")
        rows = Segments(torch.empty(2, dtype=torch.int32, device="meta"), (num_tokens,), num_tokens, FUSED)
        is_small_enough = num_tokens == 131_072
        monkeypatch.setattr(attention_operator, "attend", lambda *arguments: (torch.ones(1), None))
        found = attention._fused(heads, heads, heads, rows, AttentionRule())
        assert isinstance(found, Tensor) if is_small_enough else found == num_tokens


def test_kernels_worth_trying() -> None:
    assert kernels_for(torch.device("cpu"), torch.bfloat16) == (PER_SEQUENCE,)
    assert kernels_for(torch.device("cuda"), torch.float32) == (PER_SEQUENCE,)
    of_gpus = kernels_for(torch.device("cuda"), torch.bfloat16)
    assert of_gpus[-3:] == (VARLEN, FLEX, PER_SEQUENCE) and set(of_gpus[:-3]) <= {FUSED}


@needs_triton
def test_our_own_kernel_in_the_interpreter() -> None:
    assert kernels_for(torch.device("cuda"), torch.bfloat16)[0] == FUSED
    run_interpreted(Path(__file__).with_name("interpreted_attention.py"))
