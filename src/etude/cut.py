"""How the batches of a step are cut into micro-batches, on either path, and cut smaller when memory runs out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from etude.data.batching import MicroBatch, count_items
from etude.model.cutting import cut_step, take
from etude.model.memory import TokenBudget
from etude.model.packing import PackedBatch, pack


class AsCollated:
    """Micro-batches are the user's batches; after running out of memory they have at most `max_rows` rows."""

    def __init__(self, shifts_labels: bool, max_rows: int | None = None) -> None:
        self.shifts_labels, self.max_rows = shifts_labels, max_rows

    def cut(self, batches: list[MicroBatch]) -> list[MicroBatch]:
        if self.max_rows is None:
            return batches
        parts = [part for batch in batches for part in self._parts(batch, self.max_rows)]
        return _renumbered(parts)

    def split(self, micro_batch: MicroBatch) -> list[MicroBatch] | None:
        """Two halves of a micro-batch, or None where it cannot be halved; later steps are cut as small."""
        rows = _common_rows(micro_batch.inputs)
        if rows is None or rows < 2:
            return None
        half = -(-rows // 2)
        self.max_rows = half if self.max_rows is None else min(half, self.max_rows)
        return self._parts(micro_batch, half)

    def record(self) -> dict[str, Any]:
        return {} if self.max_rows is None else {"rows_per_micro_batch": self.max_rows}

    def _parts(self, batch: MicroBatch, max_rows: int) -> list[MicroBatch]:
        rows = _common_rows(batch.inputs)
        if rows is None or rows <= max_rows:
            return [batch]
        parts = []
        for first in range(0, rows, max_rows):
            inputs = {key: _row_slice(value, first, first + max_rows) for key, value in batch.inputs.items()}
            is_end = first + max_rows >= rows
            parts.append(
                replace(
                    batch,
                    inputs=inputs,
                    num_items=count_items(inputs, shifts_labels=self.shifts_labels),
                    samples=(first, min(first + max_rows, rows)),
                    closes=batch.closes if is_end else 0,
                )
            )
        return parts


class Packed:
    """Micro-batches are packed rows of real tokens, as many as the token budget allows, over all batches of a step."""

    def __init__(self, budget: TokenBudget, as_collated: AsCollated) -> None:
        self.budget, self.as_collated = budget, as_collated

    def cut(self, batches: list[MicroBatch]) -> list[MicroBatch]:
        packed = [pack(batch.inputs) for batch in batches]
        whole = [batch for batch in packed if batch is not None]
        if len(whole) < len(batches) or not any(batch.lengths for batch in whole):
            return self.as_collated.cut(batches)  # a batch that only makes sense with its padding
        samples_end = torch.tensor([len(batch.lengths) for batch in whole]).cumsum(0).tolist()
        micro_batches = []
        for index, part in enumerate(cut_step(whole, self.budget.tokens)):
            closes = sum(part.first_sample < end <= part.end_sample for end in samples_end[:-1])
            micro_batches.append(
                MicroBatch(
                    inputs=part.batch,
                    num_items=int(part.batch.targets.numel()),
                    epoch=batches[0].epoch,
                    number=batches[0].number,
                    index=index,
                    closes=closes,
                    samples=(part.first_sample, part.end_sample),
                )
            )
        return micro_batches

    def split(self, micro_batch: MicroBatch) -> list[MicroBatch] | None:
        """Two halves of a micro-batch, or None where it is a single sample; later steps get half the budget."""
        batch = micro_batch.inputs
        if not isinstance(batch, PackedBatch):
            return self.as_collated.split(micro_batch)
        num_samples, tokens = len(batch.lengths), sum(batch.lengths)
        if tokens <= self.budget.tokens and not self.budget.halve(tokens):
            return None  # what was cut before the budget fell is only cut down to it
        if num_samples < 2:
            return None
        halves = cut_step([batch], max(max(batch.lengths), -(-tokens // 2)))
        if len(halves) < 2:
            middle = num_samples // 2
            spans = [(0, middle), (middle, num_samples)]
        else:
            spans = [(half.first_sample, half.end_sample) for half in halves]
        offset = micro_batch.samples[0] if micro_batch.samples else 0
        parts = []
        for first, end in spans:
            part = take(batch, first, end)
            items = int(part.targets.numel())
            parts.append(replace(micro_batch, inputs=part, num_items=items, samples=(offset + first, offset + end)))
        return parts

    def record(self) -> dict[str, Any]:
        return {"tokens_per_micro_batch": self.budget.tokens}


def _renumbered(parts: list[MicroBatch]) -> list[MicroBatch]:
    return [replace(part, index=index) for index, part in enumerate(parts)]


def _common_rows(inputs: Any) -> int | None:
    """The number of rows that every tensor of a batch has, or None where they do not agree."""
    if not isinstance(inputs, Mapping):
        return None
    sizes = {value.shape[0] if value.dim() else 0 for value in inputs.values() if torch.is_tensor(value)}
    return sizes.pop() if len(sizes) == 1 else None


def _row_slice(value: Any, first: int, end: int) -> Any:
    return value[first:end] if torch.is_tensor(value) else value
