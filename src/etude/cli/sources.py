"""`data:` of a recipe: one path, or several of which each may have a weight."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from etude.errors import ConfigError, nearest

Sources = str | Sequence[str | dict[str, Any]]


class Source(NamedTuple):
    """A file or folder of rows, and how often each of its rows is trained on in an epoch."""

    path: str
    weight: float = 1.0


def sources_of(key: str, value: Sources | None) -> list[Source]:
    """Every source that a recipe names.

    Raises:
        ConfigError: an entry is neither a path nor `{path: P, weight: W}` with a positive weight.
    """
    entries = [value] if isinstance(value, str) else value or []
    return [Source(entry) if isinstance(entry, str) else _weighted(key, entry) for entry in entries]


def with_paths(value: Sources | None, change: Callable[[str], str]) -> Sources | None:
    """The same sources, every path changed."""
    if value is None or isinstance(value, str):
        return value and change(value)
    return [change(entry) if isinstance(entry, str) else {**entry, "path": change(entry["path"])} for entry in value]


def _weighted(key: str, entry: dict[str, Any]) -> Source:
    for name in entry:
        if name not in ("path", "weight"):
            guess = nearest(name, ("path", "weight"))
            hint = f"; did you mean '{guess}'?" if guess else ""
            raise ConfigError(f"a source has path and weight, not '{name}'{hint}", field=key)
    path, weight = entry.get("path"), entry.get("weight", 1.0)
    if not isinstance(path, str) or not path:
        raise ConfigError(f"a source needs a path, got {entry}", field=key)
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not (math.isfinite(weight) and weight > 0):
        raise ConfigError(f"the weight of {path} must be a positive number, got {weight!r}", field=key)
    return Source(path, float(weight))
