"""The fused cross entropy in Triton's interpreter, on a CPU: run by `test_fused_cross_entropy` in a process of its own, as
TRITON_INTERPRET has to be set before anything imports Triton."""

from __future__ import annotations

import pytest
import torch

from cross_entropy_checks import check_loss_and_gradient, logits_and_targets
from etude.kernels import fused_cross_entropy
from etude.kernels.fused_cross_entropy import BLOCK

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("softcap", "scale"), [(None, 1.0), (None, 0.3), (30.0, 1.0), (20.0, 2.5)])
@pytest.mark.parametrize(("rows", "vocabulary"), [(1, 2), (1, BLOCK), (7, 100), (8, 2 * BLOCK + 17)])
def test_loss_and_gradient(rows: int, vocabulary: int, softcap: float | None, scale: float, dtype: torch.dtype) -> None:
    logits, targets = logits_and_targets(rows, vocabulary, device="cpu", dtype=dtype)
    check_loss_and_gradient(logits, targets, softcap, scale)


@pytest.mark.filterwarnings("ignore:divide by zero encountered in log:RuntimeWarning")
def test_rows_without_a_rival_have_nothing_to_learn() -> None:
    logits = torch.tensor([[3.0], [4.0]])
    assert fused_cross_entropy.loss_and_gradient(logits, torch.tensor([0, 0]), None, 1.0).tolist() == [[0.0], [0.0]]
    assert logits.tolist() == [[0.0], [0.0]]


def test_words_that_are_ruled_out_take_no_part() -> None:
    """-inf is how a model rules a word out."""
    logits, targets = logits_and_targets(6, 100, device="cpu", dtype=torch.float32)
    ruled_out = torch.full((6, BLOCK + 50), float("-inf"))
    wide = torch.cat((ruled_out, logits, ruled_out), dim=1)
    check_loss_and_gradient(wide, targets + ruled_out.shape[1], None, 1.0)


def test_a_ruled_out_target_has_an_infinite_loss() -> None:
    logits = torch.tensor([[1.0, float("-inf"), 1.0]])
    assert fused_cross_entropy.loss_and_gradient(logits, torch.tensor([1]), None, 1.0).item() == float("inf")
    assert logits.tolist() == [[0.5, -1.0, 0.5]]


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize("column", [0, 1, 99])
def test_nan_and_overflow_are_not_hidden(number: float, column: int) -> None:
    """Neither in the target (column 1) nor elsewhere; the other rows do not notice."""
    logits, targets = torch.zeros(2, 100), torch.tensor([1, 1])
    logits[0, column] = number
    losses = fused_cross_entropy.loss_and_gradient(logits, targets, None, 1.0)
    assert losses.isnan().tolist() == [[True], [False]]
    assert logits.isnan().all(dim=1).tolist() == [True, False]


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("target", [-100, -1, 100, 2**40])
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_a_target_outside_the_vocabulary_reads_nothing(target: int, softcap: float | None) -> None:
    logits = torch.zeros(3, 100)
    losses = fused_cross_entropy.loss_and_gradient(logits, torch.tensor([5, target, 5]), softcap, 1.0)
    assert losses.isnan().tolist() == [[False], [True], [False]]
    assert logits.isnan().all(dim=1).tolist() == [False, True, False]
