"""Rows that are read and tokenized while training goes on, for data that does not fit the memory.

    files or hub: names  ->  records  ->  checked rows, CHUNK_ROWS at a time  ->  tokens

The order is that of the files. Where the data ends, it begins anew. A position is a source and the number of records
that were read of it: a resumed run passes over exactly those, without tokenizing them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from torch.utils.data import IterableDataset, get_worker_info

from etude.data.chat import TrainOn
from etude.data.encoding import CHUNK_ROWS, Encoded, encode_each, error_of
from etude.data.formats import Row
from etude.data.hub import is_hub_name, read_hub_rows
from etude.data.readers import Record, read_records
from etude.data.rows import OnBadRow, checked, files_of, format_of
from etude.errors import ConfigError, DataError, ModelError


class _Read(NamedTuple):
    """A record that was read: how many its source has given with it, its row or what is wrong with it."""

    number: int
    line: int
    row: Row | None
    error: DataError | None


class StreamedRows(IterableDataset[dict[str, list[int]]]):
    """Tokenized rows as a stream: each is `{"input_ids": [...], "labels": [...]}`.

    Args:
        sources: files, folders of them, or names on the Hub, in the order of reading.
        format: of the rows; by default that of the first good one.
        tokenizer, max_length, template, train_on, on_bad_row: see `encode_rows`.

    Attributes:
        rejected: one `DataError` for each row that was skipped since this process began.

    Raises:
        DataError: a source is missing, or has no row of a known format.
    """

    def __init__(
        self,
        sources: Sequence[str],
        tokenizer: Any,
        *,
        format: str | None = None,
        max_length: int | None = None,
        template: str | None = None,
        train_on: TrainOn = "completion",
        on_bad_row: OnBadRow = "stop",
    ) -> None:
        self.files = [file for source in sources for file in files_of(source)]
        self.rejected: list[DataError] = []
        found = format or format_of(list(sources), streaming=True)
        if found is None:
            raise DataError("expected rows of a known format, found none", file=str(self.files[0]))
        self.format = found
        self._tokenizer, self._max_length, self._template = tokenizer, max_length, template
        self._train_on, self._on_bad_row = train_on, on_bad_row
        self._position = self._start = (0, 0)

    @property
    def source(self) -> str:
        """Where the rows come from, for the start screen."""
        name = str(self.files[0]) if len(self.files) == 1 else f"{len(self.files)} files"
        return f"{name}, format '{self.format}'"

    def __iter__(self) -> Iterator[dict[str, list[int]]]:
        if get_worker_info() is not None:
            raise ConfigError("a stream is read by one process; set it to 0", field="dataloader_num_workers")
        start, self._start = self._start, (0, 0)
        self._position = start
        return self._rows_from(*start)

    def state_dict(self) -> dict[str, int]:
        """The position behind the last row that was handed out."""
        file, records = self._position
        return {"file": file, "records": records}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Let the next iteration begin at a position of `state_dict`."""
        self._position = self._start = (int(state["file"]), int(state["records"]))

    def first_rows(self, count: int) -> list[Row]:
        """The first good rows as they are, untokenized."""
        good = (read.row for read in self._checked(0, 0) if read.row is not None)
        return list(islice(good, count))

    def _rows_from(self, first_file: int, records: int) -> Iterator[dict[str, list[int]]]:
        for file in range(first_file, len(self.files)):
            reading = self._checked(file, records if file == first_file else 0)
            while chunk := list(islice(reading, CHUNK_ROWS)):
                yield from self._tokenized(file, chunk)

    def _tokenized(self, file: int, chunk: list[_Read]) -> Iterator[dict[str, list[int]]]:
        rows = [read.row for read in chunk if read.row is not None]
        settings = (self._tokenizer, self.format, self._max_length, self._template, self._train_on)
        encoded_rows = encode_each(rows, *settings)
        for read in chunk:
            encoded = next(encoded_rows) if read.row is not None else None
            origin = (str(self.files[file]), read.line)
            error = read.error if encoded is None else error_of(encoded, self._max_length, origin)
            if error is None:
                assert isinstance(encoded, Encoded)
                self._position = (file, read.number)
                yield {"input_ids": encoded.input_ids, "labels": encoded.labels}
            elif isinstance(error, ModelError) or self._on_bad_row == "stop":
                raise error
            else:
                self.rejected.append(error)

    def _checked(self, file: int, skip: int) -> Iterator[_Read]:
        """The records of a file behind the first `skip` ones."""
        name = self.files[file]
        for number, record in enumerate(_records(name, skip), start=skip + 1):
            _, problem = checked(record, self.format)
            if problem is None:
                yield _Read(number, record.line, record.value, None)
            else:
                error = DataError(problem.message, file=str(name), line=record.line, field=problem.field)
                yield _Read(number, record.line, None, error)


def _records(file: Path | str, skip: int) -> Iterator[Record]:
    if is_hub_name(file):
        return (Record(line, row) for line, row in read_hub_rows(str(file), streaming=True, skip=skip))
    return islice(read_records(Path(file)), skip, None)
