"""The sample order: a pure function of (seed, epoch), so that any position in it is found without replaying anything."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import Sampler


def random_order(num_samples: int, seed: int, epoch: int) -> torch.Tensor:
    """The permutation of `num_samples` that transformers draws in `epoch` in a single process: int64, shape (n,)."""
    generator = torch.Generator()
    generator.manual_seed(seed + epoch)
    return torch.randperm(num_samples, generator=generator)


def length_grouped_order(lengths: Sequence[int], group_size: int, seed: int, epoch: int) -> torch.Tensor:
    """A random order in which samples of similar length stand together, longest first.

    A random permutation is cut into pools of 50 groups, each pool is sorted by length, longest first, and the pool
    with the longest sample of all comes first, so that running out of memory shows at once. Unlike transformers' it
    depends on nothing but its arguments.
    """
    order = random_order(len(lengths), seed, epoch)
    length_of = torch.as_tensor(lengths, dtype=torch.int64)
    pools = torch.split(order, group_size * min(50, max(1, len(lengths) // (group_size * 4))))
    ordered = [pool[torch.argsort(length_of[pool], descending=True, stable=True)] for pool in pools]
    longest = max(range(len(ordered)), key=lambda i: int(length_of[ordered[i][0]]), default=0)
    ordered.insert(0, ordered.pop(longest)) if ordered else None
    return torch.cat(ordered) if ordered else order


class EpochSampler(Sampler[int]):
    """A sampler whose order is a function of the epoch; `set_epoch` chooses it."""

    def __init__(self, num_samples: int, *, strategy: str, seed: int, lengths: Any = None, group_size: int = 1) -> None:
        self.num_samples, self.strategy, self.seed = num_samples, strategy, seed
        self.lengths, self.group_size, self.epoch = lengths, group_size, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def order(self) -> torch.Tensor:
        if self.strategy == "sequential":
            return torch.arange(self.num_samples)
        if self.strategy == "group_by_length":
            return length_grouped_order(self.lengths, self.group_size, self.seed, self.epoch)
        return random_order(self.num_samples, self.seed, self.epoch)

    def __iter__(self) -> Iterator[int]:
        return iter(self.order().tolist())

    def __len__(self) -> int:
        return self.num_samples


class NumberedBatch(list[int]):
    """The row numbers of one micro-batch, with its place: the epoch and its number within the epoch."""

    epoch: int
    number: int


class EpochBatches(Sampler[list[int]]):
    """Cuts a sampler's order into micro-batches of `batch_size` rows, beginning at any of them at no cost.

    `start_at(epoch, first_batch)` sets the place from which the next iteration goes on. Skipping looks at row numbers
    only; no sample is loaded for it.
    """

    def __init__(self, sampler: Sampler[int], batch_size: int, drop_last: bool) -> None:
        self.sampler, self.batch_size, self.drop_last = sampler, batch_size, drop_last
        self.epoch, self.first_batch = 0, 0

    def start_at(self, epoch: int, first_batch: int = 0) -> None:
        self.epoch, self.first_batch = epoch, first_batch
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)

    def rows_of(self, epoch: int, number: int) -> list[int]:
        """The rows of one micro-batch, for error messages; empty where the user's own sampler cannot be asked twice."""
        if not isinstance(self.sampler, EpochSampler):
            return []
        self.sampler.set_epoch(epoch)
        return self.sampler.order()[number * self.batch_size : (number + 1) * self.batch_size].tolist()

    def __iter__(self) -> Iterator[list[int]]:
        order = self.sampler.order() if type(self.sampler) is EpochSampler else list(self.sampler)
        for number in range(self.first_batch, len(self)):
            rows = order[number * self.batch_size : (number + 1) * self.batch_size]
            batch = NumberedBatch(rows.tolist() if isinstance(rows, torch.Tensor) else rows)
            batch.epoch, batch.number = self.epoch, number
            yield batch

    def __len__(self) -> int:
        num_samples = len(self.sampler)  # type: ignore[arg-type]  # a sampler over a dataset of known length has one
        return num_samples // self.batch_size if self.drop_last else -(-num_samples // self.batch_size)
