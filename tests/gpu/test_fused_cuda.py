"""The fused kernels on a CUDA device, at the sizes of real layers, against the reference in float64."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from etude.kernels import reference
from etude.kernels.reference import GELU_TANH, SILU

if not torch.cuda.is_available() or importlib.util.find_spec("triton") is None:
    pytest.skip("needs a CUDA device and Triton", allow_module_level=True)

from etude.kernels import fused
from fused_checks import (
    Inputs,
    check_accumulate,
    check_add_product,
    check_copy_rows,
    check_drop,
    check_factor_gradients,
    check_gate,
    check_gate_updated,
    check_gather,
    check_rms_norm,
    check_rms_norm_backward,
    check_rms_norm_reduced,
    check_rotate_heads,
)

pytestmark = pytest.mark.gpu


@pytest.fixture(params=[torch.bfloat16, torch.float16, torch.float32], ids=str)
def inputs(request: pytest.FixtureRequest) -> Inputs:
    return Inputs("cuda", request.param)


ROWS = [(1, 96, 0), (7, 100, 6), (512, 1024, 32), (4096, 2560, 64), (2048, 4096, 16), (300, 16384, 0)]


@pytest.mark.parametrize(
    ("offset", "residual", "in_place"), [(0.0, False, True), (1.0, True, True), (1.0, True, False)]
)
@pytest.mark.parametrize(("T", "D", "apart"), ROWS)
def test_rms_norm(inputs: Inputs, T: int, D: int, apart: int, offset: float, residual: bool, in_place: bool) -> None:
    check_rms_norm(inputs, T, D, offset=offset, residual=residual, in_place=in_place, apart=apart)


@pytest.mark.parametrize(("offset", "residual"), [(0.0, False), (1.0, True)])
@pytest.mark.parametrize(("T", "D", "apart"), ROWS)
def test_rms_norm_backward(inputs: Inputs, T: int, D: int, apart: int, offset: float, residual: bool) -> None:
    check_rms_norm_backward(inputs, T, D, offset=offset, residual=residual, apart=apart)


@pytest.mark.parametrize(("offset", "residual"), [(0.0, False), (1.0, True)])
@pytest.mark.parametrize("rank", [5, 16, 64, 70])
@pytest.mark.parametrize(("T", "D", "apart"), [*ROWS, (33, 576, 16), (1000, 5376, 32)])
def test_rms_norm_backward_with_an_update(
    inputs: Inputs, T: int, D: int, apart: int, rank: int, offset: float, residual: bool
) -> None:
    check_rms_norm_backward(inputs, T, D, offset=offset, residual=residual, apart=apart, rank=rank)


@pytest.mark.parametrize("room", [False, True])
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("rank", [3, 16, 48, 70])
@pytest.mark.parametrize(("T", "D", "apart"), [(1, 96, 0), (37, 2048, 64), (1000, 4096, 16), (300, 5000, 6)])
def test_rms_norm_reduced(inputs: Inputs, T: int, D: int, apart: int, rank: int, offset: float, room: bool) -> None:
    check_rms_norm_reduced(inputs, T, D, rank, offset=offset, room=room, apart=apart)


@pytest.mark.parametrize("wide_table", [False, True])
@pytest.mark.parametrize(("query_norm", "key_norm"), [(False, False), (True, True), (False, True)])
@pytest.mark.parametrize(
    ("T", "counts", "d"),
    [
        (1, (3, 1), 20),
        (7, (5, 5), 100),
        (7, (70, 3), 100),
        (2048, (16, 8), 64),
        (2048, (32, 8), 128),
        (512, (64, 64), 128),
        (1000, (4, 1), 256),
    ],
)
def test_rotate_heads(
    inputs: Inputs, T: int, counts: tuple[int, int], d: int, query_norm: bool, key_norm: bool, wide_table: bool
) -> None:
    table = torch.float32 if wide_table else inputs.dtype
    check_rotate_heads(inputs, T, counts, d, query_norm=query_norm, key_norm=key_norm, table=table)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("activation", [SILU, GELU_TANH])
@pytest.mark.parametrize(("T", "F", "apart"), [(1, 33, 0), (7, 130, 6), (4096, 3072, 64), (1024, 14336, 32)])
def test_gate(inputs: Inputs, T: int, F: int, apart: int, activation: str, in_place: bool) -> None:
    check_gate(inputs, T, F, activation=activation, in_place=in_place, apart=apart)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("activation", [SILU, GELU_TANH])
@pytest.mark.parametrize(
    ("ranks", "next_rank"), [((16, 16), 16), ((16, 8), 0), ((0, 5), 3), ((64, 64), 64), ((0, 0), 2), ((70, 3), 5)]
)
@pytest.mark.parametrize(("T", "F"), [(1, 33), (700, 3072), (4100, 14336)])
def test_gate_updated(
    inputs: Inputs, T: int, F: int, ranks: tuple[int, int], next_rank: int, activation: str, in_place: bool
) -> None:
    check_gate_updated(inputs, T, F, ranks, next_rank, activation=activation, in_place=in_place)


@pytest.mark.parametrize("in_place", [False, True])
def test_gates_that_hold_their_update(inputs: Inputs, in_place: bool) -> None:
    check_gate_updated(inputs, 70, 300, (4, 8), 5, activation=SILU, in_place=in_place, is_updated=True)


@pytest.mark.parametrize(
    ("T", "columns", "R", "apart"), [(1, 33, 1, 0), (70, 130, 5, 6), (4096, 2560, 16, 64), (1000, 14336, 128, 32)]
)
def test_add_product(inputs: Inputs, T: int, columns: int, R: int, apart: int) -> None:
    check_add_product(inputs, T, columns, R, apart=apart)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize(
    ("of_A", "of_B"),
    [((48, 2048), (48, 3072)), ((5, 33), None), (None, (64, 4100)), ((16, 100), (70, 40)), (None, None)],
)
@pytest.mark.parametrize(("T", "apart"), [(1, 0), (700, 6), (4100, 32)])
def test_factor_gradients(
    inputs: Inputs, T: int, apart: int, of_A: tuple[int, int] | None, of_B: tuple[int, int] | None, scaled: bool
) -> None:
    check_factor_gradients(inputs, T, of_A, of_B, scaled=scaled, apart=apart)


@pytest.mark.parametrize(("T", "R"), [(1, 1), (7, 24), (700, 5), (16384, 48)])
def test_copy_rows(inputs: Inputs, T: int, R: int) -> None:
    check_copy_rows(inputs, T, R)


def test_gather(inputs: Inputs) -> None:
    check_gather(inputs)


@pytest.mark.parametrize("column_factor", [False, True])
@pytest.mark.parametrize(
    ("I", "members"),
    [(33, [(10, 1)]), (100, [(40, 8), (20, 0), (24, 3)]), (4096, [(4096, 16), (1024, 16), (1024, 64)])],
)
def test_accumulate(inputs: Inputs, I: int, members: list[tuple[int, int]], column_factor: bool) -> None:  # noqa: E741
    check_accumulate(inputs, I, members, column_factor=column_factor)


def test_gates_beyond_32_bits() -> None:
    """More elements than a 32-bit offset can reach: the last rows are where they belong."""
    T, F = 76_000, 14_336
    assert T * 2 * F > 2**31
    gate_up = torch.zeros(T, 2 * F, device="cuda", dtype=torch.bfloat16)
    last = torch.randn(8, 2 * F, device="cuda").bfloat16()
    gate_up[-8:] = last
    out, exact = torch.full((T, F), 7.0, device="cuda", dtype=torch.bfloat16), last.new_empty(8, F)
    fused.gate(gate_up, SILU, out)
    reference.gate(last, SILU, exact)
    torch.testing.assert_close(out[-8:], exact, rtol=8e-3, atol=1e-6)
    assert not bool(out[:-8].any())


def test_a_graph_of_kernels_replays() -> None:
    """Nothing in a call waits for the device or depends on what is there."""
    h = torch.randn(256, 1024, device="cuda", dtype=torch.bfloat16)
    weight, out = torch.randn(1024, device="cuda", dtype=torch.bfloat16), torch.empty_like(h)
    heads, product = torch.empty_like(h), h.new_empty(256, 512)
    query, key, value = heads.view(256, 16, 64).split([8, 4, 4], dim=1)
    cos, sin = (torch.randn(256, 64, device="cuda") for _ in range(2))

    def run() -> None:
        fused.rms_norm(h, weight, 0.0, 1e-6, out)
        fused.rotate_heads(out, cos, sin, query, key, value)
        fused.gate(heads, SILU, product)

    run()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    h.copy_(torch.randn_like(h))
    graph.replay()
    replayed = product.clone()
    run()
    torch.testing.assert_close(replayed, product, rtol=0.0, atol=0.0)


@pytest.mark.parametrize(("T", "F"), [(300, 4096), (7, 14336)])
def test_drop(inputs: Inputs, T: int, F: int) -> None:
    check_drop(inputs, T, F)
