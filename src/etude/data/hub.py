"""Data sets of the Hugging Face Hub, read through `datasets`, and only where `hub:` asks for it.

    hub:OWNER/NAME                       its split `train`
    hub:OWNER/NAME:test                  another split, or a part of one: `:train[:1000]`
    hub:OWNER/NAME/CONFIG:train@REVISION  with the name of a configuration, and a branch, tag or commit

What is complete in the local cache is taken from there. Code that comes with a data set is never executed: `datasets`
has no way to any more, and older versions that had one are told not to.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from etude.errors import ConfigError, DataError, require

PREFIX = "hub:"
DEFAULT_SPLIT = "train"

_NAME = re.compile(
    r"hub:(?P<repository>\w[\w.-]*(?:/\w[\w.-]*)?)(?:/(?P<config>[\w.-]+))?(?::(?P<split>[^@\s]+))?(?:@(?P<revision>[\w./-]+))?"
)


class HubSource(NamedTuple):
    """What is to be read of a data set on the Hub."""

    repository: str
    config: str | None
    split: str
    revision: str | None


def is_hub_name(source: object) -> bool:
    """Whether a source is on the Hub, by how it is written."""
    return str(source).startswith(PREFIX)


def parse(name: str) -> HubSource:
    """
    Raises:
        ConfigError: `name` is not written as the head of this file says.
    """
    found = _NAME.fullmatch(name)
    if found is None:
        raise ConfigError(f"expected hub:OWNER/NAME[/CONFIG][:SPLIT][@REVISION], got '{name}'", field="data")
    return HubSource(found["repository"], found["config"], found["split"] or DEFAULT_SPLIT, found["revision"])


def read_hub_rows(name: str, *, streaming: bool = False, skip: int = 0) -> Iterator[tuple[int, Any]]:
    """(number from 1, row) of a data set on the Hub.

    Args:
        streaming: fetch rows while they are read; otherwise the whole split is downloaded first.
        skip: rows to pass over.

    Raises:
        ConfigError: there is a folder of that name here, which `datasets` would read instead.
        DataError: it cannot be had; says whether the network or the name is to blame.
    """
    source = parse(name)
    if Path(source.repository).exists():
        raise ConfigError(f"{source.repository} is a folder here; to read that, leave out {PREFIX}", field="data")
    datasets: Any = require("datasets", purpose="reading from the Hub", install="pip install 'etude[datasets]'")
    number = skip
    try:
        rows = datasets.load_dataset(
            source.repository, source.config, split=source.split, revision=source.revision, streaming=streaming
        )
        rows = rows.skip(skip) if skip else rows
        for number, row in enumerate(rows, start=skip + 1):
            yield number, row
    except DataError:
        raise
    except Exception as error:  # each of datasets, huggingface_hub and their network libraries has errors of its own
        line = number + 1 if number > skip else None
        raise DataError(f"{_blame(error)}: {_first_line(error)}", file=name, line=line) from error


def _blame(error: Exception) -> str:
    names = {kind.__name__ for kind in type(error).__mro__}
    if names & {"OfflineModeIsEnabled", "ConnectionError", "ConnectError", "NetworkError", "TransportError", "Timeout"}:
        return (
            "the Hub cannot be reached, and the data set is not complete in the local cache; download its files where there "
            "is a network and give their folder as data"
        )
    if names & {"DatasetNotFoundError", "RepositoryNotFoundError", "GatedRepoError"}:
        return "there is no such data set on the Hub, or it needs a login (hf auth login)"
    return "expected a data set of the Hub, it cannot be read"


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
