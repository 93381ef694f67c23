"""The evaluation and prediction loop."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from etude.outputs import EvalLoopOutput, EvalPrediction

if TYPE_CHECKING:
    from collections.abc import Callable

PADDING = -100
"""Value that fills up predictions and labels of different length, as in transformers."""


def evaluate(
    batches: Iterable[Any],
    *,
    predict: Callable[[Any], tuple[torch.Tensor | None, Any, Any]],
    count_items: Callable[[Any], int | None],
    keep: Kept,
    on_batch: Callable[[], None],
) -> EvalLoopOutput:
    """Mean loss over all supervised items, and what the metrics need.

    `predict(inputs)` returns (mean loss, outputs, labels) of one batch. The loss is weighted by items, so it does not
    depend on the batch size.
    """
    total, num_items, num_samples = WeightedMean(), 0, 0
    for inputs in batches:
        loss, outputs, labels = predict(inputs)
        rows = batch_rows(inputs)
        items = count_items(inputs)
        num_samples += rows
        num_items += items or 0
        total.add(loss, rows if items is None else items)
        keep.add(loss, outputs, labels, inputs)
        on_batch()
    metrics = keep.metrics()
    if total.weight > 0:
        metrics["loss"] = total.value()
    return EvalLoopOutput(keep.outputs.result(), keep.labels.result(), metrics, num_samples)


class WeightedMean:
    """A mean of device scalars, read only once at the end."""

    def __init__(self) -> None:
        self.sum: torch.Tensor | None = None
        self.weight = 0

    def add(self, value: torch.Tensor | None, weight: int) -> None:
        if value is None or weight == 0:
            return
        share = value.detach().double() * weight if value.device.type != "mps" else value.detach() * weight
        self.sum = share if self.sum is None else self.sum + share
        self.weight += weight

    def value(self) -> float:
        return float(self.sum) / self.weight if self.sum is not None else float("nan")


class Kept:
    """What an evaluation keeps beside the loss, and the metrics made of it."""

    def __init__(
        self,
        compute_metrics: Callable[..., dict[str, Any]] | None,
        preprocess_logits: Callable[[Any, Any], Any] | None,
        *,
        keeps_outputs: bool,
        include: list[str],
        main_input: str,
        by_batch: bool,
        concatenate: bool,
        move_every: int | None,
    ) -> None:
        self.compute_metrics, self.preprocess_logits = compute_metrics, preprocess_logits
        self.keeps_outputs, self.include, self.main_input = keeps_outputs, include, main_input
        self.by_batch, self.move_every = by_batch, move_every
        self.outputs, self.labels, self.inputs, self.losses = (Collected(concatenate) for _ in range(4))
        self._pending: EvalPrediction | None = None
        self._batches = 0

    def add(self, loss: Any, outputs: Any, labels: Any, inputs: Any) -> None:
        if outputs is not None and self.preprocess_logits is not None:
            outputs = self.preprocess_logits(outputs, labels)
        main_input = inputs.get(self.main_input) if "inputs" in self.include and isinstance(inputs, Mapping) else None
        losses = loss.detach().repeat(batch_rows(inputs)) if "loss" in self.include and loss is not None else None
        if self.by_batch and self.compute_metrics is not None:
            self._flush_batch(last=False)
            self._pending = EvalPrediction(outputs, labels, main_input, losses)
        if self.keeps_outputs:
            self.outputs.add(outputs)
            self.labels.add(labels)
            self.inputs.add(main_input)
            self.losses.add(losses)
        self._batches += 1
        if self.move_every is not None and self._batches % self.move_every == 0:
            for collected in (self.outputs, self.labels, self.inputs, self.losses):
                collected.move_to_host()

    def metrics(self) -> dict[str, Any]:
        if self.compute_metrics is None:
            return {}
        if self.by_batch:
            return self._flush_batch(last=True)
        outputs, labels = self.outputs.result(), self.labels.result()
        if outputs is None or labels is None:
            return {}
        return dict(self.compute_metrics(EvalPrediction(outputs, labels, self.inputs.result(), self.losses.result())))

    def _flush_batch(self, *, last: bool) -> dict[str, Any]:
        """Hand the previous batch to a batch-wise `compute_metrics`; only the last one asks for the result."""
        pending, self._pending = self._pending, None
        if pending is None or self.compute_metrics is None:
            return {}
        result = self.compute_metrics(pending, compute_result=last)
        return dict(result) if last and result else {}


class Collected:
    """Outputs of all batches: kept on the device, moved to the host, concatenated at the end with padding."""

    def __init__(self, concatenate: bool) -> None:
        self.concatenate = concatenate
        self.parts: list[Any] = []

    def add(self, value: Any) -> None:
        if value is not None:
            self.parts.append(value)

    def move_to_host(self) -> None:
        self.parts = [to_numpy(part) for part in self.parts]

    def result(self) -> Any:
        self.move_to_host()
        if not self.parts:
            return None
        return concatenate(self.parts) if self.concatenate else self.parts


def to_numpy(value: Any) -> Any:
    """Tensors of a nested structure as arrays; bfloat16, which NumPy lacks, becomes float32."""
    if isinstance(value, Mapping):
        return type(value)({key: to_numpy(item) for key, item in value.items()})  # type: ignore[call-arg]
    if isinstance(value, (list, tuple)):
        return type(value)(to_numpy(item) for item in value)
    if torch.is_tensor(value):
        value = value.detach().cpu()
        return np.atleast_1d((value.float() if value.dtype == torch.bfloat16 else value).numpy())
    return value


def concatenate(parts: list[Any]) -> Any:
    """Join batches along the first axis, padding the second to the longest with -100."""
    first = parts[0]
    if isinstance(first, Mapping):
        return {key: concatenate([part[key] for part in parts]) for key in first}
    if isinstance(first, (list, tuple)):
        return type(first)(concatenate([part[index] for part in parts]) for index in range(len(first)))
    widths = {part.shape[1] for part in parts if part.ndim > 1}
    if len(widths) <= 1:
        return np.concatenate(parts, axis=0)
    return np.concatenate([_widened(part, max(widths)) for part in parts], axis=0)


def _widened(array: Any, width: int) -> Any:
    margins = [(0, 0)] * array.ndim
    margins[1] = (0, width - array.shape[1])
    return np.pad(array, margins, constant_values=PADDING)


def batch_rows(inputs: Any) -> int:
    """The number of samples in a batch: the length of its first tensor."""
    if torch.is_tensor(inputs):
        return int(inputs.shape[0]) if inputs.dim() else 1
    values = inputs.values() if isinstance(inputs, Mapping) else inputs if isinstance(inputs, (list, tuple)) else ()
    return next((rows for value in values if (rows := batch_rows(value)) > 0), 0)
