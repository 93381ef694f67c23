"""Metrics for people and for files: the table on the screen, and the JSON that scripts read afterwards."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

from etude.errors import DataError


def readable(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The metrics with units: bytes as MB, runtimes as h:mm:ss.cc, operations as GF, other floats with four decimals."""
    return {name: _readable(name, value) for name, value in metrics.items()}


def _readable(name: str, value: Any) -> Any:
    if "_mem_" in name:
        return f"{int(value) >> 20}MB"
    if "_runtime" in name:
        return f"{timedelta(seconds=int(value))}.{int((value - int(value)) * 100):02d}"
    if name == "total_flos":
        return f"{int(value) >> 30}GF"
    return round(value, 4) if isinstance(value, float) else value


def table(title: str, metrics: Mapping[str, Any]) -> str:
    """The metrics in two aligned columns under a headline, by name."""
    cells = {name: str(value) for name, value in readable(metrics).items()}
    name_width = max(map(len, cells), default=0)
    value_width = max(map(len, cells.values()), default=0)
    lines = [f"  {name:<{name_width}} = {cells[name]:>{value_width}}" for name in sorted(cells)]
    return "\n".join([f"***** {title} metrics *****", *lines])


def save(folder: Path, split: str, metrics: Mapping[str, Any], *, combined: bool) -> None:
    """Write `<split>_results.json`; with `combined` also add the metrics to `all_results.json`.

    Raises:
        DataError: `all_results.json` is there and is no JSON object.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / f"{split}_results.json", dict(metrics))
    if combined:
        everything = folder / "all_results.json"
        _write(everything, {**_read(everything), **metrics})


def _read(file: Path) -> dict[str, Any]:
    if not file.exists():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise DataError(f"is no JSON ({error}); move it away to have it written anew", file=file) from error
    if not isinstance(content, dict):
        raise DataError("holds no metrics; move it away to have it written anew", file=file)
    return content


def _write(file: Path, metrics: dict[str, Any]) -> None:
    file.write_text(json.dumps(metrics, indent=4, sort_keys=True) + "\n", encoding="utf-8")
