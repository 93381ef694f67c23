"""Samples of one micro-batch -> padded tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from etude.data.encoding import IGNORED
from etude.errors import ConfigError, DataError


class CausalLMCollator:
    """Pads `input_ids`, `attention_mask` and `labels` on the right to the longest sample of the batch.

    Padding is told from text by length, never by its id: a pad token that equals the end token hides no end token.
    Returns int64 tensors of shape (samples, longest): labels are padded with -100, the mask with 0. Samples without
    labels give a batch without labels. Other keys are left out.

    Args:
        tokenizer: a tokenizer, or the id to pad with. A tokenizer without a pad token pads with its end token.
        pad_to_multiple_of: round the length up, for kernels that want multiples of 8 or 64.

    Raises:
        ConfigError: `pad_to_multiple_of` is below 1.
        DataError: the batch is empty, or the labels of a sample are not as many as its tokens.
    """

    def __init__(self, tokenizer: Any, pad_to_multiple_of: int | None = None) -> None:
        if pad_to_multiple_of is not None and pad_to_multiple_of < 1:
            raise ConfigError(f"expected at least 1, got {pad_to_multiple_of}", field="pad_to_multiple_of")
        self.pad_token_id = tokenizer if isinstance(tokenizer, int) else _pad_token_id(tokenizer)
        self.pad_to_multiple_of = pad_to_multiple_of or 1

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        if not samples:
            raise DataError("expected at least one sample in a batch, got none")
        rows = [torch.as_tensor(sample["input_ids"], dtype=torch.int64) for sample in samples]
        masks = [
            torch.as_tensor(sample.get("attention_mask", torch.ones_like(ids)), dtype=torch.int64)
            for sample, ids in zip(samples, rows, strict=True)
        ]
        columns = {"input_ids": (rows, self.pad_token_id), "attention_mask": (masks, 0)}
        if "labels" in samples[0]:
            labels = [torch.as_tensor(sample["labels"], dtype=torch.int64) for sample in samples]
            columns["labels"] = (labels, IGNORED)
        width = max(len(ids) for ids in rows)
        width += -width % self.pad_to_multiple_of
        return {name: _padded(name, values, rows, width, filler) for name, (values, filler) in columns.items()}


def _padded(
    name: str, values: list[torch.Tensor], rows: list[torch.Tensor], width: int, filler: int
) -> torch.Tensor:  # fmt: skip
    batch = torch.full((len(values), width), filler, dtype=torch.int64)
    for index, (value, ids) in enumerate(zip(values, rows, strict=True)):
        if value.shape != ids.shape:
            raise DataError(f"expected {len(ids)} values as in input_ids, got {len(value)}", field=name)
        batch[index, : len(value)] = value
    return batch


def _pad_token_id(tokenizer: Any) -> int:
    ids = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((int(token) for token in ids if token is not None), 0)


def default_collator(processing_class: Any = None) -> Callable[[list[Any]], Any]:
    """The collator that transformers picks where none is given: padding by a tokenizer or feature extractor if there
    is one, else plain stacking."""
    from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase, default_data_collator
    from transformers.feature_extraction_sequence_utils import SequenceFeatureExtractor

    if isinstance(processing_class, PreTrainedTokenizerBase | SequenceFeatureExtractor):
        return DataCollatorWithPadding(processing_class)  # type: ignore[no-any-return]
    return default_data_collator  # type: ignore[no-any-return]
