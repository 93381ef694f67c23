"""The fused e4m3 kernels in Triton's interpreter, on a CPU: run by `test_fp8` in a process of its own, as
TRITON_INTERPRET has to be set before anything imports Triton."""

from __future__ import annotations

import pytest
import torch

from fp8_checks import check_nearest_codes, check_rms_norm, check_zero_rows
from fused_checks import Inputs

BFLOAT16 = Inputs("cpu", torch.bfloat16)
SHAPES = [(1, 96, 0), (7, 100, 16), (3, 1100, 6)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("T", "D", "apart"), [*SHAPES, (2, 28672, 16)])
def test_nearest_codes(dtype: torch.dtype, T: int, D: int, apart: int) -> None:
    check_nearest_codes(Inputs("cpu", dtype), T, D, apart=apart)


def test_zero_rows() -> None:
    check_zero_rows(BFLOAT16)


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize(("T", "D", "apart"), SHAPES)
def test_rms_norm(T: int, D: int, apart: int, offset: float) -> None:
    check_rms_norm(BFLOAT16, T, D, offset=offset, apart=apart)
