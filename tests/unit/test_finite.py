"""Whether the numbers of a step are finite. What a GPU answers a step later is tested there."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from etude.optim.finite import CheckAtOnce, Finding, NoCheck, leaves_updates_out

NAN, INF = math.nan, math.inf


def finding(loss: float, norm: torch.Tensor | float | None) -> Finding:
    return Finding("step 3", torch.tensor(loss), norm, [])


@pytest.mark.parametrize(
    ("loss", "norm", "by_loss", "by_both"),
    [
        (1.0, 2.0, True, True),
        (1.0, torch.tensor(2.0), True, True),
        (1.0, None, True, True),
        (NAN, 2.0, False, False),
        (-INF, None, False, False),
        (1.0, INF, True, False),
        (1.0, torch.tensor(NAN), True, False),
        (0.0, 0.0, True, True),
        (3e38, 3e38, True, True),
    ],
)
def test_a_finding(loss: float, norm: Any, by_loss: bool, by_both: bool) -> None:
    """The norm does not count where a loss scale may overflow: that is the scaler's to see."""
    assert finding(loss, norm).is_finite(norm_counts=False) == by_loss
    assert finding(loss, norm).is_finite(norm_counts=True) == by_both


def test_checking_at_once_complains_before_the_update() -> None:
    heard: list[Finding] = []
    check = CheckAtOnce(heard.append, norm_counts=True)
    check.look_at(finding(1.0, 1.0))
    check.settle()
    assert heard == []
    bad = finding(1.0, NAN)
    check.look_at(bad)
    assert heard == [bad]
    check.settle()
    assert heard == [bad]  # nothing is open


def test_nobody_is_asked_where_the_run_goes_on_regardless() -> None:
    check = NoCheck()
    check.look_at(finding(NAN, NAN))
    check.settle()


def parameters() -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.ones(2))]


@pytest.mark.parametrize(
    ("optimizer", "expected"),
    [
        (torch.optim.AdamW(parameters(), fused=True), True),
        (torch.optim.Adam(parameters(), fused=True), True),
        (torch.optim.SGD(parameters(), lr=0.1, fused=True), True),
        (torch.optim.AdamW(parameters()), False),
        (torch.optim.AdamW(parameters(), foreach=True), False),
        (torch.optim.RMSprop(parameters()), False),
        (object(), False),
    ],
    ids=["AdamW", "Adam", "SGD", "AdamW, not fused", "AdamW, foreach", "RMSprop", "no optimizer"],
)
def test_which_optimizers_leave_an_update_out_by_themselves(optimizer: Any, expected: bool) -> None:
    assert leaves_updates_out(optimizer) == expected


@pytest.mark.parametrize("name", ["AdamW", "Adam", "SGD"])
def test_an_optimizer_that_is_told_leaves_the_update_out(name: str) -> None:
    """What the check on a GPU relies on: neither the weights nor the count of steps move."""
    (weight,) = params = parameters()
    optimizer: Any = getattr(torch.optim, name)(params, lr=0.1, fused=True)
    optimizer.found_inf = torch.zeros(())
    weight.grad = torch.ones(2)
    optimizer.step()
    before = weight.detach().clone()
    steps = [state["step"].clone() for state in optimizer.state.values() if "step" in state]
    assert bool((before != 1.0).all())
    optimizer.found_inf.fill_(1.0)
    weight.grad = torch.full((2,), NAN)
    optimizer.step()
    assert torch.equal(weight, before)
    assert [state["step"] for state in optimizer.state.values() if "step" in state] == steps
    optimizer.found_inf.zero_()
    weight.grad = torch.ones(2)
    optimizer.step()
    assert bool((weight < before).all())
