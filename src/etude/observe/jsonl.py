"""`metrics.jsonl`: every log of a run as one line of JSON, readable while the run goes on.

A row is the log plus the step it belongs to: `{"step": 10, "loss": 2.1, "learning_rate": 0.00018, "epoch": 0.1}`. The file
has each step once, whatever happened: a resumed run first drops the rows that came after the checkpoint it resumes from.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from etude.observe.throughput import ThroughputCallback

logger = logging.getLogger(__name__)

FILE_NAME = "metrics.jsonl"


class JsonlCallback:
    """Appends each log to a file, line by line, from one process.

    Args:
        path: the file; by default `metrics.jsonl` in `args.output_dir`.
        throughput: what measures the speed that a row of the training loss holds as well; none by default.
    """

    def __init__(self, path: str | Path | None = None, throughput: ThroughputCallback | None = None) -> None:
        self.path = Path(path) if path is not None else None
        self.has_failed = False
        self.throughput = throughput

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            known = sum(entry.get("step") == state.global_step for entry in state.log_history)
            rewind(self._place(args), state.global_step, known if state.global_step > 0 else None)

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or not logs:
            return
        path = self._place(args)
        extra = self.throughput.figures if self.throughput is not None else {}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            append(path, row({**extra, **logs}, state.global_step) + "\n")
        except OSError as error:  # a full disk must not cost the run
            if not self.has_failed:
                logger.warning("%s: a row could not be written, training goes on without it: %s", path, error)
            self.has_failed = True

    def _place(self, args: Any) -> Path:
        return self.path or Path(args.output_dir) / FILE_NAME


def append(path: Path, line: str) -> None:
    """Add a line, or nothing: what a full disk has taken of it is cut off again."""
    # Opened anew for each row: a killed run leaves nothing in a buffer, and an evaluation without training no open file.
    with path.open("ab", buffering=0) as file:
        size = file.tell()
        try:
            remaining = memoryview(line.encode())
            while remaining:
                remaining = remaining[file.write(remaining) :]
        except OSError:
            file.truncate(size)
            raise


def row(logs: Mapping[str, Any], step: int) -> str:
    """One line of valid JSON; a number that is not finite is null, what JSON has no type for is its text."""
    values = {name: _json_value(value) for name, value in logs.items()}
    return json.dumps({"step": step, **values}, allow_nan=False, default=str)


def rewind(path: Path, step: int, num_rows: int | None = None) -> None:
    """Make the file end with the first `num_rows` rows of `step`, or with all of them.

    Rows after them are dropped, and so is a line that a killed run has not finished. Where a new run (`step` 0) finds the
    rows of an earlier one, that file is kept under the next free name, `metrics.1.jsonl`.
    """
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    kept = [line for line in lines if _step_of(line) < step]
    kept += [line for line in lines if _step_of(line) == step][:num_rows]
    if len(kept) == len(lines):
        return
    if step == 0:
        path.rename(_free_name(path))
        return
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
    os.replace(partial, path)  # noqa: PTH105 - the old rows stay until the new file is whole


def _step_of(line: str) -> float:
    """The step of a row, infinity for a line that is no row."""
    try:
        content = json.loads(line)
    except json.JSONDecodeError:
        return math.inf
    step = content.get("step") if isinstance(content, dict) else None
    return step if isinstance(step, int) else math.inf


def _free_name(path: Path) -> Path:
    number = 1
    while (candidate := path.with_name(f"{path.stem}.{number}{path.suffix}")).exists():
        number += 1
    return candidate


def _json_value(value: Any) -> Any:
    if not isinstance(value, (bool, int, float, str)) and callable(getattr(value, "item", None)):
        value = value.item()  # a number of numpy or torch
    return None if isinstance(value, float) and not math.isfinite(value) else value
