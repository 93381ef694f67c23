"""The gradient of one optimizer step: accumulated over micro-batches, unscaled, clipped, and checked before it is used."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from etude.errors import CheckpointError, ModelError, NonFiniteError
from etude.optim.clipping import clip_gradients
from etude.optim.finite import CheckAtOnce, CheckLate, Finding, NoCheck, leaves_updates_out
from etude.precision import LossScaler


class Gradient:
    """Owns the gradients of the trainable parameters between two updates.

    `forward_backward(micro_batch, num_items)` returns the micro-batch's share of the step's loss, detached.
    `rows_of(micro_batch)` names its rows for error messages, `recover(error, micro_batch)` gives what to do
    instead of a micro-batch that failed (its halves, when memory ran out), or None. `clip` may replace the built-in clipping.
    `before_stopping` is called before a step is blamed, and may raise an error of an earlier one.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        forward_backward: Callable[[Any, int | None], torch.Tensor],
        *,
        device: torch.device,
        scaler: LossScaler,
        optimizer: torch.optim.Optimizer,
        max_norm: float,
        stops_on_nonfinite: bool,
        rows_of: Callable[[Any], list[int]],
        recover: Callable[[Exception, Any], list[Any] | None],
        before_stopping: Callable[[], None],
        clip: Callable[[list[nn.Parameter], float], torch.Tensor] | None = None,
    ) -> None:
        self.parameters = list(parameters)
        self.forward_backward, self.device = forward_backward, device
        self.scaler, self.optimizer, self.max_norm = scaler, optimizer, max_norm
        self.rows_of = rows_of
        self.recover = recover
        self.before_stopping = before_stopping
        self.clip = clip or clip_gradients
        self.shares: list[tuple[Any, torch.Tensor]] = []
        self.finite_check = self._build_finite_check(stops_on_nonfinite)
        self._must_reach_adapters = True
        self._flat: torch.Tensor | None = None

    def keep_in_place(self) -> None:
        """Hold all gradients in one float32 buffer from now on; `p.grad` is a view of it that is never replaced."""
        self._flat = torch.zeros(sum(p.numel() for p in self.parameters), device=self.device)
        offset = 0
        for parameter in self.parameters:
            parameter.grad = self._flat[offset : offset + parameter.numel()].view_as(parameter)
            offset += parameter.numel()

    def zero(self) -> torch.Tensor:
        """Forget the last step's gradients; returns a zero loss to sum into."""
        self._forget()
        self.shares = []
        return torch.zeros((), dtype=torch.float32, device=self.device)

    def accumulate(self, micro_batch: Any, num_items: int | None) -> torch.Tensor:
        """Add one micro-batch's gradient; returns its share of the loss, a float32 scalar.

        Where memory runs out it is done in halves, as often as needed.

        Raises:
            torch.OutOfMemoryError: it cannot be halved any more.
        """
        try:
            share = self.forward_backward(micro_batch, num_items).detach().float()
        except Exception as error:
            instead = self.recover(error, micro_batch)
            if instead is None:
                raise
        else:
            self.shares.append((micro_batch, share))
            return share.to(self.device)
        self._restore_gradient(num_items)
        return torch.stack([self.accumulate(part, num_items) for part in instead]).sum()

    def _restore_gradient(self, num_items: int | None) -> None:
        """A backward pass that failed half-way has added to some gradients: make them anew from the start of the step."""
        self._forget()
        for micro_batch, _ in self.shares:
            self.forward_backward(micro_batch, num_items)

    def reduce_and_clip(self) -> torch.Tensor:
        """The L2 norm of the whole gradient before clipping; the gradient is then at most `max_norm` long."""
        self.scaler.unscale(self.optimizer)
        if self._must_reach_adapters:
            self._require_any_gradient()
        return self.clip(self.parameters, self.max_norm) if self._flat is None else self._clip_flat(self._flat)

    def _clip_flat(self, gradient: torch.Tensor) -> torch.Tensor:
        norm: torch.Tensor = gradient.norm()
        if self.max_norm > 0:
            gradient.mul_((self.max_norm / (norm + 1e-6)).clamp(max=1.0))
        return norm

    def require_finite(self, loss: torch.Tensor, norm: torch.Tensor | float | None, step: Any) -> None:
        """No update is made with a loss or norm that is NaN or infinite; on a GPU the error comes a step later.

        Raises:
            NonFiniteError: naming step, micro-batch and rows.
        """
        self.finite_check.look_at(Finding(step, loss, norm, self.shares))

    def settle(self) -> None:
        """Hear now what `require_finite` would only say at the next step: before anything is logged or saved."""
        self.finite_check.settle()

    def _build_finite_check(self, stops_on_nonfinite: bool) -> NoCheck:
        if not stops_on_nonfinite:
            return NoCheck()
        if self.device.type == "cuda" and not self.scaler.tolerates_overflow and leaves_updates_out(self.optimizer):
            return CheckLate(self._complain, self.optimizer, self.device)
        return CheckAtOnce(self._complain, norm_counts=not self.scaler.tolerates_overflow)

    def _complain(self, finding: Finding) -> None:
        error = self._error_of(finding)
        try:
            self.before_stopping()
        except CheckpointError as failure:
            error.add_note(f"Besides, a checkpoint could not be written: {failure}")
        raise error

    def _error_of(self, finding: Finding) -> NonFiniteError:
        culprit = next((batch for batch, share in finding.shares if not math.isfinite(float(share))), None)
        norm = math.nan if finding.norm is None else float(finding.norm)
        what = f"the loss is {float(finding.loss)}" if culprit is not None else f"the gradient norm is {norm}"
        batches = [culprit] if culprit is not None else [batch for batch, _ in finding.shares]
        return NonFiniteError(
            f"{what}. The update was not made, so the weights and the last checkpoint are as they were. Look at these "
            "rows, lower learning_rate or max_grad_norm, or pass on_nonfinite='continue' to go on regardless",
            step=finding.step.number,
            micro_batch=None if culprit is None else culprit.index,
            rows=self._describe_rows(batches),
        )

    def _forget(self) -> None:
        if self._flat is not None:
            self._flat.zero_()
            return
        for parameter in self.parameters:
            parameter.grad = None

    def _require_any_gradient(self) -> None:
        """After the first step, some trainable parameter must have a gradient, or the run would train nothing."""
        self._must_reach_adapters = False
        if not any(p.grad is not None and (self._flat is None or p.grad.any()) for p in self.parameters):
            raise ModelError(
                "no trainable parameter received a gradient in the first step: the loss does not depend on the adapter. "
                "Is the adapter active (model.set_adapter), or cut off by torch.no_grad or activation checkpointing?"
            )

    def _describe_rows(self, batches: list[Any]) -> str | None:
        rows = [row for batch in batches for row in self.rows_of(batch)]
        return ", ".join(map(str, rows[:16])) + (" ..." if len(rows) > 16 else "") if rows else None
