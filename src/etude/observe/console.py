"""What a run says on the terminal: one readable line per log, and a progress bar where somebody is watching.

Text that comes from outside (names of metrics, texts among the logs) is shown with its control characters escaped, so
that a data set or a checkpoint cannot move the cursor, clear the screen or hide a line.
"""

from __future__ import annotations

import math
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TextIO

from etude.errors import require
from etude.observe.amounts import of_seconds, of_share
from etude.observe.throughput import NOTABLE_WAIT, ThroughputCallback

# Known quantities get a short name and the digits that people compare; the rest is shown under its own name.
_SHORT: Mapping[str, tuple[str, Callable[[float], str]]] = {
    "loss": ("loss", lambda value: f"{value:.4f}"),
    "learning_rate": ("lr", lambda value: f"{value:.1e}"),
    "grad_norm": ("grad", lambda value: f"{value:.2g}" if abs(value) < 10 else f"{value:.1f}"),
}
_SHOWN_ELSEWHERE = ("epoch", "step", "total_flos")
_FOR_PROGRAMS = ("_samples_per_second", "_steps_per_second")
"""Ends of names that would push the numbers people look for off the line; `metrics.jsonl` has them."""
SMOOTHING = 0.9
"""Weight of what was before in the loss that the bar shows; the lines show each loss as it is."""


def printable(text: str, max_length: int | None = None) -> str:
    """`text` with whatever a terminal would obey instead of show as an escape (`\\x1b`), cut to `max_length`."""
    if max_length is not None and len(text) > max_length:
        text = f"{text[:max_length]}... ({len(text)} characters)"
    return "".join(ch if ch.isprintable() else ch.encode("unicode_escape").decode("ascii") for ch in text)


def log_line(logs: Mapping[str, Any], step: int, max_steps: int, max_text_length: int = 100) -> str:
    """`step 10/300  epoch 0.10  loss 2.1234  lr 1.8e-04  grad 0.91`. The logs are not changed."""
    parts = [f"step {step}/{max_steps}" if max_steps > 0 else f"step {step}"]
    if "epoch" in logs:
        parts.append(f"epoch {_shown(logs['epoch'], max_text_length, lambda value: f'{value:.2f}')}")
    for name, value in logs.items():
        if name not in _SHOWN_ELSEWHERE and not name.endswith(_FOR_PROGRAMS):
            short, digits = _SHORT.get(name, (printable(name, max_text_length), lambda value: f"{value:.4g}"))
            parts.append(f"{short} {_shown(value, max_text_length, digits)}")
    return "  ".join(parts)


def speed_words(throughput: ThroughputCallback | None) -> list[str]:
    """`1,234 tok/s`, `2 min left`, `3.2 GiB`, `padding -43%`: as many as are known, the most wanted first."""
    if throughput is None or not throughput.figures:
        return []
    figures, words = throughput.figures, []
    if figures.get("waiting_for_data", 0.0) >= NOTABLE_WAIT:
        words.append(f"waits for data {of_share(figures['waiting_for_data'])}")
    if "tokens_per_second" in figures:
        words.append(f"{figures['tokens_per_second']:,.0f} tok/s")
    if throughput.seconds_left is not None and throughput.seconds_left >= 1:
        words.append(f"{of_seconds(throughput.seconds_left)} left")
    if "memory_gib" in figures:
        words.append(f"{figures['memory_gib']:.1f} GiB")
    if figures.get("padding_avoided"):
        words.append(f"padding -{of_share(figures['padding_avoided'])}")
    return words


def extended(line: str, words: Sequence[str], columns: int | None) -> str:
    """`line` with as many of `words` behind it as fit into `columns` (all of them where that is None)."""
    for word in words:
        longer = f"{line}  {word}"
        if columns is not None and len(longer) > columns:
            break
        line = longer
    return line


def _shown(value: Any, max_text_length: int, digits: Callable[[float], str]) -> str:
    if isinstance(value, float) and math.isfinite(value):
        return digits(value)
    return printable(str(value), max_text_length)


