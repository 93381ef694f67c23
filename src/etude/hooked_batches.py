"""Batches of a step as the user's own `get_batch_samples` and `_get_num_items_in_batch` give them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from etude.data.batching import MicroBatch, StepBatches
from etude.data.loader import TrainingStream, has_length
from etude.hooks.base import plain_number

if TYPE_CHECKING:
    from etude.trainer import Trainer


class HookedBatches(StepBatches):
    """Asks the trainer for the batches of a step and for the number that their loss is divided by."""

    def __init__(self, trainer: Trainer, stream: TrainingStream, *, accumulation: int, shifts_labels: bool) -> None:
        super().__init__(stream, accumulation=accumulation, shifts_labels=shifts_labels)
        self.trainer = trainer
        self._num_items: float | int | None = None

    def load(self) -> list[Any]:
        wanted = self.accumulation
        if has_length(self.stream.loader):  # the last step of an epoch may be smaller, and overrides are told so
            wanted = min(wanted, len(self.stream) - self.position.batches_done)
        trainer = self.trainer
        batches, num_items = trainer.call_hook(
            trainer.get_batch_samples, self._rest_of_epoch(), max(wanted, 1), device=trainer.args.device
        )
        self._num_items = plain_number(num_items)
        return list(batches)

    def items_of(self, batches: list[MicroBatch]) -> int | None:
        return self._num_items  # type: ignore[return-value]  # a user's divisor may be a fraction

    def _rest_of_epoch(self) -> Iterator[Any]:
        while (batch := self.stream.next()) is not None:
            yield batch
