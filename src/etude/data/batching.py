"""One place cuts an optimizer step into micro-batches, and one place counts the items its loss is divided by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from etude.data.loader import TrainingStream

IGNORED_LABEL = -100
"""Targets with this value carry no loss, in torch's cross entropy and in every collator."""


def count_items(inputs: Any, *, shifts_labels: bool) -> int | None:
    """The number of supervised items in a batch, or None where it has no labels.

    Items are tokens where labels are token ids of shape (B, T), counted after the shift for causal language models;
    they are examples where a label belongs to a whole example: class ids of shape (B,), or floats of any shape.
    """
    if not isinstance(inputs, Mapping):
        return None
    if torch.is_tensor(inputs.get("shift_labels")):
        return int((inputs["shift_labels"] != IGNORED_LABEL).sum())
    labels = inputs.get("labels")
    if not torch.is_tensor(labels):
        return None
    if labels.is_floating_point() or labels.dim() == 0:
        return labels.shape[0] if labels.dim() else 1
    if shifts_labels and labels.dim() > 1:
        labels = labels[..., 1:]
    return int((labels != IGNORED_LABEL).sum())


@dataclass(frozen=True)
class MicroBatch:
    """One forward and backward pass: what the collator returned, its items, and its place in the run."""

    inputs: Any
    num_items: int | None
    epoch: int
    number: int
    """Number of the micro-batch within the epoch."""
    index: int
    """Number within the optimizer step."""
    is_last: bool
    """Whether the optimizer step ends with it."""


@dataclass
class Position:
    """How far training has read its data: `batches_done` micro-batches of `epoch`."""

    epoch: int = 0
    batches_done: int = 0
    stream_state: dict[str, Any] | None = field(default=None, repr=False)


class StepBatches:
    """The micro-batches of one optimizer step after another.

    The user's arithmetic decides which samples an update sees: `accumulation` collated batches of the loader, fewer
    at the end of an epoch.
    """

    def __init__(self, stream: TrainingStream, *, accumulation: int, shifts_labels: bool) -> None:
        self.stream, self.accumulation, self.shifts_labels = stream, accumulation, shifts_labels
        self.position = Position()
        self.current_size = accumulation
        self._next_step: list[MicroBatch] = []

    def open_epoch(self, epoch: int, batches_done: int = 0, stream_state: dict[str, Any] | None = None) -> None:
        self.stream.open(epoch, batches_done, stream_state)
        self.position = Position(epoch, batches_done)

    def advance(self) -> bool:
        """Load the micro-batches of the next step; False at the end of the epoch."""
        loaded: list[Any] = []
        while len(loaded) < self.accumulation and (batch := self.stream.next()) is not None:
            loaded.append(batch)
        first = self.position.batches_done
        self._next_step = [
            MicroBatch(
                inputs=inputs,
                num_items=count_items(inputs, shifts_labels=self.shifts_labels),
                epoch=self.position.epoch,
                number=first + index,
                index=index,
                is_last=index == len(loaded) - 1,
            )
            for index, inputs in enumerate(loaded)
        ]
        return bool(loaded)

    def of_next_step(self) -> tuple[list[MicroBatch], int | None]:
        """The loaded micro-batches and the number of items in all of them together."""
        micro_batches, self._next_step = self._next_step, []
        self.position.batches_done += len(micro_batches)
        self.current_size = len(micro_batches)
        counts = [micro_batch.num_items for micro_batch in micro_batches]
        known = [count for count in counts if count is not None]
        return micro_batches, sum(known) if len(known) == len(counts) else None

    def saved_position(self) -> Position:
        """The position after the last step handed out, with the state a streamed dataset needs to return to it."""
        return Position(self.position.epoch, self.position.batches_done, self.stream.state())

    def rows_of(self, micro_batch: MicroBatch) -> list[int]:
        return self.stream.rows_of(micro_batch.epoch, micro_batch.number)
