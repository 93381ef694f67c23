"""Whatever holds the rows, the same rows train the same adapter."""

from __future__ import annotations

import multiprocessing
from typing import Any

import datasets
import pytest
import torch
from transformers import DataCollatorForLanguageModeling, DataCollatorForSeq2Seq, DataCollatorWithPadding

from short_run import logged, short_trainer
from tiny import (
    IGNORED,
    PAD,
    ListDataset,
    Padded,
    StreamDataset,
    Watched,
    adapter_of,
    assert_same_bits,
    causal_lora,
    language_rows,
    tiny_tokenizer,
)

ROWS = language_rows(10)


def trained(rows: Any, **settings: Any) -> Any:
    trainer = short_trainer(rows=rows, **settings)
    trainer.train()
    return trainer


@pytest.mark.parametrize("fast_path", [True, False])
@pytest.mark.parametrize("wrap", [list, tuple, ListDataset, datasets.Dataset.from_list], ids=lambda wrap: wrap.__name__)
def test_map_style_rows(wrap: Any, fast_path: bool) -> None:
    rows = wrap(ROWS)
    expected = trained(ROWS, fast_path=fast_path)
    assert_same_bits(adapter_of(trained(rows, fast_path=fast_path).model), adapter_of(expected.model))


@pytest.mark.parametrize(
    "stream",
    [StreamDataset(ROWS), datasets.Dataset.from_list(ROWS).to_iterable_dataset()],
    ids=["torch", "datasets"],
)
def test_streams_run_in_their_own_order(stream: Any) -> None:
    expected = trained(ROWS, train_sampling_strategy="sequential", max_steps=8)
    trainer = trained(stream, max_steps=8)
    assert logged(trainer, "loss") == logged(expected, "loss")
    assert_same_bits(adapter_of(trainer.model), adapter_of(expected.model))


def test_every_row_is_seen_once_an_epoch_in_another_order() -> None:
    watched = Watched(Padded())
    trained(language_rows(11), collate=watched, num_train_epochs=2)
    seen = [row for batch in watched.batches for row in batch]
    rows = sorted(tuple(row["input_ids"]) for row in language_rows(11))
    assert sorted(seen[:11]) == sorted(seen[11:22]) == rows
    assert seen[:11] != seen[11:22]


def test_columns_the_model_does_not_know_are_left_out() -> None:
    """Text and identifiers stay in the file; the collator only gets what the forward takes."""
    rows = [row | {"text": "once upon a time", "id": number} for number, row in enumerate(ROWS)]
    plain = trained(ROWS)
    for with_more in (rows, datasets.Dataset.from_list(rows)):
        assert_same_bits(adapter_of(trained(with_more).model), adapter_of(plain.model))


def test_columns_are_kept_where_the_user_says_so() -> None:
    keys: set[str] = set()

    def collate(rows: Any) -> Any:
        keys.update(rows[0])
        return Padded()(rows)

    trained([row | {"text": "once"} for row in ROWS], collate=collate, remove_unused_columns=False)
    assert "text" in keys


def test_collators_of_transformers() -> None:
    tokenizer = tiny_tokenizer()
    expected = trained(ROWS)
    seq2seq = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED)
    assert_same_bits(adapter_of(trained(ROWS, collate=seq2seq).model), adapter_of(expected.model))

    unmasked = language_rows(10, masked=False)
    for_causal = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    without_labels = [{key: row[key] for key in ("input_ids", "attention_mask")} for row in unmasked]
    assert_same_bits(adapter_of(trained(without_labels, collate=for_causal).model), adapter_of(trained(unmasked).model))


def test_a_tokenizer_is_enough_to_pad_rows_without_labels() -> None:
    trainer = short_trainer(processing_class=tiny_tokenizer())
    trainer.data_collator = None
    from etude import Trainer

    trainer = Trainer(model=causal_lora(), args=trainer.args, train_dataset=ROWS, processing_class=tiny_tokenizer())
    assert isinstance(trainer.data_collator, DataCollatorWithPadding)


@pytest.mark.parametrize("fast_path", [True, False])
def test_batches_without_an_attention_mask(fast_path: bool) -> None:
    """Nothing but tokens and labels, padded on the right: what follows the last label does not matter."""

    def collate(rows: Any) -> dict[str, torch.Tensor]:
        batch = Padded()(rows)
        del batch["attention_mask"]
        return batch

    rows = language_rows(10, shortest=6, longest=6)
    assert logged(trained(rows, collate=collate, fast_path=fast_path), "loss") == pytest.approx(
        logged(trained(rows, fast_path=fast_path), "loss"), rel=1e-6
    )


def test_a_row_without_labels_in_a_batch_with_some_is_no_error() -> None:
    rows = [dict(row) for row in ROWS]
    rows[3] = rows[3] | {"labels": [IGNORED] * len(rows[3]["labels"])}
    trainer = trained(rows, per_device_train_batch_size=10)
    assert all(loss > 0 for loss in logged(trainer, "loss"))


def test_padding_rows_of_a_collator_do_not_train() -> None:
    """A collator that fills the batch up to a fixed number of rows: they hold no tokens and no labels."""

    def collate(rows: Any) -> dict[str, torch.Tensor]:
        batch = Padded()(rows)
        fill = {"input_ids": PAD, "attention_mask": 0, "labels": IGNORED}
        return {name: torch.cat([value, torch.full_like(value[:1], fill[name])]) for name, value in batch.items()}

    assert logged(trained(ROWS, collate=collate), "loss") == pytest.approx(logged(trained(ROWS), "loss"), rel=1e-5)


def test_workers_give_the_same_batches() -> None:
    assert_same_bits(adapter_of(trained(ROWS, dataloader_num_workers=2).model), adapter_of(trained(ROWS).model))


def test_no_worker_outlives_the_training() -> None:
    """Left to the garbage collector, idle workers stay until it runs, and hold it up for five seconds each."""
    already_there = {child.pid for child in multiprocessing.active_children()}
    trainer = trained(ROWS, dataloader_num_workers=2, max_steps=3)
    assert trainer.state.global_step == 3
    assert {child.pid for child in multiprocessing.active_children()} <= already_there


def test_grouping_by_length_pads_less_and_depends_on_the_seed_alone() -> None:
    def padded_tokens(run: Any) -> int:
        return sum(len(batch) * max(map(len, batch)) for batch in run.batches[:16])

    def watch(strategy: str, noise: int) -> Any:
        watched = Watched(Padded())
        torch.manual_seed(noise)
        model = causal_lora()
        trainer = short_trainer(
            model,
            language_rows(32, longest=40),
            collate=watched,
            train_sampling_strategy=strategy,
            num_train_epochs=1,
        )
        torch.manual_seed(noise)
        trainer.train()
        return watched

    grouped = watch("group_by_length", 1)
    assert padded_tokens(grouped) < padded_tokens(watch("random", 1))
    assert grouped.batches == watch("group_by_length", 2).batches
