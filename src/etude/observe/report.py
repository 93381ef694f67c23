"""`report.html`: a finished run in one file that needs nothing else, and `loss.png`.

Every text is escaped, whoever wrote it: names, rows of data and what a model said may hold markup or control codes. The page
has no script, and its content policy allows none. Known secrets are taken out of the finished page.
"""

from __future__ import annotations

import html
import os
import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any, NamedTuple

from etude.observe.console import printable
from etude.observe.curves import charts_of, loss_chart, png, svg
from etude.observe.start_screen import Concern

REPORT_NAME, PICTURE_NAME = "report.html", "loss.png"
SECRET_NAME = re.compile(r"(^|_)(token|secret|password|passwd|credentials?|api_?key|access_?key)$", re.IGNORECASE)
SHORTEST_SECRET = 6
REMOVED = "[removed]"


class ShownSample(NamedTuple):
    """What the model said to a prompt before and after training; `expected` may be empty."""

    prompt: str
    before: str
    after: str
    expected: str = ""


class Ending(NamedTuple):
    """Why a run ended before its time, and the way on as a (caption, code) pair."""

    what: str
    way_on: tuple[str, str]


@dataclass(frozen=True)
class Report:
    """What the page shows, from top to bottom."""

    title: str
    subtitle: str
    figures: Sequence[tuple[str, str]]
    """(label, value) of the tiles."""
    log_history: Sequence[Mapping[str, Any]]
    happened: Sequence[str]
    """What went wrong on the way, and restarts."""
    concerns: Sequence[Concern]
    run: Sequence[tuple[str, Sequence[str]]]
    """(label, lines): the start screen's facts."""
    settings: Mapping[str, Any]
    environment: Mapping[str, str]
    usage: Sequence[tuple[str, str]]
    """(caption, code)."""
    samples: Sequence[ShownSample] = ()
    skipped_rows: Sequence[str] = ()
    ending: Ending | None = None
    """None for a run that ended as it should."""


def write(report: Report, folder: str | Path, secrets: Iterable[str] = ()) -> list[str]:
    """Write `report.html` into `folder`, and `loss.png` where pillow is installed.

    Args:
        secrets: further texts that must not be in the page; those of the environment are known here.

    Returns:
        What could not be written, as lines for the user.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / REPORT_NAME, without_secrets(page(report), secrets).encode())
    chart = loss_chart(report.log_history)
    picture = png(chart) if chart is not None else None
    if picture is not None:
        write_atomically(folder / PICTURE_NAME, picture)
    elif chart is not None:
        return [f"{PICTURE_NAME} is not written, it needs pillow: pip install pillow ({REPORT_NAME} has the curves)"]
    return []


def write_atomically(file: Path, content: bytes) -> None:
    """Write a whole file or nothing: a reader never sees half of it."""
    handle, partial = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
        umask = os.umask(0)
        os.umask(umask)
        Path(partial).chmod(0o666 & ~umask)  # as an ordinary file would be; temporary ones are private
        Path(partial).replace(file)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise


def page(report: Report) -> str:
    """The whole page as text."""
    template = Path(__file__).with_name("report_template.html").read_text(encoding="utf-8")
    sections = [
        f"<h1>{text(report.title)}</h1><p class='soft'>{text(report.subtitle)}</p>",
        _ending(report.ending),
        _tiles(report.figures),
        f'<div class="charts">{"".join(map(svg, charts_of(report.log_history)))}</div>',
        _samples(report.samples),
        _happened(report),
        _section("The run", _table((label, "\n".join(lines)) for label, lines in report.run)),
        _section("Using the adapter", "".join(f"<p>{text(c)}</p><pre>{text(code)}</pre>" for c, code in report.usage)),
        _section("Environment", _table(report.environment.items())),
        _folded("Settings", f"all {len(report.settings)} settings", _table(public(report.settings).items())),
    ]
    return Template(template).substitute(title=text(report.title), body="\n".join(filter(None, sections)))


def text(value: Any) -> str:
    """`value` as it is to be read: markup escaped, control characters visible, line breaks kept."""
    lines = str(value).replace("\r\n", "\n").split("\n")
    return html.escape("\n".join(printable(line.replace("\t", "    ")) for line in lines))


def _section(title: str, content: str) -> str:
    return f"<h2>{text(title)}</h2>{content}" if content else ""


def _folded(title: str, summary: str, content: str) -> str:
    return _section(title, f"<details><summary>{text(summary)}</summary>{content}</details>" if content else "")


def _ending(ending: Ending | None) -> str:
    if ending is None:
        return ""
    caption, code = ending.way_on
    way_on = f"<p>{text(caption)}</p>" + (f"<pre>{text(code)}</pre>" if code else "")
    return f'<div class="ending"><p><b>{text(ending.what)}</b></p>{way_on}</div>'


def _tiles(figures: Iterable[tuple[str, str]]) -> str:
    tiles = [f'<div class="tile"><span>{text(label)}</span><b>{text(value)}</b></div>' for label, value in figures]
    return f'<div class="tiles">{"".join(tiles)}</div>' if tiles else ""


def _table(pairs: Iterable[tuple[Any, Any]]) -> str:
    rows = [f"<tr><th>{text(name)}</th><td>{text(value)}</td></tr>" for name, value in pairs]
    return f'<div class="scroll"><table>{"".join(rows)}</table></div>' if rows else ""


def _samples(samples: Sequence[ShownSample]) -> str:
    if not samples:
        return ""
    columns = ["prompt", "before", "after", *(["expected"] if any(sample.expected for sample in samples) else [])]
    head = "".join(f"<th>{column}</th>" for column in columns)
    rows = [
        "<tr>" + "".join(f"<td><div>{text(getattr(sample, column))}</div></td>" for column in columns) + "</tr>"
        for sample in samples
    ]
    table = f'<div class="scroll"><table class="samples"><tr>{head}</tr>{"".join(rows)}</table></div>'
    return _section("Before and after", table)


def _happened(report: Report) -> str:
    lines = [f"<li>{text(line)}</li>" for line in report.happened]
    lines += [
        f'<li>warned at the start: <span class="warn">{text(concern.problem)}</span>; {text(concern.fix)}</li>'
        for concern in report.concerns
    ]
    if report.skipped_rows:
        shown = report.skipped_rows[:20]
        more = f"\n... and {len(report.skipped_rows) - len(shown):,} more" if len(report.skipped_rows) > 20 else ""
        lines.append(
            f"<li>{len(report.skipped_rows):,} bad rows were skipped<pre>{text(chr(10).join(shown) + more)}</pre></li>"
        )
    content = f"<ul>{''.join(lines)}</ul>" if lines else "<p>Nothing: one start, no row skipped, no step repeated.</p>"
    return _section("What happened on the way", content)


def public(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings without those that hold secrets, also inside of mappings; what was never set is left out."""
    return {
        str(name): public(value) if isinstance(value, Mapping) else value
        for name, value in settings.items()
        if value is not None and not SECRET_NAME.search(str(name))
    }


def without_secrets(content: str, secrets: Iterable[str] = ()) -> str:
    """`content` without the given secrets and without the values of environment variables whose names say that they
    are secret."""
    known = {value for name, value in os.environ.items() if SECRET_NAME.search(name)} | set(secrets)
    for secret in sorted((value for value in known if len(value) >= SHORTEST_SECRET), key=len, reverse=True):
        content = content.replace(text(secret), REMOVED)
    return content
