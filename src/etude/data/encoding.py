"""Rendered rows -> token ids and labels; labels of what the model is only given are -100.

The text of a row is tokenized in one call, and a token is supervised by where it stands: it overlaps a span that the
model is to say. End-of-turn and end-of-sequence tokens are supervised by position as well, never by their id, so that
a pad token equal to the end token does no harm.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from etude.data.chat import TrainOn, render_rows, special_tokens, template_of
from etude.data.formats import Row
from etude.data.templates import Refused, Rendered
from etude.errors import DataError, ModelError

IGNORED = -100
CHUNK_ROWS = 64


class Encoded(NamedTuple):
    """The tokens of one row; `labels` has IGNORED where nothing is to be learned. `was_cut`: longer than allowed."""

    input_ids: list[int]
    labels: list[int]
    was_cut: bool

    @property
    def num_supervised(self) -> int:
        """Labels that count in the loss: the first token of a row is predicted from nothing."""
        predicted = self.labels[1:]
        return len(predicted) - predicted.count(IGNORED)


class EncodedChunk(NamedTuple):
    """The tokens of some rows one behind the other. The first four have a value for every row, 0 for one that is refused."""

    lengths: NDArray[np.int64]
    supervised: NDArray[np.int64]
    was_cut: NDArray[np.uint8]
    digests: NDArray[np.uint64]
    """Equal for rows that are equal in tokens and labels."""
    input_ids: NDArray[np.int32]
    is_learned: NDArray[np.uint8]
    """Of each token, whether its label is the token itself or IGNORED."""
    refused: dict[int, Refused]
    """By the number of the row within the chunk."""


ROW_FIELDS = {"lengths": "<i8", "supervised": "<i8", "was_cut": "|u1", "digests": "<u8"}
TOKEN_FIELDS = {"input_ids": "<i4", "is_learned": "|u1"}


def as_chunk(encoded: Iterable[Encoded | Refused]) -> EncodedChunk:
    """Rows in the form that takes little memory."""
    refused: dict[int, Refused] = {}
    of_rows: list[tuple[int, int, int, int]] = []
    ids: list[int] = []
    labels: list[int] = []
    for number, row in enumerate(encoded):
        if isinstance(row, Refused):
            refused[number] = row
            of_rows.append((0, 0, 0, 0))
            continue
        content = np.array(row.input_ids + row.labels, dtype="<i4").tobytes()
        digest = int.from_bytes(hashlib.blake2b(content, digest_size=8).digest())
        of_rows.append((len(row.input_ids), row.num_supervised, int(row.was_cut), digest))
        ids += row.input_ids
        labels += row.labels
    columns: dict[str, NDArray[Any]] = {
        name: np.array([values[place] for values in of_rows], dtype=dtype)
        for place, (name, dtype) in enumerate(ROW_FIELDS.items())
    }
    is_learned = (np.array(labels, dtype="<i4") != IGNORED).astype("|u1")
    return EncodedChunk(**columns, input_ids=np.array(ids, dtype="<i4"), is_learned=is_learned, refused=refused)


def error_of(
    encoded: Encoded | Refused, max_length: int | None, origin: tuple[str, int] | None
) -> DataError | ModelError | None:
    """Why a row cannot be trained on, or None. `origin` is its file and line."""
    file, line = origin or (None, None)
    if isinstance(encoded, Refused):
        if encoded.by_row:
            return DataError(f"the chat template refuses the row: {encoded.reason}", file=file, line=line)
        place = f" (at {file}:{line})" if file else ""
        return ModelError(f"the chat template cannot be used: {encoded.reason}{place}; give another as template=")
    return nothing_to_learn(encoded.was_cut, max_length, origin) if encoded.num_supervised == 0 else None


def nothing_to_learn(was_cut: bool, max_length: int | None, origin: tuple[str, int] | None) -> DataError:
    """The error of a row without a single supervised token."""
    file, line = origin or (None, None)
    why = f"; it was cut at max_length={max_length}, before the answer" if was_cut else ""
    return DataError(f"expected at least one token to learn from, got none{why}", file=file, line=line)


def encode_each(
    rows: Sequence[Row], tokenizer: Any, format: str, max_length: int | None, template: str | None, train_on: TrainOn
) -> Iterator[Encoded | Refused]:
    """Every row as tokens, or why its template refused it, in the order of the rows; see `encode_rows`."""
    chunks = (rows[start : start + CHUNK_ROWS] for start in range(0, len(rows), CHUNK_ROWS))
    rendered = render_rows(map(list, chunks), tokenizer, format=format, template=template, train_on=train_on)
    encoder = _Encoder(tokenizer, from_template=template_of(tokenizer, template, format) is not None)
    for chunk in rendered:
        texts = [row for row in chunk if isinstance(row, Rendered)]
        encoded = iter(encoder.encode(texts, max_length) if texts else [])
        yield from (row if isinstance(row, Refused) else next(encoded) for row in chunk)


class _Encoder:
    """A tokenizer with what must be asked of it once."""

    def __init__(self, tokenizer: Any, *, from_template: bool) -> None:
        self._tokenizer = tokenizer
        self._from_template = from_template
        self._bos, self._eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        self._turn_ends = special_tokens(tokenizer)

    def encode(self, rows: list[Rendered], max_length: int | None) -> list[Encoded]:
        texts = [row.text for row in rows]
        if self._tokenizer.is_fast:
            batch = self._call(texts, return_offsets_mapping=True)
            supervised = map(_by_offsets, rows, batch["offset_mapping"])
        else:
            batch = self._call(texts)
            supervised = map(self._by_prefixes, rows, batch["input_ids"])
        return [
            self._finished(row, ids, learned, max_length)
            for row, ids, learned in zip(rows, batch["input_ids"], supervised, strict=True)
        ]

    def _call(self, texts: list[str], **options: bool) -> Any:
        # A template writes its own beginning-of-sequence token. Rows that are too long are reported once, by us.
        return self._tokenizer(texts, add_special_tokens=not self._from_template, verbose=False, **options)

    def _by_prefixes(self, row: Rendered, ids: list[int]) -> list[bool]:
        """For tokenizers without offsets: a span starts behind the tokens that its text before has in common."""
        learned = [False] * len(ids)
        for start, end in row.spans:
            first, last = (self._num_tokens_before(row.text, place, ids) for place in (start, end))
            learned[first:last] = [True] * (last - first)
        return learned

    def _num_tokens_before(self, text: str, place: int, ids: list[int]) -> int:
        if place >= len(text):
            return len(ids)
        prefix = self._call([text[:place]])["input_ids"][0]
        return next((n for n, (own, whole) in enumerate(zip(prefix, ids, strict=False)) if own != whole), len(prefix))

    def _finished(self, row: Rendered, ids: list[int], learned: list[bool], max_length: int | None) -> Encoded:
        if len(ids) > 1 and self._bos is not None and ids[0] == ids[1] == self._bos:
            ids, learned = ids[1:], learned[1:]
        if row.spans and not row.text[row.spans[-1][1] :].strip():  # the model has the last word
            ids, learned = self._ended(row, list(ids), list(learned))
        was_cut = max_length is not None and len(ids) > max_length
        ids, learned = ids[:max_length], learned[:max_length]
        labels = [token if is_learned else IGNORED for token, is_learned in zip(ids, learned, strict=True)]
        return Encoded(list(ids), labels, was_cut)

    def _ended(self, row: Rendered, ids: list[int], learned: list[bool]) -> tuple[list[int], list[bool]]:
        """Let the last turn end: a model that never sees an end token never stops."""
        if self._eos is None:
            return ids, learned
        ends_its_turns = self._from_template and row.text.rstrip().endswith(self._turn_ends)
        if ids and ids[-1] == self._eos:  # written by the row, or added by the tokenizer outside of any span
            learned[-1] = True
        elif not ends_its_turns:
            ids.append(self._eos)
            learned.append(True)
        return ids, learned


def _by_offsets(row: Rendered, offsets: list[tuple[int, int]]) -> list[bool]:
    """Which tokens overlap a span; `offsets` are their characters in the text."""
    first, last = np.array(offsets, dtype=np.int64).reshape(-1, 2).T
    learned = np.zeros(len(offsets), dtype=bool)
    for start, end in row.spans:
        # A token without characters of its own (a part of a character, a word mark) belongs where it stands.
        learned |= (first < end) & ((last > start) | ((first == last) & (first >= start)))
    flags: list[bool] = learned.tolist()
    return flags
