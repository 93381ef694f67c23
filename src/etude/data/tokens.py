"""Rendered rows -> token ids and labels; labels of what the model is only given are -100.

The text of a row is tokenized in one call, and a token is supervised by where it stands: it overlaps a span that the
model is to say. End-of-turn and end-of-sequence tokens are supervised by position as well, never by their id, so that
a pad token equal to the end token does no harm.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from etude.data.chat import TrainOn, render_rows, special_tokens, template_of
from etude.data.formats import Row
from etude.data.rows import OnBadRow, Origins, RowSet
from etude.data.templates import Refused, Rendered
from etude.errors import ConfigError, DataError, ModelError

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


class Statistics(NamedTuple):
    """What the rows amount to in tokens. `supervised_tokens` are those that count in the loss, after the shift."""

    samples: int
    tokens: int
    supervised_tokens: int
    longest: int
    cut_off: int
    duplicates: int

    @property
    def supervised_share(self) -> float:
        """Supervised tokens per token."""
        return self.supervised_tokens / self.tokens if self.tokens else 0.0

    def describe(self) -> str:
        """One line for the start screen."""
        return (
            f"{self.samples} samples, {self.tokens} tokens ({self.supervised_share:.0%} supervised), "
            f"longest {self.longest}, {self.cut_off} cut off, {self.duplicates} duplicates"
        )


class TokenizedRows(Sequence[dict[str, list[int]]]):
    """Tokenized rows as a map-style dataset: `rows[i]` is `{"input_ids": [...], "labels": [...]}`.

    Attributes:
        rejected: one `DataError` for each row that was skipped (`on_bad_row="skip"`), here or when it was read.
        lengths: tokens of each row, shape (rows,).
        source: where the rows come from and their format, in words.
        statistics: see `Statistics`.
    """

    def __init__(self, files: Sequence[str], source: str = "") -> None:
        self.rejected: list[DataError] = []
        self.source = source
        self._origins = Origins(files)  # and not the rows: their text need not stay in memory
        self._ends = array("Q", [0])
        self._input_ids = array("i")
        self._labels = array("i")
        self._supervised_tokens = self._cut_off = self._longest = self._duplicates = 0

    def _append(self, encoded: Encoded, file: int, line: int, *, is_duplicate: bool) -> None:
        self._origins.append(file, line)
        self._input_ids.extend(encoded.input_ids)
        self._labels.extend(encoded.labels)
        self._ends.append(len(self._input_ids))
        self._supervised_tokens += encoded.num_supervised
        self._cut_off += encoded.was_cut
        self._longest = max(self._longest, len(encoded.input_ids))
        self._duplicates += is_duplicate

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> dict[str, list[int]]:  # type: ignore[override]
        if index < 0:
            index += len(self)
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        start, end = self._ends[index], self._ends[index + 1]
        return {"input_ids": self._input_ids[start:end].tolist(), "labels": self._labels[start:end].tolist()}

    def origin(self, index: int) -> tuple[str, int]:
        """The file and line that row `index` came from."""
        return self._origins.at(index)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each row."""
        ends = np.array(self._ends, dtype=np.int64)
        return ends[1:] - ends[:-1]

    @property
    def statistics(self) -> Statistics:
        """The rows in numbers."""
        return Statistics(
            samples=len(self),
            tokens=len(self._input_ids),
            supervised_tokens=self._supervised_tokens,
            longest=self._longest,
            cut_off=self._cut_off,
            duplicates=self._duplicates,
        )


def encode_row(
    row: Row,
    tokenizer: Any,
    *,
    format: str,
    max_length: int | None,
    template: str | None = None,
    train_on: TrainOn = "completion",
) -> dict[str, list[int]]:
    """Token ids and labels of one checked row; see `encode_rows` for the arguments.

    Raises:
        DataError: the template refuses the row, or no supervised token is left of it.
        ModelError: the template is broken or exceeds its limits.
    """
    [encoded] = encode_each([row], tokenizer, format, max_length, template, train_on)
    error = error_of(encoded, max_length, None)
    if error is not None:
        raise error
    return {"input_ids": encoded.input_ids, "labels": encoded.labels}  # type: ignore[union-attr]


def encode_rows(
    rows: RowSet,
    tokenizer: Any,
    *,
    max_length: int | None = None,
    template: str | None = None,
    train_on: TrainOn = "completion",
    on_bad_row: OnBadRow = "stop",
) -> TokenizedRows:
    """Tokenize all rows.

    Args:
        tokenizer: a tokenizer of transformers.
        max_length: longer rows are cut at the end, and counted. None: no limit.
        template: a Jinja chat template, `"plain"`, or None for the tokenizer's own (plain where it has none).
        train_on: `"completion"`: every assistant turn, or all of `text`; `"last"`: the last turn; `"all"`: everything.
        on_bad_row: rows that the template refuses, or that have no supervised token, stop the run or are skipped.

    Raises:
        DataError: a row cannot be trained on, or none is left; names file and line.
        ModelError: the template is broken or exceeds its limits; never skipped.
    """
    if max_length is not None and max_length < 2:
        raise ConfigError(f"expected at least 2 tokens, got {max_length}", field="max_length")
    tokenized = TokenizedRows(rows.origins.files, rows.source)
    tokenized.rejected = list(rows.rejected)
    seen: set[bytes] = set()
    for index, encoded in enumerate(encode_each(rows, tokenizer, rows.format, max_length, template, train_on)):
        error = error_of(encoded, max_length, rows.origin(index))
        if error is None:
            assert isinstance(encoded, Encoded)
            digest = hashlib.sha256(array("i", encoded.input_ids + encoded.labels).tobytes()).digest()
            tokenized._append(encoded, *rows.origins.place(index), is_duplicate=digest in seen)
            seen.add(digest)
        elif isinstance(error, ModelError) or on_bad_row == "stop":
            raise error
        else:
            tokenized.rejected.append(error)
    if len(rows) and not len(tokenized):
        raise DataError(f"no row is left, all {len(rows)} were skipped; the first: {tokenized.rejected[0]}")
    return tokenized


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
    if encoded.num_supervised == 0:
        why = f"; it was cut at max_length={max_length}, before the answer" if encoded.was_cut else ""
        return DataError(f"expected at least one token to learn from, got none{why}", file=file, line=line)
    return None


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
