"""The collator of old scripts that finds the answer of a row by the text before it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from etude.data.collate import CausalLMCollator
from etude.data.encoding import IGNORED
from etude.errors import ConfigError


class DataCollatorForCompletionOnlyLM:
    """Pads rows of token ids, and lets only what follows `response_template` count in the loss.

    Without `instruction_template` that is everything behind its last occurrence. With it, every stretch from behind a
    response template up to the next instruction template counts. Padding is told by length, never by its id. A row
    without the template counts nothing, and a warning shows it.

    Args:
        response_template: the text before an answer (`"### Response:\\n"`), or its token ids. Give ids where a text
            has other tokens on its own than inside of a row.
        instruction_template: the text before a question, or its token ids.
        tokenizer: also taken as `processing_class`.
        padding_free: no effect: padding is removed wherever that is exact.

    Raises:
        ConfigError: `mlm` is set, a template has no tokens, or there is no tokenizer.
    """

    def __init__(
        self,
        response_template: str | Sequence[int],
        instruction_template: str | Sequence[int] | None = None,
        *,
        tokenizer: Any = None,
        processing_class: Any = None,
        mlm: bool = False,
        ignore_index: int = IGNORED,
        padding_free: bool = False,
        pad_to_multiple_of: int | None = None,
    ) -> None:
        if mlm:
            raise ConfigError("an answer is predicted token by token, so it must be False", field="mlm")
        self.tokenizer = tokenizer if tokenizer is not None else processing_class
        if self.tokenizer is None:
            raise ConfigError("is missing", field="tokenizer")
        self.response_template, self.instruction_template = response_template, instruction_template
        self.response_ids = self._ids(response_template, "response_template")
        self.instruction_ids = (
            None if instruction_template is None else self._ids(instruction_template, "instruction_template")
        )
        self.ignore_index = ignore_index
        self.pad = CausalLMCollator(self.tokenizer, pad_to_multiple_of)

    def __call__(self, samples: Sequence[Any]) -> dict[str, torch.Tensor]:
        rows = [sample if isinstance(sample, Mapping) else {"input_ids": sample} for sample in samples]
        batch = self.pad(
            [{**row, "labels": self.labels_of([int(token) for token in row["input_ids"]])} for row in rows]
        )
        if self.ignore_index != IGNORED:
            batch["labels"][batch["labels"] == IGNORED] = self.ignore_index
        return batch

    def labels_of(self, tokens: list[int]) -> list[int]:
        """The labels of one row: its tokens where they count, -100 elsewhere."""
        starts = [place + len(self.response_ids) for place in _places(tokens, self.response_ids)]
        if not starts:
            self._warn(tokens, self.response_template)
            return [IGNORED] * len(tokens)
        if self.instruction_ids is None:
            return [IGNORED] * starts[-1] + tokens[starts[-1] :]
        questions = _places(tokens, self.instruction_ids)
        if not questions:
            self._warn(tokens, self.instruction_template)
            return [IGNORED] * len(tokens)
        labels = [IGNORED] * len(tokens)
        for start in starts:
            end = next((place for place in questions if place >= start), len(tokens))
            labels[start:end] = tokens[start:end]
        return labels

    def _ids(self, template: str | Sequence[int], field: str) -> list[int]:
        if isinstance(template, str):
            ids = list(self.tokenizer.encode(template, add_special_tokens=False))
        else:
            ids = [int(token) for token in template]
        if not ids:
            raise ConfigError("has no tokens", field=field)
        return ids

    def _warn(self, tokens: list[int], template: Any) -> None:
        start = self.tokenizer.decode(tokens[:40])
        warnings.warn(
            f"the template {template!r} is not in a row, which counts nothing; was it cut off by max_length, or is the "
            f"template tokenized otherwise inside of a row? It begins: {start!r}",
            stacklevel=3,
        )


def _places(tokens: list[int], part: list[int]) -> list[int]:
    """Where `part` begins in `tokens`."""
    width = len(part)
    return [place for place in range(len(tokens) - width + 1) if tokens[place : place + width] == part]
