"""Data as `trl.SFTTrainer` takes it -> samples of token ids and labels, by way of the data room.

Rows are plain text, prompt and completion (texts or turns), conversations, or tokenized already. Tokenizing, masks,
ends and cutting are those of `etude.data`.
"""

from __future__ import annotations

import json
from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from etude.data import CausalLMCollator, encode_rows, read_rows
from etude.data.chat import PLAIN, TrainOn
from etude.data.encoding import IGNORED
from etude.data.formats import detect_format
from etude.data.kept_tokens import encode_rows_once
from etude.errors import ConfigError, DataError

if TYPE_CHECKING:
    from etude.sft_config import SFTConfig

Row = dict[str, Any]
Sample = dict[str, list[int]]
FormattingFunc = Callable[[Row], str]

CHUNK_ROWS = 1000
"""Rows that are packed with each other: as many as TRL packs, so that the same blocks come out."""

MASKS = ("assistant_masks", "completion_mask")


class Shape(NamedTuple):
    """What the rows of a data set are, told by the first one, and what is learned of them."""

    format: str
    convert: Callable[[Row], Row]
    template: str | None
    train_on: TrainOn


def shape_of(row: Row, config: SFTConfig, formatting_func: FormattingFunc | None) -> Shape:
    """How the rows of a data set that begins with `row` are read.

    Raises:
        ConfigError: the settings want something that such rows do not have.
        DataError: the row is nothing that can be trained on.
    """
    only_completion = config.completion_only_loss
    if formatting_func is not None:
        if only_completion:
            raise ConfigError(
                "a formatting_func makes one text of a row, which has no completion; leave one of the two out",
                field="completion_only_loss",
            )
        shape = Shape("text", lambda row: {"text": _formatted(row, formatting_func)}, None, "all")
    elif "prompt" in row and "completion" in row and not isinstance(row["prompt"], str):
        whole: TrainOn = "completion" if config.assistant_only_loss else "all"
        shape = Shape("messages", _joined, None, whole if only_completion is False else "last")
    elif "prompt" in row and "completion" in row:
        # Texts are continued as they are: a chat template is for turns.
        shape = Shape("prompt_completion", _copied, PLAIN, "all" if only_completion is False else "completion")
    elif "messages" in row or _is_chat(row.get("conversations")):
        shape = Shape("messages", _conversation, None, "completion" if config.assistant_only_loss else "all")
    elif config.dataset_text_field in row:
        name = config.dataset_text_field
        shape = Shape("text", lambda row: {"text": row.get(name)}, None, "all")
    elif detect_format(row) == "sharegpt":
        shape = Shape("sharegpt", _copied, None, "completion" if config.assistant_only_loss else "all")
    elif detect_format(row) == "alpaca":
        shape = Shape("alpaca", _copied, None, "all" if only_completion is False else "completion")
    else:
        raise DataError(
            f"expected a row with '{config.dataset_text_field}' (dataset_text_field), prompt and completion, messages, "
            f"or input_ids, got {', '.join(map(str, row)) or 'none'}; a formatting_func can make text of any row"
        )
    if config.assistant_only_loss and shape.format in ("text", "prompt_completion"):
        raise ConfigError("the rows are no conversations, so no turn is the assistant's", field="assistant_only_loss")
    return shape


def _formatted(row: Row, formatting_func: FormattingFunc) -> str:
    text = formatting_func(row)
    if not isinstance(text, str):
        raise ConfigError(
            f"must return the text of the one row that it is given, got {type(text).__name__}", field="formatting_func"
        )
    return text


def _copied(row: Row) -> Row:
    return dict(row)


def _is_chat(turns: Any) -> bool:
    return isinstance(turns, list) and bool(turns) and isinstance(turns[0], Mapping) and "role" in turns[0]


def _conversation(row: Row) -> Row:
    return {"messages": row.get("messages", row.get("conversations")), "tools": _tools(row)}


def _joined(row: Row) -> Row:
    """Prompt and completion of turns as one conversation, whose last turn is what is learned."""
    prompt, completion = (list(row[key]) for key in ("prompt", "completion"))
    if len(completion) != 1 or completion[0].get("role") != "assistant":
        raise DataError(
            "expected one turn of the assistant; longer completions go into 'messages' with assistant_only_loss=True",
            field="completion",
        )
    return {"messages": prompt + completion, "tools": _tools(row)}


def _tools(row: Row) -> Any:
    tools = row.get("tools")
    return json.loads(tools) if isinstance(tools, str) else tools


class Prepared(NamedTuple):
    """Samples ready for the collator, and one error for each row that was left out."""

    samples: Sequence[Sample]
    left_out: list[DataError]


def prepare(
    rows: Sequence[Row],
    tokenizer: Any,
    config: SFTConfig,
    *,
    packing: bool,
    formatting_func: FormattingFunc | None = None,
    is_whole: bool = True,
) -> Prepared:
    """Tokenize, label, cut and, with `packing`, pack rows. Rows with nothing to learn are left out.

    `is_whole` is False for a part of a stream, whose tokens are not worth keeping.

    Raises:
        DataError: a row is malformed; names its number and field.
        ConfigError: the settings want something that such rows do not have.
    """
    if not len(rows):
        raise DataError("expected at least one row, got none")
    cut = None if packing and config.packing_strategy != "bfd" else config.max_length
    samples: Sequence[Sample]
    if "input_ids" in rows[0]:
        samples, left_out = _labelled(rows, config, cut)
    else:
        shape = shape_of(dict(rows[0]), config, formatting_func)
        read = read_rows(_Converted(rows, shape.convert), format=shape.format)
        encode = encode_rows_once if config.keep_tokens and is_whole else encode_rows
        encoded = encode(
            read,
            tokenizer,
            num_processes=config.dataset_num_proc,
            max_length=cut,
            template=shape.template,
            train_on=shape.train_on,
            on_bad_row="skip",
        )
        samples, left_out = encoded, encoded.rejected
    if packing:
        assert config.max_length is not None
        samples = packed(samples, config.max_length, config.packing_strategy)
    if not len(samples):
        raise DataError(f"no row is left; the first: {left_out[0] if left_out else 'has no tokens'}")
    return Prepared(samples, left_out)


