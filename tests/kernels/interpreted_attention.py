"""Our own attention kernel in Triton's interpreter, on a CPU: run by `test_attention` in a process of its own, as
TRITON_INTERPRET has to be set before anything imports Triton."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.runtime import interpreter

from attention_checks import RULES, SHARED_HEADS, check_attention
from etude.kernels import fused_attention_backward
from etude.kernels.attention import AttentionRule, fused_segments, segment_attention
from etude.kernels.attention_operator import attend
from etude.kernels.fused_attention import OWN, cut


@pytest.fixture(autouse=True)
def _loops_with_computed_bounds(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The interpreter takes the bound of a loop for a number by `int(array)`, which numpy refuses for arrays of one."""
    original = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patched)
    yield


@pytest.mark.parametrize("rule", RULES)
def test_every_rule(rule: str) -> None:
    check_attention(RULES[rule], (5, 70, 1, 130), 4, 2, 16, torch.float32)


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), SHARED_HEADS)
@pytest.mark.parametrize("lengths", [(1,), (64, 128), (63, 65)])
def test_lengths_and_heads(lengths: tuple[int, ...], num_heads: int, num_kv_heads: int) -> None:
    check_attention(RULES["plain"], lengths, num_heads, num_kv_heads, 16, torch.float32)


@pytest.mark.parametrize("size", [8, 24, 64, 80, 96, 128, 256])
def test_sizes(size: int) -> None:
    check_attention(RULES["capped"], (70, 3), 2, 1, size, torch.float32)


def test_half_precision() -> None:
    check_attention(RULES["window of 100, capped"], (70, 120), 2, 1, 16, torch.float16)


def test_segments_of_nothing_are_left_out() -> None:
    check_attention(RULES["plain"], (70, 3), 2, 1, 16, torch.float32, empty=3)


@pytest.mark.parametrize("lengths", [(5, 70, 0, 1, 130, 64), (1,), (0, 0, 3), (640,), (64,) * 20])
def test_the_last_tiles_of_long_segments_come_first(lengths: tuple[int, ...]) -> None:
    offsets = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    found = cut(offsets, sum(lengths)).tolist()
    tiles = [
        [start, length, number]
        for start, length in zip(offsets.tolist(), lengths, strict=False)
        for number in range(-(-length // OWN))
    ]
    used = [row for row in found if row[1]]
    assert used == sorted(tiles, key=lambda row: -row[2]) and found[: len(used)] == used


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler warns of its own parts
def test_the_operator_is_what_torch_expects_of_one() -> None:
    """Schema, gradient, and the shapes that the compiler is told, also for lengths that differ from call to call."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(73, heads, 16, requires_grad=True) for heads in (4, 2, 2))
    tiles = cut(torch.tensor([0, 70, 73], dtype=torch.int32), 73)
    torch.library.opcheck(attend, (query, key, value, tiles, None, 0.25, 0, 0.0))

    def doubled(query: Tensor) -> Tensor:
        return 2 * attend(query, key, value, tiles, None, 0.25, 0, 1.5)[0]

    compiled = torch.compile(doubled, backend="aot_eager", fullgraph=True, dynamic=True)
    for function in (doubled, compiled):
        (gradient,) = torch.autograd.grad(function(query).sum(), query)
        assert torch.allclose(gradient, torch.autograd.grad(doubled(query).sum(), query)[0])


def test_a_probe_goes_backwards_and_meets_the_window(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU may have room for one pass, or one kind of it, and not for the other."""
    windows: list[int] = []

    def no_room(*arguments: Any) -> None:
        windows.append(arguments[-1].window)
        if windows[-1]:
            raise MemoryError("out of shared memory")

    original = fused_attention_backward.attend_backward
    monkeypatch.setattr(
        fused_attention_backward, "attend_backward", lambda *arguments: no_room(*arguments) or original(*arguments)
    )
    heads = torch.randn(1, 2, 12, 16)
    offsets = torch.tensor([0, 5, 12], dtype=torch.int32)
    rule = AttentionRule(sliding_window=50)
    with torch.no_grad():
        segment_attention(heads, heads, heads, fused_segments(offsets, (5, 7), 12, 7), rule)
        assert windows == []
        with pytest.raises(MemoryError, match="shared memory"):
            probed = fused_segments(offsets, (5, 7), 12, 7, windows_seen=[])
            segment_attention(heads, heads, heads, probed, rule)
        assert windows == [0, 50]
        windows.clear()
        again = fused_segments(offsets, (5, 7), 12, 7, windows_seen=[50, 50])  # the second layer of its kind
        segment_attention(heads, heads, heads, again, rule)
        assert windows == []
