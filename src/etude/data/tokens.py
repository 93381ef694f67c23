"""Rows -> the data set that a run trains on: token ids and labels, in little memory whatever their number."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from etude.data.chat import TrainOn
from etude.data.compact import FileNumbers, Spool
from etude.data.encoding import IGNORED, EncodedChunk, encode_each, error_of, nothing_to_learn
from etude.data.formats import Row
from etude.data.rows import OnBadRow, RowSet
from etude.data.token_workers import encoded_chunks
from etude.errors import ConfigError, DataError, ModelError


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


COLUMNS = {"ends": "<u8", "files": "<u4", "lines": "<u8", "input_ids": "<i4", "is_learned": "|u1"}
"""Of tokenized rows: where each ends among the tokens, the file and line it came from; and of each token its id, and
whether it is its own label or none."""


class TokenizedRows(Sequence[dict[str, list[int]]]):
    """Tokenized rows as a map-style dataset: `rows[i]` is `{"input_ids": [...], "labels": [...]}`.

    Attributes:
        rejected: one `DataError` for each row that was skipped (`on_bad_row="skip"`), here or when it was read.
        lengths: tokens of each row, shape (rows,).
        source: where the rows come from and their format, in words.
        statistics: see `Statistics`.
        columns: the arrays of `COLUMNS`; those of many rows lie in files and are read as they are needed.
    """

    def __init__(
        self,
        columns: dict[str, NDArray[Any] | FileNumbers],
        files: Sequence[str],
        source: str,
        statistics: Statistics,
        rejected: Sequence[DataError] = (),
    ) -> None:
        self.columns, self.files, self.source, self.statistics = columns, list(files), source, statistics
        self.rejected = list(rejected)
        self._ends, self._input_ids, self._is_learned = (
            np.asarray(columns["ends"]), columns["input_ids"], columns["is_learned"]
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> dict[str, list[int]]:  # type: ignore[override]
        if index < 0:
            index += len(self)
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        row = slice(int(self._ends[index - 1]) if index else 0, int(self._ends[index]))
        input_ids = self._input_ids[row]
        labels = np.where(self._is_learned[row], input_ids, IGNORED)
        return {"input_ids": input_ids.tolist(), "labels": labels.tolist()}

    def origin(self, index: int) -> tuple[str, int]:
        """The file and line that row `index` came from."""
        return self.files[int(self.columns["files"][index])], int(self.columns["lines"][index])

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each row."""
        ends = self._ends.astype(np.int64)
        ends[1:] -= ends[:-1].copy()
        return ends


class _Building:
    """Tokenized rows while there are still more to come."""

    def __init__(self) -> None:
        self._spools = {name: Spool() for name in (*COLUMNS, "digests")}
        self._tokens = self._supervised = self._cut_off = self._longest = 0

    def append(self, chunk: EncodedChunk, is_kept: NDArray[np.bool_], files: list[int], lines: list[int]) -> None:
        """The rows of a chunk that are kept; those that are not have no tokens left to leave out, or all of them."""
        lengths = chunk.lengths[is_kept]
        tokens: Any = slice(None) if is_kept.all() else np.repeat(is_kept, chunk.lengths)
        ends = self._tokens + np.cumsum(lengths)
        columns = {
            "ends": ends,
            "files": np.array(files)[is_kept],
            "lines": np.array(lines)[is_kept],
            "input_ids": chunk.input_ids[tokens],
            "is_learned": chunk.is_learned[tokens],
        }
        for name, values in columns.items():
            self._spools[name].write(values.astype(COLUMNS[name]).tobytes())
        self._spools["digests"].write(chunk.digests[is_kept].tobytes())
        self._tokens += int(lengths.sum())
        self._supervised += int(chunk.supervised[is_kept].sum())
        self._cut_off += int(chunk.was_cut[is_kept].sum())
        self._longest = max(self._longest, int(lengths.max(initial=0)))

    def finished(self, files: Sequence[str], source: str, rejected: Sequence[DataError]) -> TokenizedRows:
        columns = {name: self._spools[name].as_numbers(dtype) for name, dtype in COLUMNS.items()}
        digests = np.asarray(self._spools["digests"].as_numbers("<u8"))
        statistics = Statistics(
            samples=len(digests),
            tokens=self._tokens,
            supervised_tokens=self._supervised,
            longest=self._longest,
            cut_off=self._cut_off,
            duplicates=len(digests) - len(np.unique(digests)),
        )
        return TokenizedRows(columns, files, source, statistics, rejected)


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
    num_processes: int | None = None,
) -> TokenizedRows:
    """Tokenize all rows.

    Args:
        tokenizer: a tokenizer of transformers.
        max_length: longer rows are cut at the end, and counted. None: no limit.
        template: a Jinja chat template, `"plain"`, or None for the tokenizer's own (plain where it has none).
        train_on: `"completion"`: every assistant turn, or all of `text`; `"last"`: the last turn; `"all"`: everything.
        on_bad_row: rows that the template refuses, or that have no supervised token, stop the run or are skipped.
        num_processes: how many tokenize; what they make does not depend on it. None: one for each core where there are
            many rows.

    Raises:
        DataError: a row cannot be trained on, or none is left; names file and line.
        ModelError: the template is broken or exceeds its limits; never skipped.
    """
    if max_length is not None and max_length < 2:
        raise ConfigError(f"expected at least 2 tokens, got {max_length}", field="max_length")
    rejected = list(rows.rejected)
    building = _Building()
    first = kept = 0
    chunks = encoded_chunks(rows, tokenizer, rows.format, max_length, template, train_on, num_processes)
    with contextlib.closing(chunks):  # at an error too, which a notebook keeps with all that it came from
        for chunk in chunks:
            numbers = range(first, first + len(chunk.lengths))
            for error in _errors(chunk, rows, numbers, max_length):
                if isinstance(error, ModelError) or on_bad_row == "stop":
                    raise error
                rejected.append(error)
            is_kept = chunk.supervised > 0
            places = [rows.origins.place(number) for number in numbers]
            building.append(chunk, is_kept, [file for file, _ in places], [line for _, line in places])
            first, kept = numbers.stop, kept + int(is_kept.sum())
    if len(rows) and not kept:
        raise DataError(f"no row is left, all {len(rows)} were skipped; the first: {rejected[0]}")
    return building.finished(rows.origins.files, rows.source, rejected)


def _errors(
    chunk: EncodedChunk, rows: RowSet, numbers: range, max_length: int | None
) -> Iterator[DataError | ModelError]:
    """What is wrong with the rows of a chunk, in their order."""
    for index in np.flatnonzero(chunk.supervised == 0).tolist():
        origin = rows.origin(numbers[index])
        if index not in chunk.refused:
            yield nothing_to_learn(bool(chunk.was_cut[index]), max_length, origin)
        elif (error := error_of(chunk.refused[index], max_length, origin)) is not None:
            yield error
