"""Our own attention kernel on a CUDA device: against float64, in graphs, in compiled code, and the same bits every time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from attention_checks import RULES, check_attention
from etude.kernels.attention import AttentionRule, Segments, fused_segments, segment_attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

LONG = (1, 700, 16, 64, 2000, 128, 333)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [16, 64, 80, 128, 256])
@pytest.mark.parametrize("rule", ["plain", "window of 100, capped", "sinks and a window"])
def test_rules_and_sizes(rule: str, size: int, dtype: torch.dtype) -> None:
    check_attention(RULES[rule], (5, 70, 1, 130, 64), 4, 2, size, dtype, "cuda", empty=2)


@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(32, 8), (8, 8), (6, 1)])
def test_long_segments(num_heads: int, num_kv_heads: int, size: int) -> None:
    check_attention(RULES["plain"], LONG, num_heads, num_kv_heads, size, torch.bfloat16, "cuda")


def test_float32_to_its_own_precision() -> None:
    check_attention(RULES["capped"], (70, 3, 200), 4, 2, 64, torch.float32, "cuda")


def forward_and_backward(inputs: list[Tensor], offsets: Tensor, num_tokens: int) -> list[Tensor]:
    segments = fused_segments(offsets, (num_tokens,), num_tokens, 4096)
    attended = segment_attention(*inputs[:3], segments, AttentionRule())
    return [attended.detach(), *torch.autograd.grad(attended, inputs[:3], inputs[3])]


def drawn(num_tokens: int) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = [(1, 8, num_tokens, 64), (1, 2, num_tokens, 64), (1, 2, num_tokens, 64), (1, num_tokens, 8, 64)]
    return [torch.randn(s, device="cuda", dtype=torch.bfloat16).requires_grad_(s != shapes[3]) for s in shapes]


def offsets_of(*lengths: int) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to("cuda", torch.int32)


def test_the_same_bits_every_time() -> None:
    inputs, offsets = drawn(sum(LONG)), offsets_of(*LONG)
    first = forward_and_backward(inputs, offsets, sum(LONG))
    for _ in range(5):
        again = forward_and_backward(inputs, offsets, sum(LONG))
        assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


@pytest.mark.filterwarnings("ignore:.*AccumulateGrad.*:UserWarning")
def test_a_graph_serves_other_lengths() -> None:
    inputs, offsets = drawn(1024), offsets_of(1000, 24, 0, 0)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        forward_and_backward(inputs, offsets, 1024)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = forward_and_backward(inputs, offsets, 1024)
    for lengths in ((1, 2, 1021, 0), (256, 256, 256, 256), (1024, 0, 0, 0)):
        offsets.copy_(offsets_of(*lengths))
        graph.replay()
        expected = forward_and_backward(inputs, offsets_of(*lengths), 1024)
        assert all(torch.equal(one, other) for one, other in zip(captured, expected, strict=True))


@pytest.mark.filterwarnings("ignore")  # torch's compiler warns of its own deprecated parts
def test_compiled_code_calls_it_whole() -> None:
    inputs, offsets = drawn(sum(LONG)), offsets_of(*LONG)
    segments = fused_segments(offsets, LONG, sum(LONG), 4096)

    def attend(query: Tensor, key: Tensor, value: Tensor, segments: Segments) -> Tensor:
        return 2 * segment_attention(query * 1.5, key, value, segments, AttentionRule(softcap=5.0))

    results = []
    for function in (attend, torch.compile(attend, fullgraph=True, dynamic=True)):
        attended = function(*inputs[:3], segments)
        results.append([attended.detach(), *torch.autograd.grad(attended, inputs[:3], inputs[3])])
    for eager, compiled in zip(*results, strict=True):
        assert float((eager - compiled).float().norm() / eager.float().norm()) < 1e-2
