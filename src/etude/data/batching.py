"""One place cuts an optimizer step into micro-batches, and one place counts the items its loss is divided by."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
    closes: int = 0
    """How many of the user's micro-steps, other than the last of the step, are complete with it."""
    samples: tuple[int, int] | None = None
    """Which samples of the step (or of the batch `number`) it holds, where it is not a whole batch."""

    @property
    def place(self) -> tuple[int, ...]:
        """What the randomness of its forward pass is a function of."""
        return (self.epoch, self.number, *(self.samples or ()))


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
        self.cut: Callable[[list[MicroBatch]], list[MicroBatch]] = list
        """How the batches of a step become micro-batches; as they are until a path has been chosen."""
        self.on_batches: Callable[[list[MicroBatch]], None] = lambda batches: None
        """Sees the batches of each step before they are cut."""
        self.position = Position()
        self.current_size = accumulation
        self._next_step: list[MicroBatch] = []
        self._state_before: dict[str, Any] | None = None
        """Of the stream before the next step was read from it, from then on until that step is handed out."""

    def open_epoch(self, epoch: int, batches_done: int = 0, stream_state: dict[str, Any] | None = None) -> None:
        self._next_step = []
        self.stream.open(epoch, batches_done, stream_state)
        self.position = Position(epoch, batches_done)
        self._state_before = None

    def advance(self) -> bool:
        """Load the micro-batches of the next step; False at the end of the epoch."""
        self._state_before = self.stream.state()
        loaded = self.load()
        first = self.position.batches_done
        self._next_step = [
            MicroBatch(
                inputs=inputs,
                num_items=count_items(inputs, shifts_labels=self.shifts_labels),
                epoch=self.position.epoch,
                number=first + index,
                index=index,
                closes=int(index < len(loaded) - 1),
            )
            for index, inputs in enumerate(loaded)
        ]
        return bool(loaded)

    def load(self) -> list[Any]:
        """The collated batches of the next step, none at the end of the epoch."""
        batches: list[Any] = []
        while len(batches) < self.accumulation and (batch := self.stream.next()) is not None:
            batches.append(batch)
        return batches

    def items_of(self, batches: list[MicroBatch]) -> int | None:
        """The number of items in all batches of a step together; None where one has no labels."""
        counts = [batch.num_items for batch in batches]
        known = [count for count in counts if count is not None]
        return sum(known) if len(known) == len(counts) else None

    def loaded(self) -> list[MicroBatch]:
        """The batches of the next step, where it is loaded and not yet handed out."""
        return self._next_step

    def of_next_step(self) -> tuple[list[MicroBatch], int | None]:
        """The micro-batches of the loaded step and the number of items in all of them together."""
        batches, self._next_step = self._next_step, []
        self._state_before = None
        self.position.batches_done += len(batches)
        self.current_size = len(batches)
        self.on_batches(batches)
        return self.cut(batches), self.items_of(batches)

    def saved_position(self) -> Position:
        """The position after the last step handed out, with the state a streamed dataset needs to return to it."""
        state = self._state_before if self._state_before is not None else self.stream.state()
        return Position(self.position.epoch, self.position.batches_done, state)

    def rows_of(self, micro_batch: MicroBatch) -> list[int]:
        """The dataset rows of a micro-batch; empty where they are not known (a stream, the user's own sampler)."""
        first, end = micro_batch.samples or (0, None)
        rows: list[int] = []
        for number in range(micro_batch.number, self.position.batches_done):
            rows += self.stream.rows_of(micro_batch.epoch, number)
            if micro_batch.samples is None or len(rows) >= micro_batch.samples[1]:
                break
        return rows[first:end]
