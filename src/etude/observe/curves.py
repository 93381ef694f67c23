"""Curves of a run as inline SVG (always) and as a PNG (where pillow is installed)."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from typing import Any, NamedTuple

from etude.errors import MissingDependencyError, require
from etude.observe.console import printable

SMOOTHING = 0.8
MOST_POINTS = 1000
"""More than a screen has columns for; longer curves are thinned out."""


class Curve(NamedTuple):
    """One line: its name, its (step, value) points, and the number of its colour."""

    name: str
    points: tuple[tuple[float, float], ...]
    colour: int = 0
    is_faint: bool = False
    has_dots: bool = False


@dataclass(frozen=True)
class Chart:
    """Curves over the same steps."""

    title: str
    curves: tuple[Curve, ...]
    width: int = 720
    height: int = 280


def charts_of(log_history: Iterable[Mapping[str, Any]]) -> list[Chart]:
    """Loss (with the evaluations), learning rate and gradient norm, as far as the log has them: the loss from its first
    value on, the others once they are curves."""
    history = list(log_history)
    loss = _points(history, "loss")
    curves = []
    if loss:
        is_long = len(loss) >= 20
        curves.append(Curve("training loss", loss, is_faint=is_long, has_dots=len(loss) < 20))
        if is_long:
            curves.append(Curve("smoothed", _smoothed(loss)))
    evaluations = sorted({name for row in history for name in row if name.startswith("eval") and name.endswith("loss")})
    curves += [
        Curve(name.replace("_", " "), _points(history, name), colour=1 + index % 2, has_dots=True)
        for index, name in enumerate(evaluations)
    ]
    charts = [Chart("Loss", tuple(curve for curve in curves if curve.points))]
    for name, title in (("learning_rate", "Learning rate"), ("grad_norm", "Gradient norm")):
        points = _points(history, name)
        if len(points) > 1:
            charts.append(Chart(title, (Curve(title.lower(), points),), width=352, height=190))
    return [chart for chart in charts if any(curve.points for curve in chart.curves)]


def _points(history: Sequence[Mapping[str, Any]], name: str) -> tuple[tuple[float, float], ...]:
    found = [
        (float(row["step"]), float(row[name]))
        for row in history
        if isinstance(row.get(name), (int, float)) and math.isfinite(row[name]) and "step" in row
    ]
    return tuple(found[:: -(-len(found) // MOST_POINTS) or 1])


def _smoothed(points: Sequence[tuple[float, float]]) -> tuple[tuple[float, float], ...]:
    total = weight = 0.0
    smooth = []
    for step, value in points:
        total, weight = SMOOTHING * total + (1 - SMOOTHING) * value, SMOOTHING * weight + (1 - SMOOTHING)
        smooth.append((step, total / weight))
    return tuple(smooth)


class Frame(NamedTuple):
    """Where values lie on a picture: the plot between `left`, `top`, `right` and `bottom`, its steps, and the ticks."""

    left: float
    top: float
    right: float
    bottom: float
    first_step: float
    last_step: float
    x_ticks: list[float]
    y_ticks: list[float]

    def x(self, step: float) -> float:
        return self.left + (step - self.first_step) / (self.last_step - self.first_step) * (self.right - self.left)

    def y(self, value: float) -> float:
        low, high = self.y_ticks[0], self.y_ticks[-1]
        return self.bottom - (value - low) / (high - low) * (self.bottom - self.top)


def frame_of(chart: Chart, scale: float = 1.0) -> Frame:
    """The place of the plot and round numbers for its axes."""
    steps = [step for curve in chart.curves for step, _ in curve.points]
    values = [value for curve in chart.curves for _, value in curve.points]
    first, last = (min(steps), max(steps)) if min(steps) < max(steps) else (min(steps) - 0.5, max(steps) + 0.5)
    round_steps = ticks(first, last, 6 if chart.width > 500 else 4, whole=True)
    return Frame(
        left=52 * scale,
        top=34 * scale,
        right=(chart.width - 20) * scale,
        bottom=(chart.height - 30) * scale,
        first_step=first,
        last_step=last,
        x_ticks=[step for step in round_steps if first <= step <= last],
        y_ticks=ticks(min(values), max(values), 5 if chart.height > 200 else 3),
    )


def ticks(low: float, high: float, count: int, *, whole: bool = False) -> list[float]:
    """About `count` round numbers whose first and last hold [low, high] between them."""
    if high <= low:
        low, high = low - (abs(low) * 0.1 or 0.5), high + (abs(high) * 0.1 or 0.5)
    raw = (high - low) / count
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * size for factor in (1, 2, 2.5, 5, 10) if factor * size >= raw * 0.999)
    if whole:
        step = max(1.0, float(math.ceil(step)))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, max(last, first + 1) + 1)]


def label_of(value: float) -> str:
    """`0`, `0.25`, `1,200`, `2e-4`."""
    if value == 0:
        return "0"
    if abs(value) < 1e-3:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def svg(chart: Chart) -> str:
    """The chart as an `<svg>` element; its colours are the classes `c0`, `c1`, `c2`, `grid` and `label` of the page."""
    frame = frame_of(chart)
    parts = [
        f'<svg viewBox="0 0 {chart.width} {chart.height}" role="img" aria-label="{_words(chart.title)}">',
        f'<text class="title" x="{frame.left:.0f}" y="18">{_words(chart.title)}</text>',
    ]
    for value in frame.y_ticks:
        y = frame.y(value)
        parts.append(f'<line class="grid" x1="{frame.left}" x2="{frame.right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(
            f'<text class="label" text-anchor="end" x="{frame.left - 6}" y="{y + 4:.1f}">{label_of(value)}</text>'
        )
    for value in frame.x_ticks:
        parts.append(
            f'<text class="label" text-anchor="middle" x="{frame.x(value):.1f}" y="{chart.height - 10}">'
            f"{label_of(value)}</text>"
        )
    parts.append(f'<text class="label" text-anchor="end" x="{frame.left - 6}" y="{chart.height - 10}">step</text>')
    for curve in chart.curves:
        parts += _svg_curve(curve, frame)
    if len(chart.curves) > 1:
        parts += _svg_legend(chart, frame)
    return "".join([*parts, "</svg>"])


def _words(text: str) -> str:
    """A name as it may stand in the page; names of evaluation sets come from outside."""
    return html.escape(printable(text, 40))


def _svg_curve(curve: Curve, frame: Frame) -> list[str]:
    places = [(frame.x(step), frame.y(value)) for step, value in curve.points]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    kind = f"c{curve.colour}" + (" faint" if curve.is_faint else "")
    parts = [f'<polyline class="line {kind}" points="{line}"/>']
    if curve.has_dots or len(places) == 1:
        parts += [
            f'<circle class="dot {kind}" cx="{x:.1f}" cy="{y:.1f}" r="3"><title>step {step:g}: {value:.4g}</title></circle>'
            for (x, y), (step, value) in zip(places, curve.points, strict=True)
        ]
    return parts


def _svg_legend(chart: Chart, frame: Frame) -> list[str]:
    parts, right = [], frame.right
    for curve in reversed(chart.curves):
        width = 7 * len(printable(curve.name, 40)) + 26
        kind = f"c{curve.colour}" + (" faint" if curve.is_faint else "")
        parts.append(
            f'<line class="line {kind}" x1="{right - width}" x2="{right - width + 16}" y1="14" y2="14"/>'
            f'<text class="label" x="{right - width + 21}" y="18">{_words(curve.name)}</text>'
        )
        right -= width + 10
    return parts


PNG_SCALE = 2
PNG_COLOURS = ((37, 99, 235), (217, 89, 4), (5, 131, 90))
PNG_INK, PNG_GRID = (68, 68, 68), (225, 225, 225)


def png(chart: Chart) -> bytes | None:
    """The chart on white, at twice its size; None where pillow is not installed."""
    try:
        image_module: Any = require("PIL.Image", purpose="loss.png", install="pip install pillow")
        draw_module: Any = require("PIL.ImageDraw", purpose="loss.png", install="pip install pillow")
        font_module: Any = require("PIL.ImageFont", purpose="loss.png", install="pip install pillow")
    except MissingDependencyError:
        return None
    scale = PNG_SCALE
    image = image_module.new("RGB", (chart.width * scale, chart.height * scale), "white")
    draw, frame = draw_module.Draw(image), frame_of(chart, scale)
    font, title_font = font_module.load_default(size=11 * scale), font_module.load_default(size=14 * scale)
    draw.text((frame.left, 18 * scale), chart.title, fill=PNG_INK, font=title_font, anchor="ls")
    for value in frame.y_ticks:
        y = frame.y(value)
        draw.line([(frame.left, y), (frame.right, y)], fill=PNG_GRID, width=scale)
        draw.text((frame.left - 6 * scale, y), label_of(value), fill=PNG_INK, font=font, anchor="rm")
    for value in frame.x_ticks:
        place = (frame.x(value), (chart.height - 10) * scale)
        draw.text(place, label_of(value), fill=PNG_INK, font=font, anchor="ms")
    draw.text((frame.left - 6 * scale, (chart.height - 10) * scale), "step", fill=PNG_INK, font=font, anchor="rs")
    for curve in chart.curves:
        colour = _png_colour(curve)
        places = [(frame.x(step), frame.y(value)) for step, value in curve.points]
        if len(places) > 1:
            draw.line(places, fill=colour, width=scale if curve.is_faint else 2 * scale, joint="curve")
        for x, y in places if curve.has_dots or len(places) == 1 else []:
            draw.ellipse([x - 3 * scale, y - 3 * scale, x + 3 * scale, y + 3 * scale], fill=colour)
    right = frame.right
    for curve in reversed(chart.curves if len(chart.curves) > 1 else ()):
        name = printable(curve.name, 40)
        width = font.getlength(name)
        draw.text((right - width, 18 * scale), name, fill=PNG_INK, font=font, anchor="ls")
        line = [(right - width - 22 * scale, 14 * scale), (right - width - 6 * scale, 14 * scale)]
        draw.line(line, fill=_png_colour(curve), width=2 * scale)
        right -= width + 36 * scale
    written = BytesIO()
    image.save(written, format="PNG", optimize=True)
    return written.getvalue()


def _png_colour(curve: Curve) -> tuple[int, ...]:
    colour = PNG_COLOURS[curve.colour]
    return tuple((2 * 255 + part) // 3 for part in colour) if curve.is_faint else colour


def loss_chart(log_history: Iterable[Mapping[str, Any]]) -> Chart | None:
    """The loss alone, for `loss.png`; None where none was logged."""
    charts = [chart for chart in charts_of(log_history) if chart.title == "Loss"]
    return replace(charts[0], width=900, height=420) if charts else None
