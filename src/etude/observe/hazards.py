"""What a first batch of tokens gives away: an end that is never learned, a beginning that stands there twice."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from etude.observe.start_screen import Concern

IGNORED_LABEL = -100
LAST_TOKENS = 3
"""An end-of-turn token may be followed by a line break."""


def hazards_of(inputs: Any, tokenizer: Any) -> list[Concern]:
    """Concerns about a collated batch, a mapping of (B, T) tensors; nothing where it is something else."""
    rows = _rows(inputs)
    eos = getattr(tokenizer, "eos_token_id", None)
    if not rows:
        return []
    found = []
    if eos is not None and _end_is_masked(rows, eos) and getattr(tokenizer, "pad_token_id", None) == eos:
        found.append(
            Concern(
                "the pad token is also the end token and is masked in the labels by its id, so the end of an answer is "
                "never learned: the model will not stop",
                "mask padding by attention_mask (etude.data.CausalLMCollator does), or give the tokenizer a pad token of "
                "its own",
            )
        )
    elif eos is not None and _none_ends(rows, tokenizer):
        found.append(
            Concern(
                "no row of the first batch ends with an end token: the model is not taught to stop",
                "append tokenizer.eos_token to every answer, unless rows are pieces of longer text",
            )
        )
    bos = getattr(tokenizer, "bos_token_id", None)
    if bos is not None and any(len(tokens) > 1 and tokens[0] == tokens[1] == bos for tokens, _ in rows):
        found.append(
            Concern(
                "rows begin with two beginning-of-sequence tokens",
                "tokenize text that a chat template rendered with add_special_tokens=False",
            )
        )
    return found


def _rows(inputs: Any) -> list[tuple[list[int], list[int]]]:
    """(tokens, labels) of each row without its padding."""
    if not isinstance(inputs, Mapping) or any(
        getattr(inputs.get(name), "ndim", 0) != 2 for name in ("input_ids", "labels")
    ):
        return []
    ids, labels, mask = inputs["input_ids"], inputs["labels"], inputs.get("attention_mask")
    if ids.shape != labels.shape:  # an encoder-decoder
        return []
    rows = []
    for index in range(len(ids)):
        kept = mask[index] != 0 if mask is not None and mask.shape == ids.shape else slice(None)
        rows.append((ids[index][kept].tolist(), labels[index][kept].tolist()))
    return [row for row in rows if row[0]]


def _end_is_masked(rows: list[tuple[list[int], list[int]]], eos: int) -> bool:
    """Whether rows end with the end token and it carries no label in any of them."""
    ended = [labels[-1] for tokens, labels in rows if tokens[-1] == eos]
    return bool(ended) and all(label == IGNORED_LABEL for label in ended)


def _none_ends(rows: list[tuple[list[int], list[int]]], tokenizer: Any) -> bool:
    added = getattr(tokenizer, "added_tokens_decoder", {})
    ends = {number for number, token in added.items() if getattr(token, "special", False)}
    ends |= {tokenizer.eos_token_id}
    return not any(ends & set(tokens[-LAST_TOKENS:]) for tokens, _ in rows)
