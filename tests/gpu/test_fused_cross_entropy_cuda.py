"""The fused cross entropy on a CUDA device, at the sizes of real heads, against float64."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from etude.kernels.cross_entropy import linear_cross_entropy

if not torch.cuda.is_available() or importlib.util.find_spec("triton") is None:
    pytest.skip("needs a CUDA device and Triton", allow_module_level=True)

from cross_entropy_checks import GAP, assert_near, check_loss_and_gradient, logits_and_targets
from etude.kernels import fused_cross_entropy

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("softcap", "scale"), [(None, 1.0), (None, 0.3), (30.0, 1.0), (20.0, 2.5)])
@pytest.mark.parametrize(
    ("rows", "vocabulary"), [(1, 2), (7, 1001), (33, 50_257), (300, 128_256), (2048, 128_256), (2048, 262_144)]
)
def test_loss_and_gradient(rows: int, vocabulary: int, softcap: float | None, scale: float, dtype: torch.dtype) -> None:
    if dtype == torch.float32 and rows * vocabulary > 2**26:
        rows = 300
    logits, targets = logits_and_targets(rows, vocabulary, device="cuda", dtype=dtype)
    check_loss_and_gradient(logits, targets, softcap, scale)


def test_every_certainty_has_its_loss() -> None:
    """From a loss of 1e-35 to one of 80: the logarithms of the device are good enough at both ends."""
    gaps = torch.linspace(-80, 80, 4001, device="cuda")
    logits = torch.stack((gaps, torch.zeros_like(gaps)), dim=1)
    exact = torch.nn.functional.softplus(-gaps.double()[:, None], threshold=700.0)
    assert float(exact.min()) < 1e-34
    losses = fused_cross_entropy.loss_and_gradient(logits, torch.zeros_like(gaps, dtype=torch.int64), None, 1.0)
    assert_near(losses, exact)


def test_logits_beyond_32_bits() -> None:
    """More elements than a 32-bit offset can reach: the last rows are where they belong."""
    rows, vocabulary = 8200, 262_144
    assert rows * vocabulary > 2**31
    logits = torch.zeros(rows, vocabulary, device="cuda", dtype=torch.bfloat16)
    logits[-1, 7] = GAP
    targets = torch.zeros(rows, device="cuda", dtype=torch.int64)
    losses = fused_cross_entropy.loss_and_gradient(logits, targets, None, 1.0)
    assert losses[-1].item() == pytest.approx(GAP)
    assert logits[-1, 0].item() == -1.0
    assert logits[-1, 7].item() == 1.0
    assert bool((logits[:-1, 0] == -1.0).all())


def test_a_target_outside_the_vocabulary_is_an_error_of_its_row_only() -> None:
    logits, targets = logits_and_targets(6, 128_256, device="cuda", dtype=torch.bfloat16)
    targets[2], targets[4] = -100, 2**40
    losses = fused_cross_entropy.loss_and_gradient(logits, targets, 30.0, 1.0)
    assert losses[:, 0].isnan().tolist() == [False, False, True, False, True, False]
    assert logits.isnan().all(dim=1).tolist() == [False, False, True, False, True, False]


def test_a_graph_of_the_head_replays() -> None:
    """Two chunks, captured once: other hidden states and targets give what they give without the graph."""
    torch.manual_seed(0)
    N, D, V = 3000, 256, 128_256
    weight = torch.randn(V, D, device="cuda", dtype=torch.bfloat16) / D**0.5
    hidden = torch.randn(N, D, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    targets = torch.randint(V, (N,), device="cuda")

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        loss = linear_cross_entropy(hidden, weight, targets)
        (gradient,) = torch.autograd.grad(loss, hidden)
        return loss.detach(), gradient

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):  # compiles, and lets cuBLAS take its memory
        before, _ = run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured_loss, captured_gradient = run()
    with torch.no_grad():
        hidden.copy_(torch.randn_like(hidden) * 2)
        targets.copy_(torch.randint(V, (N,), device="cuda"))
    graph.replay()
    loss, gradient = run()
    torch.testing.assert_close(captured_loss, loss, rtol=0.0, atol=0.0)
    torch.testing.assert_close(captured_gradient, gradient, rtol=0.0, atol=0.0)
    assert float(loss) != float(before)
