"""The cut of a step: the samples of all its batches, packed into micro-batches of at most so many tokens.

The user decides which samples an update sees; how they are grouped into forward passes is decided here. Samples are
never split and keep their order, so the cut is a function of their lengths and the budget alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from etude.model.packing import PackedBatch


@dataclass(frozen=True)
class Pack:
    """One micro-batch of a step: its tokens, and which samples of the step they are."""

    batch: PackedBatch
    first_sample: int
    end_sample: int


def cut_step(batches: Sequence[PackedBatch], tokens: int) -> list[Pack]:
    """Pack the samples of `batches`, in order, into micro-batches of at most `tokens` tokens.

    Only a sample that is longer than that makes a larger one. The micro-batches are of about equal size: cutting 1,100
    tokens by 1,000 gives twice 550, not 1,000 and 100.
    """
    whole = merge(batches)
    packs: list[Pack] = []
    for first, end in _spans(whole.lengths, tokens):
        packs.append(Pack(take(whole, first, end), first, end))
    return packs


def _spans(lengths: Sequence[int], tokens: int) -> list[tuple[int, int]]:
    total = sum(lengths)
    target = total / max(1, -(-total // tokens))
    spans: list[tuple[int, int]] = []
    first, filled, done = 0, 0, 0
    for index, length in enumerate(lengths):
        closes = filled > 0 and (filled + length > tokens or done + length / 2 > target * (len(spans) + 1))
        if closes:
            spans.append((first, index))
            first, filled = index, 0
        filled, done = filled + length, done + length
    return [*spans, (first, len(lengths))] if lengths else spans


def merge(batches: Sequence[PackedBatch]) -> PackedBatch:
    """One packed row with the samples of all `batches`."""
    if len(batches) == 1:
        return batches[0]
    lengths = tuple(length for batch in batches for length in batch.lengths)
    offsets = torch.tensor([0, *(batch.input_ids.shape[1] for batch in batches)]).cumsum(0).tolist()
    return PackedBatch(
        input_ids=torch.cat([batch.input_ids for batch in batches], dim=1),
        position_ids=torch.cat([batch.position_ids for batch in batches], dim=1),
        cu_seqlens=torch.tensor((0, *lengths)).cumsum(0).to(torch.int32),
        lengths=lengths,
        predicting=torch.cat([batch.predicting + offset for batch, offset in zip(batches, offsets[:-1], strict=True)]),
        targets=torch.cat([batch.targets for batch in batches]),
    )


def take(batch: PackedBatch, first: int, end: int) -> PackedBatch:
    """The samples `first` to `end` of a packed row."""
    if first == 0 and end == len(batch.lengths):
        return batch
    start, stop = sum(batch.lengths[:first]), sum(batch.lengths[:end])
    inside = (batch.predicting >= start) & (batch.predicting < stop)
    lengths = batch.lengths[first:end]
    return PackedBatch(
        input_ids=batch.input_ids[:, start:stop],
        position_ids=batch.position_ids[:, start:stop],
        cu_seqlens=torch.tensor((0, *lengths)).cumsum(0).to(torch.int32),
        lengths=lengths,
        predicting=batch.predicting[inside] - start,
        targets=batch.targets[inside],
    )
