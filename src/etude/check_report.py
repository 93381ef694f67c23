"""What `Trainer.check` returns: one step on the path in force beside the same step through stock peft, in numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass

SHOWN_TENSORS = 16

AS_NEAR = 1.01
"""Two distances from the float32 model are the same up to a hundredth: which of two equal ones is a hair larger is chance."""


@dataclass(frozen=True)
class TensorCheck:
    """The gradient of one trained tensor."""

    name: str
    error: float
    """||ours - stock|| / ||stock||: 0 where both are zero, infinite where only stock's is or ours is not finite."""
    cosine: float
    """Of the angle between the two; 1 where both are zero."""
    norm: float
    """||stock||"""
    is_rounding: bool
    """Whether the error is only large because the tensor's gradient is next to nothing: the difference is below a millionth
    of the whole gradient, and nothing is concluded from it."""
    reference_errors: tuple[float, ...] | None = None
    """The errors of ours and of stock against the float32 model, where that was asked for."""


@dataclass(frozen=True)
class StepCheck:
    """The first step of a run: loss and gradient on the path in force ("ours") beside those of stock peft on the padded
    batches, without dropout. Printing it shows a table."""

    path: str
    """"packed" or "general"."""
    path_reasons: tuple[str, ...]
    """What the packed path does, or why it is not taken."""
    precision: str
    """What products are computed in: "float32", "bfloat16", "float16"."""
    micro_batches: int
    """How many the step was cut into."""
    num_items: int | None
    """Supervised items that the loss is divided by; None where the model does not say."""
    loss: float
    stock_loss: float
    reference_loss: float | None
    """That of the float32 model, where that was asked for."""
    tensors: tuple[TensorCheck, ...]
    """One for every trained tensor, worst first."""
    gradient_error: float
    """||ours - stock|| / ||stock|| of the whole gradient."""
    reference_errors: tuple[float, ...] | None
    """The errors of the whole gradient against the float32 model: ours, stock's."""
    tolerance: float
    """The admitted error: of every tensor, or of the whole gradient, and of the loss."""
    is_of_every_tensor: bool
    """Whether `tolerance` is for every tensor (float32) or for the whole gradient (half precision)."""
    notes: tuple[str, ...] = ()
    """What was said while computing."""

    @property
    def max_error(self) -> float:
        """The largest relative error of a tensor, without those that differ by rounding alone."""
        return max((tensor.error for tensor in self.tensors if not tensor.is_rounding), default=0.0)

    @property
    def loss_error(self) -> float:
        """|ours - stock| / |stock|"""
        if self.loss == self.stock_loss:
            return 0.0
        error = abs(self.loss - self.stock_loss) / abs(self.stock_loss) if self.stock_loss else math.inf
        return error if math.isfinite(error) else math.inf

    @property
    def is_fine(self) -> bool:
        """Whether loss and gradient are within the tolerance. In half precision, where stock peft may itself be that far
        from the truth, a gradient is fine as well that is no farther from the float32 model's than stock's."""
        if not all(map(math.isfinite, (self.loss, self.stock_loss, self.gradient_error))):
            return False
        error = self.max_error if self.is_of_every_tensor else self.gradient_error
        return self.loss_error <= self.tolerance and (error <= self.tolerance or self._is_nearer_to_float32)

    @property
    def _is_nearer_to_float32(self) -> bool:
        if self.is_of_every_tensor or self.reference_errors is None:
            return False
        ours, stock = self.reference_errors
        return ours <= AS_NEAR * stock < math.inf

    def describe(self, max_tensors: int = SHOWN_TENSORS) -> str:
        """The table, with the `max_tensors` worst tensors."""
        items = "" if self.num_items is None else f", {self.num_items:,} supervised items"
        lines = [
            f"one step in {self.micro_batches} micro-batch{'es' if self.micro_batches != 1 else ''}{items}, "
            f"{self.precision}, without dropout",
            f"path  {self.path}: " + "\n      ".join(self.path_reasons),
            f"loss  {self.loss:.7g}, stock peft {self.stock_loss:.7g}, relative difference {self.loss_error:.1e}"
            + ("" if self.reference_loss is None else f"; float32 {self.reference_loss:.7g}"),
        ]
        is_compared = self.path != "general"
        if is_compared or self.reference_errors is not None:
            lines += ["", *self._table(max_tensors)]
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join([*lines, "", self._verdict() if is_compared else self._nothing_to_compare()])

    def __str__(self) -> str:
        return self.describe()

    def _table(self, max_tensors: int) -> list[str]:
        shown = self.tensors[:max_tensors]
        has_reference = self.reference_errors is not None
        heading = "gradient of" + (" (ours, stock: against float32)" if has_reference else "")
        whole = "all tensors together"
        names = [_short(tensor.name) for tensor in shown]
        width = max(map(len, [heading, whole, *names]))
        lines = [f"{heading:<{width}}  {'error':>8}  {'cosine':>9}" + ("      ours     stock" if has_reference else "")]
        lines.append(f"{whole:<{width}}  {self.gradient_error:8.1e}  {'':>9}" + _columns(self.reference_errors))
        for name, tensor in zip(names, shown, strict=True):
            row = f"{name:<{width}}  {tensor.error:8.1e}  {tensor.cosine:9.6f}" + _columns(tensor.reference_errors)
            lines.append(row + ("  rounding" if tensor.is_rounding else ""))
        if left := self.tensors[max_tensors:]:
            worst = max((tensor.error for tensor in left if not tensor.is_rounding), default=0.0)
            lines.append(f"and {len(left):,} more, none above {worst:.1e}")
        return lines

    def _verdict(self) -> str:
        what = "every gradient" if self.is_of_every_tensor else "the whole gradient"
        if self.is_fine and self.gradient_error > self.tolerance:
            return "fine: the gradient is no farther from that of the float32 model than that of stock peft"
        if self.is_fine:
            return f"fine: the loss and {what} are within {self.tolerance:.0e} of stock peft"
        worst = f"; worst is {_short(self.tensors[0].name)}" if self.tensors and self.max_error > 0 else ""
        unknown = not self.is_of_every_tensor and self.reference_errors is None
        advice = " (or it is stock peft that is off: reference_dtype='float32' shows which)" if unknown else ""
        return (
            f"NOT fine: the loss and {what} should be within {self.tolerance:.0e} of stock peft{worst}. "
            f"fast_path=False trains through stock peft's own forward{advice}"
        )

    def _nothing_to_compare(self) -> str:
        if self.is_fine:
            return "nothing to compare: the general path is the model's own forward on padded batches"
        return "NOT fine: the loss or the gradient is not finite"


def _short(name: str) -> str:
    """A tensor's name without what all of them have in common."""
    return name.removeprefix("base_model.model.").removesuffix(".weight").removesuffix(".default")


def _columns(errors: tuple[float, ...] | None) -> str:
    return "" if errors is None else "".join(f"  {error:8.1e}" for error in errors)
