"""The fused kernels in Triton's interpreter, on a CPU: run by `test_fused` in a process of its own, as TRITON_INTERPRET
has to be set before anything imports Triton."""

from __future__ import annotations

import pytest
import torch

from etude.kernels.reference import GELU_TANH, SILU
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

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.fixture(params=DTYPES, ids=str)
def inputs(request: pytest.FixtureRequest) -> Inputs:
    return Inputs("cpu", request.param)


@pytest.mark.parametrize(
    ("offset", "residual", "in_place"), [(0.0, False, True), (1.0, True, True), (1.0, True, False)]
)
@pytest.mark.parametrize(("T", "D", "apart"), [(1, 96, 0), (7, 100, 16), (3, 1100, 6)])
def test_rms_norm(inputs: Inputs, T: int, D: int, apart: int, offset: float, residual: bool, in_place: bool) -> None:
    check_rms_norm(inputs, T, D, offset=offset, residual=residual, in_place=in_place, apart=apart)


@pytest.mark.parametrize(("offset", "residual"), [(0.0, False), (1.0, True)])
@pytest.mark.parametrize(("T", "D", "apart"), [(1, 96, 0), (7, 100, 16), (3, 1100, 6)])
def test_rms_norm_backward(inputs: Inputs, T: int, D: int, apart: int, offset: float, residual: bool) -> None:
    check_rms_norm_backward(inputs, T, D, offset=offset, residual=residual, apart=apart)


@pytest.mark.parametrize(("offset", "residual"), [(0.0, False), (1.0, True)])
@pytest.mark.parametrize("rank", [3, 16, 33, 70])
@pytest.mark.parametrize(("T", "D", "apart"), [(1, 96, 0), (16, 256, 16), (37, 576, 6)])
def test_rms_norm_backward_with_an_update(
    inputs: Inputs, T: int, D: int, apart: int, rank: int, offset: float, residual: bool
) -> None:
    if inputs.dtype == torch.bfloat16:
        pytest.skip("the interpreter's tl.dot multiplies the bits of bfloat16 as whole numbers; tested on a GPU")
    check_rms_norm_backward(inputs, T, D, offset=offset, residual=residual, apart=apart, rank=rank)


@pytest.mark.parametrize("room", [False, True])
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("rank", [3, 16, 48, 70])
@pytest.mark.parametrize(("T", "D", "apart"), [(1, 96, 0), (37, 576, 16), (5, 700, 6)])
def test_rms_norm_reduced(inputs: Inputs, T: int, D: int, apart: int, rank: int, offset: float, room: bool) -> None:
    if inputs.dtype == torch.bfloat16:
        pytest.skip("the interpreter's tl.dot multiplies the bits of bfloat16 as whole numbers; tested on a GPU")
    check_rms_norm_reduced(inputs, T, D, rank, offset=offset, room=room, apart=apart)


@pytest.mark.parametrize("wide_table", [False, True])
@pytest.mark.parametrize(("query_norm", "key_norm"), [(False, False), (True, True), (False, True)])
@pytest.mark.parametrize(
    ("T", "counts", "d"),
    [(1, (3, 1), 20), (7, (5, 5), 64), (2, (70, 3), 100), (2, (35, 35), 100), (2, (2, 1), 256)],
)
def test_rotate_heads(
    inputs: Inputs, T: int, counts: tuple[int, int], d: int, query_norm: bool, key_norm: bool, wide_table: bool
) -> None:
    table = torch.float32 if wide_table else inputs.dtype
    check_rotate_heads(inputs, T, counts, d, query_norm=query_norm, key_norm=key_norm, table=table)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("activation", [SILU, GELU_TANH])
@pytest.mark.parametrize(("T", "F", "apart"), [(1, 33, 0), (7, 130, 16), (2, 1030, 6)])
def test_gate(inputs: Inputs, T: int, F: int, apart: int, activation: str, in_place: bool) -> None:
    check_gate(inputs, T, F, activation=activation, in_place=in_place, apart=apart)


GATES_WITH_ADAPTERS = [((4, 4), 4), ((16, 8), 0), ((0, 5), 3), ((20, 0), 17), ((0, 0), 2), ((0, 0), 0), ((70, 3), 5)]
"""Ranks of gate and up, and of what follows; the last ones are above what the kernels take."""


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("activation", [SILU, GELU_TANH])
@pytest.mark.parametrize(("ranks", "next_rank"), GATES_WITH_ADAPTERS)
@pytest.mark.parametrize(("T", "F"), [(1, 33), (70, 300)])
def test_gate_updated(
    inputs: Inputs, T: int, F: int, ranks: tuple[int, int], next_rank: int, activation: str, in_place: bool
) -> None:
    if inputs.dtype == torch.bfloat16:
        pytest.skip("the interpreter's tl.dot multiplies the bits of bfloat16 as whole numbers; tested on a GPU")
    check_gate_updated(inputs, T, F, ranks, next_rank, activation=activation, in_place=in_place)


@pytest.mark.parametrize("in_place", [False, True])
def test_gates_that_hold_their_update(inputs: Inputs, in_place: bool) -> None:
    if inputs.dtype == torch.bfloat16:
        pytest.skip("the interpreter's tl.dot multiplies the bits of bfloat16 as whole numbers; tested on a GPU")
    check_gate_updated(inputs, 70, 300, (4, 8), 5, activation=SILU, in_place=in_place, is_updated=True)


@pytest.mark.parametrize(("T", "columns", "R", "apart"), [(1, 33, 1, 0), (70, 130, 5, 16), (9, 260, 100, 6)])
def test_add_product(inputs: Inputs, T: int, columns: int, R: int, apart: int) -> None:
    if inputs.dtype == torch.bfloat16:
        pytest.skip("the interpreter's tl.dot multiplies the bits of bfloat16 as whole numbers; tested on a GPU")
    check_add_product(inputs, T, columns, R, apart=apart)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize(
    ("of_A", "of_B"),
    [((3, 33), (20, 130)), ((5, 33), None), (None, (64, 100)), ((16, 100), (70, 40)), (None, None)],
)
@pytest.mark.parametrize(("T", "apart"), [(1, 0), (200, 6)])
def test_factor_gradients(
    inputs: Inputs, T: int, apart: int, of_A: tuple[int, int] | None, of_B: tuple[int, int] | None, scaled: bool
) -> None:
    if inputs.dtype == torch.bfloat16:
        pytest.skip("the interpreter's tl.dot multiplies the bits of bfloat16 as whole numbers; tested on a GPU")
    check_factor_gradients(inputs, T, of_A, of_B, scaled=scaled, apart=apart)


@pytest.mark.parametrize(("T", "R"), [(1, 1), (7, 24), (700, 5)])
def test_copy_rows(inputs: Inputs, T: int, R: int) -> None:
    check_copy_rows(inputs, T, R)


def test_gather(inputs: Inputs) -> None:
    check_gather(inputs)


@pytest.mark.parametrize("column_factor", [False, True])
@pytest.mark.parametrize(
    ("I", "members"), [(33, [(10, 1)]), (100, [(40, 8), (20, 0), (24, 3)]), (1100, [(64, 4), (32, 4)])]
)
def test_accumulate(inputs: Inputs, I: int, members: list[tuple[int, int]], column_factor: bool) -> None:  # noqa: E741
    check_accumulate(inputs, I, members, column_factor=column_factor)


@pytest.mark.parametrize(("T", "F"), [(3, 1500), (40, 130)])
def test_drop(inputs: Inputs, T: int, F: int) -> None:
    check_drop(inputs, T, F)