class LineWriter:
    """Writes one plain line per log, once per machine.

    Args:
        stream: where to; by default whatever `sys.stdout` is at that moment.
        max_str_len: texts among the logs are cut to this length.
        throughput: what measures the speed that a line ends with; none by default.
    """

    def __init__(
        self, stream: TextIO | None = None, max_str_len: int = 100, throughput: ThroughputCallback | None = None
    ) -> None:
        self.stream = stream
        self.max_str_len = max_str_len
        self.throughput = throughput

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        if state.is_local_process_zero and logs:
            line = log_line(logs, state.global_step, state.max_steps, self.max_str_len)
            self.write(extended(line, speed_words(self.throughput), self._columns()))

    def _columns(self) -> int | None:
        """The width of the terminal that lines go to; None where they go into a file."""
        is_terminal = (self.stream or sys.stdout).isatty()
        return shutil.get_terminal_size().columns if is_terminal else None

    def write(self, line: str) -> None:
        """Show a line that is safe to show."""
        stream = self.stream or sys.stdout
        stream.write(f"{line}\n")
        stream.flush()


class PrinterCallback(LineWriter):
    """One plain line per log, and no bar."""


class ProgressCallback(LineWriter):
    """A progress bar with steps, smoothed loss, learning rate, speed and time left, and the lines of `PrinterCallback`.

    There is no bar, only lines, where `args.disable_tqdm` is set or the bar would not go to a terminal.

    Args:
        max_str_len: texts among the logs are cut to this length.
        stream: where the lines go; by default whatever `sys.stdout` is at that moment.
        bar_stream: where the bars go; by default `sys.stderr`.
        throughput: what measures the speed that is shown; none by default.
    """

    def __init__(
        self,
        max_str_len: int = 100,
        stream: TextIO | None = None,
        bar_stream: TextIO | None = None,
        throughput: ThroughputCallback | None = None,
    ) -> None:
        super().__init__(stream, max_str_len, throughput)
        self.bar_stream = bar_stream
        self._loss = SmoothedLoss()
        self.training_bar: Any = None
        self.prediction_bar: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero and self._has_audience(args):
            # A resumed run starts in the middle: its rate, and so the time left, counts only the steps of this session.
            self._loss = SmoothedLoss()
            self.training_bar = self._bar(total=state.max_steps, initial=state.global_step, unit="step")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.training_bar is not None:
            self.training_bar.update(state.global_step - self.training_bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        super().on_log(args, state, control, logs=logs, **kwargs)
        if self.training_bar is not None and logs and "loss" in logs:
            shown = {"loss": self._loss.after(logs["loss"]), "learning_rate": logs.get("learning_rate")}
            words = [
                f"{_SHORT[name][0]} {_shown(value, 20, _SHORT[name][1])}"
                for name, value in shown.items()
                if value is not None
            ]
            speed = [word for word in speed_words(self.throughput) if word.endswith("tok/s")]
            self.training_bar.set_postfix_str(" ".join(words + speed), refresh=False)

    def on_prediction_step(
        self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero or not self._has_audience(args):
            return
        if self.prediction_bar is None:
            self.prediction_bar = self._bar(
                total=_length(eval_dataloader), unit="batch", desc="evaluating", leave=False
            )
        self.prediction_bar.update(1)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._close_prediction_bar()

    def on_predict(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._close_prediction_bar()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._close_prediction_bar()
        if self.training_bar is not None:
            self.training_bar.close()
            self.training_bar = None

    def write(self, line: str) -> None:
        if self.training_bar is None and self.prediction_bar is None:
            super().write(line)
        else:
            bar = self.training_bar if self.training_bar is not None else self.prediction_bar
            bar.write(line, file=self.stream or sys.stdout)

    def _has_audience(self, args: Any) -> bool:
        return not getattr(args, "disable_tqdm", False) and (self.bar_stream or sys.stderr).isatty()

    def _bar(self, **settings: Any) -> Any:
        tqdm: Any = require("tqdm", purpose="a progress bar")
        return tqdm.tqdm(file=self.bar_stream or sys.stderr, dynamic_ncols=True, **settings)

    def _close_prediction_bar(self) -> None:
        if self.prediction_bar is not None:
            self.prediction_bar.close()
            self.prediction_bar = None


class SmoothedLoss:
    """An exponential mean that is right from its first value on. Values that are not finite are passed through."""

    def __init__(self) -> None:
        self._sum, self._weight = 0.0, 0.0

    def after(self, loss: Any) -> Any:
        if not isinstance(loss, (int, float)) or not math.isfinite(loss):
            return loss
        self._sum = SMOOTHING * self._sum + (1 - SMOOTHING) * loss
        self._weight = SMOOTHING * self._weight + (1 - SMOOTHING)
        return self._sum / self._weight


def _length(loader: Any) -> int | None:
    """Batches of a loader, None where it cannot know (a stream)."""
    try:
        return len(loader)
    except TypeError:
        return None
