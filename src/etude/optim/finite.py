"""Whether the loss and the gradient of a step are numbers: asked before the update, answered without making a GPU wait.
What the update has made of the weights is asked before they are saved."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

Complain = Callable[["Finding"], None]


class Finding(NamedTuple):
    """What was found at one step."""

    step: Any
    loss: torch.Tensor
    norm: torch.Tensor | float | None
    shares: list[tuple[Any, torch.Tensor]]
    """The micro-batches of the step with their shares of the loss."""

    def is_finite(self, *, norm_counts: bool) -> bool:
        norm_is_fine = not norm_counts or self.norm is None or math.isfinite(float(self.norm))
        return math.isfinite(float(self.loss)) and norm_is_fine


class NoCheck:
    """For runs that go on regardless (on_nonfinite="continue")."""

    def look_at(self, finding: Finding) -> None:
        """Nothing is looked at."""

    def settle(self) -> None:
        """Nothing is open."""


class CheckAtOnce(NoCheck):
    """Reads loss and norm before the update: on a CPU they are there already."""

    def __init__(self, complain: Complain, *, norm_counts: bool) -> None:
        self.complain, self.norm_counts = complain, norm_counts

    def look_at(self, finding: Finding) -> None:
        if not finding.is_finite(norm_counts=self.norm_counts):
            self.complain(finding)


class CheckLate(NoCheck):
    """Has the GPU itself leave the update out, and reads what happened a step later, when the answer has long arrived.

    From the first bad step on no update is made, so the weights are those before it, whenever the run stops. Needs an
    optimizer that takes `found_inf`, as torch's fused ones do for loss scaling.
    """

    def __init__(self, complain: Complain, optimizer: Any, device: torch.device) -> None:
        self.complain = complain
        self.is_bad = torch.zeros((), dtype=torch.float32, device=device)
        self.answer = torch.zeros((), dtype=torch.float32, pin_memory=True)
        self.arrived: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self.open: Finding | None = None
        optimizer.found_inf = self.is_bad

    def look_at(self, finding: Finding) -> None:
        self.settle()
        total = finding.loss if finding.norm is None else finding.loss + finding.norm  # of two numbers a number
        self.is_bad.copy_(torch.maximum(self.is_bad, (~torch.isfinite(total)).float()))
        self.answer.copy_(self.is_bad, non_blocking=True)
        self.arrived.record()
        self.open = finding

    def settle(self) -> None:
        """
        Raises:
            NonFiniteError: the step looked at last had no finite loss or gradient.
        """
        finding, self.open = self.open, None
        if finding is not None:
            self.arrived.synchronize()
            if float(self.answer) != 0.0:
                self.is_bad.zero_()  # for whoever uses the optimizer after the run has stopped
                self.complain(finding)


def leaves_updates_out(optimizer: Any) -> bool:
    """Whether an optimizer looks at `found_inf` on the device: torch's fused AdamW, Adam, SGD and the like."""
    groups = getattr(optimizer, "param_groups", [])
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False)) and all(group.get("fused") for group in groups)


@torch.no_grad()
def not_finite(weights: Mapping[str, torch.Tensor]) -> list[str]:
    """The names of those that hold a NaN or an infinity.

    First one question for each device and type: one for each tensor would wait for a GPU each time, and a thread for the
    interpreter, which training needs. A sum is no number if a summand is none; it may overflow besides.
    """
    alike: dict[tuple[torch.device, torch.dtype], list[torch.Tensor]] = {}
    for weight in weights.values():
        alike.setdefault((weight.device, weight.dtype), []).append(weight)
    are_finite = [
        torch.stack([*torch._foreach_norm(each, 1, dtype=torch.promote_types(dtype, torch.float32))]).isfinite().all()
        for (_, dtype), each in alike.items()
    ]
    if all(map(bool, are_finite)):
        return []
    return [name for name, weight in weights.items() if not torch.isfinite(weight).all()]
