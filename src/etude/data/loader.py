"""Data loaders: torch's `DataLoader` with an order, randomness and a start position that are functions of the place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from etude.data.order import EpochBatches, NumberedBatch
from etude.data.randomness import RandomState, derive_seed, seed_generators, undisturbed_generators
from etude.errors import DataError

Collator = Callable[[list[Any]], Any]


def has_length(dataset: Any) -> bool:
    """Whether `len(dataset)` works; iterable datasets have none."""
    if dataset is None:
        return False
    try:
        return len(dataset) is not None
    except (TypeError, AttributeError, NotImplementedError):
        return False


def is_streamed(dataset: Any) -> bool:
    """Whether rows come by iteration only (a torch or `datasets` iterable dataset, or a plain iterable)."""
    return isinstance(dataset, IterableDataset) or not (has_length(dataset) and hasattr(dataset, "__getitem__"))


class SeededRows(Dataset[Any]):
    """Rows of a map-style dataset, fetched by micro-batch, with randomness seeded by the micro-batch's place.

    Augmentation in the dataset and padding or masking in the collator then draw the same numbers whichever worker
    loads the batch and whether or not the run was resumed before it. Attributes of the dataset show through.
    """

    def __init__(self, dataset: Any, seed: int) -> None:
        self.dataset, self.seed = dataset, seed

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "dataset":
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __len__(self) -> int:
        return len(self.dataset)

    def __eq__(self, other: object) -> bool:
        """Scripts compare `loader.dataset` with what they gave."""
        return self.dataset is (other.dataset if isinstance(other, SeededRows) else other)

    def __hash__(self) -> int:
        return id(self.dataset)

    def __getitem__(self, index: int) -> Any:
        return self.dataset[index]

    def __getitems__(self, rows: Sequence[int]) -> list[Any]:
        if isinstance(rows, NumberedBatch):
            seed_generators(derive_seed(self.seed, "data", rows.epoch, rows.number))
        if hasattr(self.dataset, "__getitems__"):
            return list(self.dataset.__getitems__(list(rows)))
        return [self._row(row) for row in rows]

    def _row(self, row: int) -> Any:
        try:
            return self.dataset[row]
        except Exception as error:
            error.add_note(f"while loading row {row} of the {type(self.dataset).__name__} dataset")
            raise


def build_loader(
    dataset: Any,
    *,
    batches: EpochBatches | None,
    batch_size: int,
    collator: Collator,
    seed: int,
    num_workers: int = 0,
    pin_memory: bool = False,
    persistent_workers: bool = False,
    prefetch_factor: int | None = None,
    drop_last: bool = False,
    multiprocessing_context: Any = None,
    in_order: bool = True,
) -> DataLoader[Any]:
    """A torch `DataLoader` over `dataset`.

    `batches` gives the micro-batches of a map-style dataset; streamed datasets have None and are cut by `batch_size`.
    """
    options: dict[str, Any] = {
        "collate_fn": collator,
        "num_workers": num_workers,
        "pin_memory": pin_memory and torch.cuda.is_available(),
        "generator": torch.Generator().manual_seed(derive_seed(seed, "workers") % 2**63),
    }
    if num_workers > 0:
        options |= {
            "persistent_workers": persistent_workers,
            "prefetch_factor": prefetch_factor,
            "multiprocessing_context": multiprocessing_context,
            "in_order": in_order,
        }
    if batches is None:
        stream = dataset if isinstance(dataset, IterableDataset) else PlainIterable(dataset)
        return Loader(batch_size, stream, batch_size=batch_size, drop_last=drop_last, **options)
    return Loader(batch_size, SeededRows(dataset, seed), batch_sampler=batches, **options)


class Loader(DataLoader[Any]):
    """torch's loader, which knows how many samples a batch has over all processes."""

    def __init__(self, total_batch_size: int, dataset: Any, **options: Any) -> None:
        super().__init__(dataset, **options)
        self.total_batch_size = total_batch_size


class PlainIterable(IterableDataset[Any]):
    """Any re-iterable Python object as a torch iterable dataset."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "rows":
            raise AttributeError(name)
        return getattr(self.rows, name)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.rows)


def has_shuffle_buffer(dataset: Any) -> bool:
    """Whether a `datasets.IterableDataset` shuffles through a buffer, whose rows its `state_dict` leaves out."""
    part = getattr(dataset, "_ex_iterable", None)
    while part is not None:
        if type(part).__name__.startswith("BufferShuffled"):
            return True
        part = getattr(part, "ex_iterable", None)
    return False


class TrainingStream:
    """Micro-batches of the training loader, epoch by epoch, with a position that can be saved and returned to.

    Map-style data is entered at any micro-batch at no cost. A streamed dataset that can save its state
    (`state_dict`/`load_state_dict`, as `datasets.IterableDataset` can) is put back to it; any other is read forward.
    """

    def __init__(self, loader: Any, seed: int) -> None:
        self.loader, self.seed = loader, seed
        self.batches = (
            loader.batch_sampler if isinstance(getattr(loader, "batch_sampler", None), EpochBatches) else None
        )
        self._iterator: Iterator[Any] | None = None
        self._randomness: RandomState | None = None

    def __len__(self) -> int:
        return len(self.loader)

    def open(self, epoch: int, first_batch: int = 0, state: dict[str, Any] | None = None) -> None:
        """Go to micro-batch `first_batch` of `epoch`; `state` is what `state()` returned there."""
        self._set_epoch(epoch)
        dataset = self._stateful_dataset()
        with undisturbed_generators():
            seed_generators(derive_seed(self.seed, "epoch", epoch))
            if self.batches is not None:
                self.batches.start_at(epoch, first_batch)
            elif state is not None and dataset is not None:
                dataset.load_state_dict(state)
            self._iterator = iter(self.loader)
            self._randomness = RandomState()
        if self.batches is None and not (state is not None and dataset is not None):
            for skipped in range(first_batch):
                if self.next() is None:
                    raise DataError(f"the training data ended after {skipped} of {first_batch} micro-batches to skip")

    def next(self) -> Any | None:
        """The next micro-batch of the epoch, or None at its end."""
        assert self._iterator is not None and self._randomness is not None, "open() comes first"
        outside = RandomState()
        self._randomness.restore()
        try:
            return next(self._iterator, None)
        finally:
            self._randomness = RandomState()
            outside.restore()

    def close(self) -> None:
        """Let worker processes go, instead of when this object happens to be collected."""
        self._iterator = None

    def state(self) -> dict[str, Any] | None:
        """What a streamed dataset needs to go on from here; None where the position alone is enough."""
        dataset = self._stateful_dataset()
        return None if dataset is None else dataset.state_dict()

    def rows_of(self, epoch: int, number: int) -> list[int]:
        return self.batches.rows_of(epoch, number) if self.batches is not None else []

    def _stateful_dataset(self) -> Any | None:
        if self.batches is not None or getattr(self.loader, "num_workers", 0) > 0:
            return None  # worker processes hold copies of the dataset whose state cannot be asked for
        dataset = getattr(self.loader, "dataset", None)
        if has_shuffle_buffer(dataset):
            return None  # its state does not hold the buffer, so the way there is read again
        return dataset if hasattr(dataset, "state_dict") and hasattr(dataset, "load_state_dict") else None

    def _set_epoch(self, epoch: int) -> None:
        owners: tuple[Any, ...] = (
            self.loader,
            getattr(self.loader, "sampler", None),
            getattr(self.loader, "dataset", None),
        )
        for owner in owners:
            if hasattr(owner, "set_epoch"):
                owner.set_epoch(epoch)
