"""Hooks around the data: samplers, loaders, columns."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import torch

from etude.arguments import TrainingArguments
from etude.data.batching import count_items
from etude.data.columns import ColumnDroppingCollator, accepted_columns, drop_unused_columns
from etude.data.loader import build_loader, has_length, is_streamed
from etude.data.order import EpochBatches, EpochSampler
from etude.errors import DataError
from etude.hooks.base import Composition


class DataHooks(Composition):
    """Which samples come in which order, and what is dropped of them."""

    def get_train_dataloader(self) -> Any:
        if self.train_dataset is None:
            raise DataError("the trainer has no train_dataset")
        return self._get_dataloader(
            self.train_dataset,
            "training",
            self.args.train_batch_size,
            sampler_fn=self._train_sampler,
            is_training=True,
        )

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        if isinstance(eval_dataset, str):
            eval_dataset = self.eval_dataset[eval_dataset]
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if dataset is None:
            raise DataError("evaluation needs an eval_dataset: give one to the trainer or to evaluate()")
        if not self.args.dataloader_persistent_workers:
            return self._evaluation_loader(dataset, "evaluation")
        for known, loader in self._persistent_loaders:  # its workers are still there
            if known is dataset:
                return loader
        loader = self._evaluation_loader(dataset, "evaluation")
        self._persistent_loaders.append((dataset, loader))
        return loader

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        return self._evaluation_loader(test_dataset, "test")

    def _evaluation_loader(self, dataset: Any, description: str) -> Any:
        return self._get_dataloader(
            dataset,
            description,
            self.args.eval_batch_size,
            sampler_fn=self._get_eval_sampler,
            dataloader_key=description,
        )

    def _get_dataloader(
        self,
        dataset: Any,
        description: str,
        batch_size: int,
        sampler_fn: Callable[[Any], Any] | None = None,
        is_training: bool = False,
        dataloader_key: str | None = None,
    ) -> Any:
        """The loader of any dataset: the order of `sampler_fn(dataset)`, that of the rows without one.

        `is_training` and `dataloader_key` are there for overrides.
        """
        args = self.args
        sampler = None if sampler_fn is None or is_streamed(dataset) else sampler_fn(dataset)
        drop_last = args.dataloader_drop_last
        dataset, collator = self._without_unused_columns(dataset, description)
        return build_loader(
            dataset,
            batches=None if sampler is None else EpochBatches(sampler, batch_size, drop_last),
            batch_size=batch_size,
            collator=collator,
            seed=args.data_seed if args.data_seed is not None else args.seed,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
            drop_last=drop_last,
            multiprocessing_context=args.dataloader_multiprocessing_context,
            in_order=args.dataloader_in_order,
        )

    def _train_sampler(self, dataset: Any) -> Any:
        sampler = self.call_hook(self._get_train_sampler, train_dataset=dataset)
        return sampler if sampler is not None else EpochSampler(len(dataset), strategy="sequential", seed=0)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if dataset is None or not has_length(dataset):
            return None
        strategy = self.args.train_sampling_strategy
        return EpochSampler(
            len(dataset),
            strategy=strategy,
            seed=self.args.data_seed if self.args.data_seed is not None else self.args.seed,
            lengths=sample_lengths(dataset, self.args.length_column_name) if strategy == "group_by_length" else None,
            group_size=self.args.train_batch_size * self.args.gradient_accumulation_steps,
        )

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        return EpochSampler(len(eval_dataset), strategy="sequential", seed=0) if has_length(eval_dataset) else None

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            self._signature_columns = accepted_columns(self.model, self.label_names)

    def _without_unused_columns(self, dataset: Any, description: str) -> tuple[Any, Any]:
        if not self.args.remove_unused_columns:
            return dataset, self.data_collator
        if hasattr(dataset, "column_names") and hasattr(dataset, "remove_columns") and dataset.column_names:
            return self._remove_unused_columns(dataset, description=description), self.data_collator
        return dataset, self._get_collator_with_removed_columns(self.data_collator, description=description)

    def _remove_unused_columns(self, dataset: Any, description: str | None = None) -> Any:
        self._set_signature_columns_if_needed()
        return drop_unused_columns(dataset, self._signature_columns or [])

    def _get_collator_with_removed_columns(self, data_collator: Any, description: str | None = None) -> Any:
        self._set_signature_columns_if_needed()
        return ColumnDroppingCollator(data_collator, self._signature_columns or [])

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device | None = None
    ) -> tuple[list[Any], Any]:
        """The next `num_batches` batches (fewer where the epoch ends) and the number of items in all of them."""
        batches = list(islice(epoch_iterator, num_batches))
        return batches, self.call_hook(self._get_num_items_in_batch, batches, device=device or self.args.device)

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device | None = None) -> Any:
        """What the loss of these batches is divided by: their supervised items; None where one of them has no labels."""
        counts = [count_items(batch, shifts_labels=self.shifts_labels) for batch in batch_samples]
        known = [count for count in counts if count is not None]
        if not known or len(known) < len(counts):
            return None
        return torch.tensor(sum(known), device=device)

    def num_examples(self, dataloader: Any) -> int | None:
        """The number of samples behind a loader; None for a stream."""
        dataset = getattr(dataloader, "dataset", None)
        return len(dataset) if dataset is not None and has_length(dataset) else None

    def get_total_train_batch_size(self, args: TrainingArguments) -> int:
        return args.train_batch_size * args.gradient_accumulation_steps * args.world_size


def sample_lengths(dataset: Any, column: str) -> list[int]:
    """The length of each sample: a column of lengths where the dataset has one, else of its `input_ids`."""
    if hasattr(dataset, "column_names") and column in (dataset.column_names or []):
        return list(dataset[column])
    try:
        return [len(dataset[index]["input_ids"]) for index in range(len(dataset))]
    except (KeyError, TypeError) as error:
        raise DataError(
            f"group_by_length needs rows with input_ids, or a column of lengths named by length_column_name ('{column}')"
        ) from error
