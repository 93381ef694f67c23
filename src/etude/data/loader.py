"""Data loaders: torch's `DataLoader` with an order, randomness and a start position that are functions of the place."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from etude.data.order import EpochBatches, NumberedBatch
from etude.data.randomness import derive_seed, seed_generators, undisturbed_generators
from etude.data.workers import expect_cut_connections, is_dead_worker, worker_watch
from etude.errors import DataError

logger = logging.getLogger(__name__)

GENERATORS, GENERATORS_NOW = "generators", "generators_now"
"""Keys of the state of a loader that the user built: its generators at the start of the epoch, and where it is."""

MAX_RESTARTS = 3
"""How often in a row dead workers are started again for the same micro-batch."""

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


def load_row(dataset: Any, row: int) -> Any:
    """A row of a map-style dataset; an exception within it gets a note that names the row."""
    try:
        return dataset[row]
    except Exception as error:
        error.add_note(f"while loading row {row} of the {type(dataset).__name__} dataset")
        raise


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
        return [load_row(self.dataset, row) for row in rows]


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
            "worker_init_fn": expect_cut_connections,
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


def state_at_next_epoch(state: dict[str, Any] | None) -> dict[str, Any] | None:
    """What is left at the beginning of an epoch of the state at the end of the one before."""
    return {GENERATORS: state[GENERATORS_NOW]} if state is not None and GENERATORS_NOW in state else None


class TrainingStream:
    """Micro-batches of the training loader, epoch by epoch, with a position that can be saved and returned to.

    Map-style data is entered at any micro-batch at no cost. A streamed dataset that can save its state
    (`state_dict`/`load_state_dict`, as `datasets.IterableDataset` without a shuffle buffer can) is put back to it; any
    other is read forward.
    What a dataset or collator draws is a function of the micro-batch's place. Workers that die are started again there.
    Persistent workers stay from epoch to epoch only where the place alone decides what they draw: over map-style data in
    our order.
    """

    def __init__(self, loader: Any, seed: int) -> None:
        self.loader, self.seed = loader, seed
        self.batches = (
            loader.batch_sampler if isinstance(getattr(loader, "batch_sampler", None), EpochBatches) else None
        )
        self._iterator: Iterator[Any] | None = None
        self._epoch, self._number = 0, 0  # of the next micro-batch
        self._drawn_from: dict[str, torch.Tensor] = {}  # the generators of a user's loader, as the epoch found them

    def __len__(self) -> int:
        return len(self.loader)

    def open(self, epoch: int, first_batch: int = 0, state: dict[str, Any] | None = None) -> None:
        """Go to micro-batch `first_batch` of `epoch`; `state` is what `state()` returned there.

        Raises:
            DataError: the data ends before `first_batch`, or `state` is not one of this loader.
        """
        self._set_epoch(epoch)
        dataset = self._stateful_dataset()
        is_entered_at_once = self.batches is not None or (state is not None and dataset is not None)
        self._epoch, self._number = epoch, first_batch if is_entered_at_once else 0
        with undisturbed_generators():
            seed_generators(derive_seed(self.seed, "epoch", epoch))
            self._seed_workers()
            if self.batches is not None:
                self.batches.start_at(epoch, first_batch)
            elif state is not None and dataset is not None:
                dataset.load_state_dict(state)
            self._set_generators((state or {}).get(GENERATORS) if dataset is None else None)
            self.close(also_persistent=self.batches is None)
            self._iterator = iter(self.loader)
        worker_watch.install()
        while self._number < first_batch:
            if self.next() is None:
                raise DataError(f"the training data ended after {self._number} of {first_batch} micro-batches to skip")

    def next(self) -> Any | None:
        """The next micro-batch of the epoch, or None at its end.

        Raises:
            RuntimeError: workers died again and again.
        """
        for restarts in range(MAX_RESTARTS + 1):
            try:
                batch = self._read()
            except RuntimeError as error:
                if not is_dead_worker(error):
                    raise
                if restarts == MAX_RESTARTS:
                    error.add_note(
                        f"They were started again {MAX_RESTARTS} times for micro-batch {self._number} of epoch "
                        f"{self._epoch}. Is there too little memory? Try a smaller dataloader_num_workers, or 0"
                    )
                    raise
                logger.warning("%s; the workers are started again at micro-batch %d", error, self._number)
                self.close(also_persistent=True)
                self.open(self._epoch, self._number, {GENERATORS: self._drawn_from} if self._drawn_from else None)
            else:
                self._number += batch is not None
                return batch
        raise AssertionError("unreachable")

    def close(self, *, also_persistent: bool = False) -> None:
        """End the workers, those that are to persist only on request.

        Left to the garbage collector, which may close their queues first, they are waited for in vain for seconds.
        """
        end_workers = getattr(self._iterator, "_shutdown_workers", None)
        if end_workers is not None and (also_persistent or not self._has_persistent_workers()):
            end_workers()
            if self._has_persistent_workers():
                self.loader._iterator = None  # or the loader would go on with those that are gone
        self._iterator = None

    def _has_persistent_workers(self) -> bool:
        return bool(getattr(self.loader, "persistent_workers", False))

    def _read(self) -> Any | None:
        assert self._iterator is not None, "open() comes first"
        with undisturbed_generators(), worker_watch.waiting_for_data():
            seed_generators(derive_seed(self.seed, "batch", self._epoch, self._number))
            return next(self._iterator, None)

    def state(self) -> dict[str, Any] | None:
        """What a streamed dataset, or a loader with a generator of the user, needs to go on from here; None where the
        position alone is enough."""
        dataset = self._stateful_dataset()
        if dataset is not None:
            state: dict[str, Any] = copy.deepcopy(dataset.state_dict())
            return state
        now = {name: generator.get_state() for name, generator in self._generators().items()}
        return {GENERATORS: dict(self._drawn_from), GENERATORS_NOW: now} if now else None

    def _seed_workers(self) -> None:
        """What workers draw is a function of the epoch, not of how many epochs this process has seen."""
        generator = getattr(self.loader, "generator", None)
        is_only_for_workers = self.batches is not None or isinstance(
            getattr(self.loader, "dataset", None), IterableDataset
        )
        if generator is not None and is_only_for_workers:
            generator.manual_seed(derive_seed(self.seed, "workers", self._epoch))

    def _generators(self) -> dict[str, torch.Generator]:
        """Those that a loader of the user draws one order after the other from, by where they were found."""
        if self.batches is not None or isinstance(getattr(self.loader, "dataset", None), IterableDataset):
            return {}
        batch_sampler = getattr(self.loader, "batch_sampler", None)
        owners = {
            "loader": self.loader,
            "sampler": getattr(self.loader, "sampler", None),
            "batch_sampler": batch_sampler,
            "batch_sampler.sampler": getattr(batch_sampler, "sampler", None),
        }
        found = {name: getattr(owner, "generator", None) for name, owner in owners.items()}
        return {name: generator for name, generator in found.items() if isinstance(generator, torch.Generator)}

    def _set_generators(self, states: Any) -> None:
        """Put the generators of a user's loader to where an epoch began; without `states` it begins where they are."""
        generators = self._generators()
        if states is not None:
            try:
                for name, generator in generators.items():
                    generator.set_state(states[name])
            except (KeyError, TypeError, RuntimeError) as error:
                raise DataError(
                    f"the state of the training loader does not fit this loader ({error}): pass ignore_data_skip=True to "
                    "begin the epoch anew"
                ) from error
        self._drawn_from = {name: generator.get_state() for name, generator in generators.items()}

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
