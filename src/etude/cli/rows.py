"""The rows of a run: checked before anything slow begins, read, split, tokenized, and a few of them to be asked."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from etude.errors import ConfigError

if TYPE_CHECKING:
    from etude.cli.recipe import Recipe, Settings
    from etude.cli.samples import Samples
    from etude.cli.sources import Sources
    from etude.data import RowSet, TokenizedRows
    from etude.data.formats import Row
    from etude.data.streaming import StreamedRows

HUB_LIKE = re.compile(r"[\w.-]+/[\w.-]+")
LOOKED_THROUGH_ROWS = 64
"""To find prompts among."""


class Rows(NamedTuple):
    """What a run is trained and evaluated on."""

    train: TokenizedRows | StreamedRows
    evaluation: TokenizedRows | None
    format: str
    """Of the training rows."""
    asked: Sequence[Row]
    """Rows to take sample prompts from: held-out ones where there are any."""
    asked_format: str
    num_read: int | None = None
    """Training rows before those are left out that cannot be trained on; None where they are streamed."""


def require_sources(key: str, sources: Sources | None) -> None:
    """Raise ConfigError for data that is not there, before anything slow begins."""
    from etude.cli.sources import sources_of
    from etude.data.hub import PREFIX, is_hub_name, parse

    for source in sources_of(key, sources):
        if is_hub_name(source.path):
            parse(source.path)
        elif not Path(source.path).expanduser().exists():
            hint = f"; a data set on the Hub is {PREFIX}{source.path}" if HUB_LIKE.fullmatch(source.path) else ""
            raise ConfigError(f"'{source.path}': no such file or folder{hint}", field=key)


def require_streamable(chosen: Recipe, settings: Settings) -> None:
    """Raise ConfigError for what needs all rows before training, where they are read on the way."""
    from etude.cli.sources import sources_of

    if not chosen.streaming:
        return
    if chosen.training.get("max_steps", -1) <= 0:
        raise ConfigError("must be set where rows are streamed: nobody knows how many there are", field="max_steps")
    if any(source.weight != 1 for source in sources_of("data", chosen.data)):
        raise ConfigError("weights need all rows before training; leave them out, or streaming", field="data")
    if "eval_fraction" in settings and chosen.eval_fraction > 0:
        raise ConfigError("cannot hold out rows of a stream; give eval_data, or 0", field="eval_fraction")
    if chosen.training.get("dataloader_num_workers"):
        raise ConfigError("a stream is read by one process; set it to 0", field="dataloader_num_workers")


def read_sets(chosen: Recipe) -> tuple[RowSet | None, RowSet | None]:
    """Training rows (None where they are streamed) and held-out rows (None where there are none), not yet tokenized."""
    train_set, eval_set = (None, read_eval_data(chosen)) if chosen.streaming else read_data(chosen)
    return train_set, eval_set if eval_set is not None and len(eval_set) else None


def encode_sets(
    chosen: Recipe, train_set: RowSet | None, eval_set: RowSet | None, tokenizer: Any, **options: Any
) -> Rows:
    """The sets as tokens; `options` are those of `encode_rows`."""
    from etude.cli.sources import sources_of
    from etude.data import encode_rows
    from etude.data.streaming import StreamedRows

    eval_rows = encode_rows(eval_set, tokenizer, **options) if eval_set is not None else None
    if train_set is not None:
        train_rows = encode_rows(train_set, tokenizer, **options)
        source = eval_set if eval_set is not None else train_set
        asked = list(source[: max(LOOKED_THROUGH_ROWS, chosen.samples)])
        return Rows(train_rows, eval_rows, train_set.format, asked, source.format, len(train_set))
    paths = [source.path for source in sources_of("data", chosen.data)]
    stream = StreamedRows(paths, tokenizer, format=chosen.format, **options)
    if eval_set is not None:
        return Rows(stream, eval_rows, stream.format, eval_set, eval_set.format)
    return Rows(stream, None, stream.format, stream.first_rows(LOOKED_THROUGH_ROWS), stream.format)


def read_data(chosen: Recipe) -> tuple[RowSet, RowSet | None]:
    """Training and evaluation rows: two files, or one that is split by a hash of each row.

    Weights of sources count in training alone: every held-out row is there once.
    """
    from etude.cli.sources import sources_of
    from etude.data import read_rows, repeat_by_weight, split_by_hash

    sources = sources_of("data", chosen.data)
    rows = read_rows([source.path for source in sources], on_bad_row=chosen.on_bad_row, format=chosen.format)
    rejected = rows.rejected
    eval_set = read_eval_data(chosen)
    if eval_set is None and chosen.eval_fraction > 0:
        train_set, held_out = split_by_hash(rows, chosen.eval_fraction)
        rows, eval_set = (train_set, held_out) if len(train_set) else (rows, None)
    chosen_rows = repeat_by_weight(rows, sources)
    chosen_rows.rejected = rejected
    return chosen_rows, eval_set


def read_eval_data(chosen: Recipe) -> RowSet | None:
    """The rows of `eval_data`, where it is set; they may have another format than those of training."""
    from etude.data import read_rows

    return None if chosen.eval_data is None else read_rows(chosen.eval_data, on_bad_row=chosen.on_bad_row)


def build_samples(chosen: Recipe, tokenizer: Any, rows: Rows) -> Samples:
    """What is asked on the way: the prompts of the recipe, else those of the first rows."""
    from etude.cli.samples import Samples, given_prompts, prompts_of_rows, template_for
    from etude.cli.voice import Voice

    form = rows.asked_format if chosen.sample_prompts is None else rows.format
    voice = Voice(tokenizer, format=form, template=template_for(form, chosen.template))
    if not chosen.samples or not voice.stop_ids:
        prompts = []
    elif chosen.sample_prompts is not None:
        prompts = given_prompts(chosen.sample_prompts, voice)[: chosen.samples]
    else:
        prompts = prompts_of_rows(rows.asked, form, voice, chosen.samples)
    return Samples(prompts, voice, chosen.sample_tokens)
