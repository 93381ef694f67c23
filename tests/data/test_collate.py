"""Collating: nothing of a sample is lost or invented, whatever its ids are."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DataCollatorWithPadding, default_data_collator

from etude.data import CausalLMCollator, default_collator
from etude.errors import ConfigError, DataError

PAD = 2
SAMPLE = st.lists(st.integers(0, 5), min_size=1, max_size=12).map(
    lambda ids: {"input_ids": ids, "labels": [-100, *ids[1:]]}
)


@settings(deadline=None)
@given(st.lists(SAMPLE, min_size=1, max_size=5), st.sampled_from([None, 1, 4, 8]))
def test_every_sample_comes_back_and_the_rest_is_padding(samples: list[dict[str, Any]], multiple: int | None) -> None:
    batch = CausalLMCollator(PAD, pad_to_multiple_of=multiple)(samples)
    longest = max(len(sample["input_ids"]) for sample in samples)
    width = batch["input_ids"].shape[1]
    assert longest <= width < longest + (multiple or 1) and width % (multiple or 1) == 0
    for row, sample in enumerate(samples):
        length = len(sample["input_ids"])
        assert batch["input_ids"][row].tolist() == sample["input_ids"] + [PAD] * (width - length)
        assert batch["labels"][row].tolist() == sample["labels"] + [-100] * (width - length)
        assert batch["attention_mask"][row].tolist() == [1] * length + [0] * (width - length)
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())


def test_pad_token_equal_to_the_end_token_hides_no_end_token() -> None:
    tokenizer = SimpleNamespace(pad_token_id=None, eos_token_id=7)
    samples = [{"input_ids": [1, 7], "labels": [-100, 7]}, {"input_ids": [1, 3, 7], "labels": [-100, 3, 7]}]
    batch = CausalLMCollator(tokenizer)(samples)
    assert batch["input_ids"].tolist() == [[1, 7, 7], [1, 3, 7]]
    assert batch["labels"].tolist() == [[-100, 7, -100], [-100, 3, 7]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]


def test_masks_of_samples_are_kept_and_labels_are_optional() -> None:
    samples = [{"input_ids": torch.tensor([1, 2]), "attention_mask": [0, 1]}, {"input_ids": [3], "attention_mask": [1]}]
    batch = CausalLMCollator(0)(samples)
    assert batch["attention_mask"].tolist() == [[0, 1], [1, 0]]
    assert set(batch) == {"input_ids", "attention_mask"}


def test_what_cannot_be_a_batch_is_refused() -> None:
    collate = CausalLMCollator(0)
    with pytest.raises(DataError, match="at least one sample"):
        collate([])
    with pytest.raises(DataError, match="field 'labels': expected 2 values"):
        collate([{"input_ids": [1, 2], "labels": [1]}])
    with pytest.raises(ConfigError, match="pad_to_multiple_of"):
        CausalLMCollator(0, pad_to_multiple_of=0)


def test_default_collator_is_the_choice_of_transformers(tokenizer: Any) -> None:
    assert isinstance(default_collator(tokenizer), DataCollatorWithPadding)
    assert default_collator(None) is default_data_collator
    assert default_collator(object()) is default_data_collator