class _Converted(Sequence[Row]):
    """Rows in the shape that is read, made one at a time: a data set on disk is never in memory as a whole."""

    def __init__(self, rows: Sequence[Row], convert: Callable[[Row], Row]) -> None:
        self._rows, self._convert = rows, convert

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Row:  # type: ignore[override]
        return self._convert(dict(self._rows[index]))

    def __iter__(self) -> Iterator[Row]:
        return (self._convert(dict(row)) for row in self._rows)


def _labelled(rows: Sequence[Row], config: SFTConfig, cut: int | None) -> tuple[list[Sample], list[DataError]]:
    """Samples of rows that are tokenized: labels as given, else the tokens that every mask lets through."""
    samples: list[Sample] = []
    left_out: list[DataError] = []
    for number, row in enumerate(rows, start=1):
        tokens = list(row["input_ids"])
        if row.get("labels") is not None:
            labels = list(row["labels"])
        else:
            names = [
                name for name in MASKS if name in row and (name != "completion_mask" or config.completion_only_loss)
            ]
            bits = [row[name] for name in names]
            labels = [token if all(mask[place] for mask in bits) else IGNORED for place, token in enumerate(tokens)]
        if len(labels) != len(tokens):
            raise DataError(
                f"expected {len(tokens)} values as in input_ids, got {len(labels)}", file="rows", line=number
            )
        if any(label != IGNORED for label in labels[:cut]):
            samples.append({"input_ids": tokens[:cut], "labels": labels[:cut]})
        else:
            left_out.append(DataError("expected at least one token to learn from, got none", file="rows", line=number))
    return samples, left_out


# -- packing ----------------------------------------------------------------------------------------------------------


def packed(samples: Sequence[Sample], block_length: int, strategy: str) -> list[Sample]:
    """Samples put together to blocks of at most `block_length` tokens.

    A block is `{"input_ids", "labels", "seq_lengths"}`; its samples stay apart, the collator takes them out again.
    `bfd` puts each sample, the longest first, where it leaves the least room (best-fit decreasing, arXiv 2404.10830);
    `bfd_split` cuts long ones into several first; `wrapped` cuts the joined text every `block_length` tokens, and its
    blocks are one sample each.
    """
    blocks: list[Sample] = []
    for start in range(0, len(samples), CHUNK_ROWS):
        chunk = [samples[index] for index in range(start, min(start + CHUNK_ROWS, len(samples)))]
        if strategy == "wrapped":
            blocks += _parts(_concatenated(chunk), block_length)
            continue
        if strategy == "bfd_split":
            chunk = [part for sample in chunk for part in _parts(sample, block_length)]
        for bin in best_fit([len(sample["input_ids"]) for sample in chunk], block_length):
            members = [chunk[index] for index in bin]
            blocks.append(
                _concatenated(members) | {"seq_lengths": [len(member["input_ids"]) for member in members]}
            )  # fmt: skip
    return blocks


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of `lengths` in bins of `capacity`: the longest first, each into the fullest bin that has room for it."""
    bins: list[list[int]] = []
    room: list[tuple[int, int, int]] = []  # (free, when it got that free, bin), sorted
    for turn, index in enumerate(sorted(range(len(lengths)), key=lambda index: -lengths[index])):
        place = bisect_left(room, (lengths[index], -1, -1))
        if place < len(room):
            free, _, chosen = room.pop(place)
        else:
            free, chosen = capacity, len(bins)
            bins.append([])
        bins[chosen].append(index)
        if free > lengths[index]:
            insort(room, (free - lengths[index], turn, chosen))
    return bins


def _concatenated(samples: Iterable[Sample]) -> Sample:
    joined: Sample = {"input_ids": [], "labels": []}
    for sample in samples:
        for name, values in joined.items():
            values += sample[name]
    return joined


def _parts(sample: Sample, length: int) -> list[Sample]:
    starts = range(0, len(sample["input_ids"]), length)
    return [{name: values[start : start + length] for name, values in sample.items()} for start in starts]


class BlockCollator(CausalLMCollator):
    """`CausalLMCollator` that takes the samples out of packed blocks first, so that none of them sees another."""

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        return super().__call__([part for sample in samples for part in _unpacked(sample)])


def _unpacked(sample: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    lengths = sample.get("seq_lengths")
    if lengths is None:
        yield sample
        return
    start = 0
    for length in lengths:
        yield {name: sample[name][start : start + length] for name in ("input_ids", "labels")}
        start += length


class StreamedSamples(torch.utils.data.IterableDataset[Sample]):
    """Samples of a data set that can only be read forward, prepared in chunks while it is read."""

    def __init__(self, rows: Iterable[Row], prepare_chunk: Callable[[list[Row]], Sequence[Sample]]) -> None:
        self.rows, self.prepare_chunk = rows, prepare_chunk

    def __iter__(self) -> Iterator[Sample]:
        rows = iter(self.rows)
        while chunk := list(islice(rows, CHUNK_ROWS)):
            samples = self.prepare_chunk(chunk)
            yield from (samples[index] for index in range(len(samples)))
