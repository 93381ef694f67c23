"""What a run is going to do, on one screen: a plain record of it, and the record as rich renderables or plain lines.

Nothing here looks at a model or a dataset; whoever composes the run fills in the `RunSummary`.
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO

from etude.observe.amounts import counted, of_bytes, of_parameters, of_seconds, of_share
from etude.observe.console import printable

if TYPE_CHECKING:
    from rich.console import RenderableType

COLUMNS = 80
LABEL_COLUMNS = 10
LONGEST_LIST = 4


class Concern(NamedTuple):
    """Something that is likely to go wrong, and what to do about it."""

    problem: str
    fix: str


class Coverage(NamedTuple):
    """How far the adapter reaches into one class of weights. `layers` 0: weights outside the layers (embeddings, head)."""

    name: str
    adapted_layers: int
    layers: int
    adapted_matrices: int
    matrices: int

    def describe(self) -> str:
        if not self.layers:
            return f"{self.name} trained"
        share = (
            "" if self.adapted_matrices == self.matrices else f", {self.adapted_matrices} of {self.matrices} matrices"
        )
        return f"{self.name} {self.adapted_layers}/{self.layers} layers{share}"


@dataclass(frozen=True)
class AdapterSummary:
    """An adapter: `kind` as people say it (LoRA, DoRA, IA3), `settings` such as (("r", "32"), ("alpha", "32"))."""

    kind: str
    settings: tuple[tuple[str, str], ...]
    targets: tuple[str, ...]


@dataclass(frozen=True)
class DataSummary:
    """Rows in numbers; None where it is not known. Supervised tokens are those that count in the loss."""

    samples: int | None
    tokens: int | None = None
    supervised_tokens: int | None = None
    longest: int | None = None
    cut_off: int | None = None
    duplicates: int | None = None
    skipped: int = 0
    counted_samples: int | None = None
    """Where only the first rows were looked at: how many. The other numbers are theirs."""
    source: str = ""
    """Where they come from and their format, in words."""

    @property
    def supervised_share(self) -> float | None:
        """Supervised tokens per token."""
        return self.supervised_tokens / self.tokens if self.tokens and self.supervised_tokens is not None else None


@dataclass(frozen=True)
class Need:
    """Bytes that are needed, and what there is. `parts` say what the need is made of."""

    needed_bytes: float
    available_bytes: float | None
    parts: tuple[str, ...] = ()

    @property
    def is_met(self) -> bool:
        return self.available_bytes is None or self.needed_bytes <= self.available_bytes

    def describe(self, left: str) -> str:
        return ": ".join(self.lines(left))

    def lines(self, left: str) -> list[str]:
        there = "" if self.available_bytes is None else f" of {of_bytes(self.available_bytes)} {left}"
        return [f"about {of_bytes(self.needed_bytes)}{there}", *([", ".join(self.parts)] if self.parts else [])]


@dataclass(frozen=True)
class RunSummary:
    """A run before its first step."""

    model_name: str
    model_class: str
    total_parameters: int
    trainable_parameters: int
    weights: str
    """Number format of the frozen weights: `bfloat16`, `4-bit`."""
    adapter: AdapterSummary | None
    coverage: tuple[Coverage, ...]
    train: DataSummary
    eval_samples: int | None
    """None: there is no evaluation set; -1: a stream whose length is unknown."""
    per_device_batch: int
    accumulation: int
    processes: int
    steps: int
    steps_per_epoch: int | None
    first_step: int
    schedule: str
    learning_rate: float
    warmup_steps: int
    optimizer: str
    precision: str
    precision_note: str | None
    device: str
    path: str | None
    """`packed`, `general`, or None before the first batch was seen."""
    path_reasons: tuple[str, ...]
    memory: Need | None
    disk: Need | None
    seconds: float | None
    output_dir: str
    evaluates: bool = False
    saves: bool = True
    max_length: int | None = None
    kept_logits: Need | None = None
    """Of an evaluation whose metrics are computed from all logits at once."""

    @property
    def global_batch(self) -> int:
        """Rows of one update over all processes."""
        return self.per_device_batch * self.accumulation * self.processes

    @property
    def epochs(self) -> float | None:
        """Passes over the data."""
        return self.steps / self.steps_per_epoch if self.steps_per_epoch else None


def rows(summary: RunSummary) -> list[tuple[str, list[str]]]:
    """(label, lines of text) of the screen from top to bottom."""
    found = [
        ("model", _model(summary)),
        ("adapter", _adapter(summary)),
        ("train", _data(summary.train)),
        ("eval", [_eval(summary)]),
        ("batch", [_batch(summary)]),
        ("steps", [_steps(summary)]),
        ("schedule", [_schedule(summary)]),
        ("precision", [f"{summary.precision} on {summary.device}", *_given(summary.precision_note)]),
        ("path", _path(summary)),
        ("memory", summary.memory.lines("available") if summary.memory else []),
        ("disk", summary.disk.lines("free") if summary.disk else []),
        ("time", [_time(summary)]),
        ("output", [summary.output_dir]),
    ]
    return [(label, [printable(line) for line in lines]) for label, lines in found if lines]


def _model(summary: RunSummary) -> list[str]:
    parameters = of_parameters(summary.total_parameters)
    what = f"{summary.model_class}, {parameters} parameters in {summary.weights}"
    return [what] if summary.model_name == summary.model_class else [summary.model_name, what]


def _adapter(summary: RunSummary) -> list[str]:
    lines = []
    if summary.adapter is not None:
        settings = ", ".join(f"{name} {value}" for name, value in summary.adapter.settings)
        lines.append(f"{summary.adapter.kind} {settings}".strip() + _on(summary.adapter.targets))
    share = summary.trainable_parameters / max(summary.total_parameters, 1)
    lines.append(
        f"{summary.trainable_parameters:,} of {summary.total_parameters:,} parameters are trained ({share:.2%})"
    )
    if summary.coverage:
        reached = [part.describe() for part in summary.coverage if part.adapted_matrices]
        frozen = ", ".join(part.name for part in summary.coverage if not part.adapted_matrices)
        lines.append("; ".join(reached + ([f"frozen: {frozen}"] if frozen else [])))
    return lines


def _on(targets: Sequence[str]) -> str:
    if not targets:
        return ""
    more = f" and {len(targets) - LONGEST_LIST} more" if len(targets) > LONGEST_LIST + 1 else ""
    return f" on {', '.join(targets[:LONGEST_LIST] if more else targets)}{more}"


def _data(data: DataSummary) -> list[str]:
    source = _given(data.source)
    if data.samples is None:
        return ["a stream of unknown length", *source]
    if data.tokens is None:
        return [counted(data.samples, "sample"), *source]
    share = data.supervised_share
    first = f"{counted(data.samples, 'sample')}, {data.tokens:,} tokens"
    if data.counted_samples is not None and data.counted_samples < data.samples:
        first = f"{counted(data.samples, 'sample')}; the first {data.counted_samples:,} have {data.tokens:,} tokens"
    first += f", {of_share(share)} of them supervised" if share is not None else ""
    facts = [
        f"longest {data.longest:,}" if data.longest is not None else "",
        f"{data.cut_off:,} cut off" if data.cut_off is not None else "",
        f"{data.duplicates:,} duplicates" if data.duplicates is not None else "",
        f"{data.skipped:,} skipped as bad" if data.skipped else "",
    ]
    return [first, ", ".join(filter(None, facts)), *source]


def _eval(summary: RunSummary) -> str:
    if summary.eval_samples is None:
        return "no rows are held out"
    amount = "a stream of rows" if summary.eval_samples < 0 else counted(summary.eval_samples, "row")
    return f"{amount} held out" + ("" if summary.evaluates else ", not evaluated during training")


def _batch(summary: RunSummary) -> str:
    return (
        f"{summary.global_batch} rows per update = {summary.per_device_batch} per device x {summary.accumulation} "
        f"accumulated x {counted(summary.processes, 'process', 'processes')}"
    )


def _steps(summary: RunSummary) -> str:
    text = counted(summary.steps, "update")
    if summary.epochs is not None:
        text += (
            f" = {summary.epochs:.3g} epoch{'' if summary.epochs == 1 else 's'} of {summary.steps_per_epoch:,} updates"
        )
    return text + (f"; goes on after {summary.first_step:,}" if summary.first_step else "")


def _schedule(summary: RunSummary) -> str:
    warmup = f", {counted(summary.warmup_steps, 'step')} of warm-up" if summary.warmup_steps else ", no warm-up"
    return f"{summary.schedule} from {summary.learning_rate:.2g}{warmup}, {summary.optimizer}"


def _path(summary: RunSummary) -> list[str]:
    if summary.path is None:
        return ["decided on the first batch"]
    first, *more = summary.path_reasons or ("",)
    return [f"{summary.path}: {first}" if first else summary.path, *more]


def _time(summary: RunSummary) -> str:
    return "known after the first steps" if summary.seconds is None else f"about {of_seconds(summary.seconds)}"


def _given(text: str | None) -> list[str]:
    return [text] if text else []


def plain_lines(summary: RunSummary, concerns: Sequence[Concern], columns: int = COLUMNS) -> list[str]:
    """The screen as text of at most `columns` characters a line, without colour."""
    lines = []
    for label, texts in rows(summary):
        for index, text in enumerate(texts):
            head = label if index == 0 else ""
            lines += _hung(f"{head:<{LABEL_COLUMNS}}", text, columns)
    for concern in concerns:
        lines += _hung(f"{'warning':<{LABEL_COLUMNS}}", printable(concern.problem), columns)
        lines += _hung(f"{'  fix':<{LABEL_COLUMNS}}", printable(concern.fix), columns)
    return lines


def _hung(head: str, text: str, columns: int) -> list[str]:
    return textwrap.wrap(text, columns, initial_indent=head, subsequent_indent=" " * len(head)) or [head.rstrip()]


def renderable(summary: RunSummary, concerns: Sequence[Concern], title: str) -> RenderableType:
    """The screen for a terminal. Colours of the terminal's own palette only, so that it reads on light and on dark."""
    from rich.console import Group
    from rich.padding import Padding
    from rich.rule import Rule
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 1))
    table.add_column(width=LABEL_COLUMNS - 1, no_wrap=True)
    table.add_column(overflow="fold")
    unmet = {label for label, need in (("memory", summary.memory), ("disk", summary.disk)) if need and not need.is_met}
    for label, lines in rows(summary):
        style = "bold red" if label in unmet else ""
        table.add_row(Text(label, style="bold"), Text("\n".join(lines), style=style))
    parts: list[RenderableType] = [Rule(Text(title, style="bold"), style="default", align="left"), table]
    if concerns:
        warnings = Table.grid(padding=(0, 1))
        warnings.add_column(width=LABEL_COLUMNS - 1, no_wrap=True)
        warnings.add_column(overflow="fold")
        for concern in concerns:
            warnings.add_row(Text("warning", style="bold red"), Text(printable(concern.problem), style="red"))
            warnings.add_row(Text("    fix"), Text(printable(concern.fix)))
        parts.append(Padding(warnings, (1, 0, 0, 0)))
    parts.append(Rule(style="default"))
    return Group(*parts)


def show(
    summary: RunSummary, concerns: Sequence[Concern], title: str = "etude train", stream: TextIO | None = None
) -> None:
    """Print the screen: with colour on a terminal, as plain lines of 80 columns anywhere else."""
    stream = stream or sys.stdout
    if not stream.isatty():
        stream.write("\n".join(plain_lines(summary, concerns)) + "\n")
        stream.flush()
        return
    from rich.console import Console

    console: Any = Console(file=stream, highlight=False)
    console.print(renderable(summary, concerns, title), width=min(console.width, 100))
