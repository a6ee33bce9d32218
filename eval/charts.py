"""The plots of the HTML report as SVG: text stays text, and colours are the page's own variables, light or dark.

Drawn 400 wide, a phone's width, and larger on larger screens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from eval.conclusion import is_torch, shape
from eval.wording import number, significant

WIDTH, HEIGHT, COLOURS = 400, 300, 8
_LEFT, _TOP, _BOTTOM = 46, 12, 38
# Of Δ ln perplexity: linear below, logarithmic above.
_LINEAR = 0.001


@dataclass(frozen=True)
class Axis:
    """A scale from values to 0..1, its ticks with their labels, and its title."""

    title: str
    place: Callable[[float], float]
    ticks: list[tuple[float, str]]


@dataclass(frozen=True)
class Line:
    """A named series: points (x, y), and the band (x, low, high) around it; `colour` is its number."""

    name: str
    colour: int
    points: list[tuple[float, float]]
    band: list[tuple[float, float, float]]


def tradeoff(report: dict, labels: dict, language: str) -> str:
    """Size against Δ ln perplexity; the area of a dot is proportional to tokens decoded a second."""
    rows = [row for row in report["artifacts"] if not is_torch(row)]
    sizes = [row["bytes"] / 1e6 for row in rows]
    deltas = [row["delta_ln_ppl"] for row in rows]
    errors = [row["delta_ln_ppl_stderr"] or 0 for row in rows]
    bottom = min(delta - error for delta, error in zip(deltas, errors, strict=True))
    top = max(*(delta + error for delta, error in zip(deltas, errors, strict=True)), 2 * _LINEAR)
    x_axis = _linear_axis(labels["size"], 0, max(sizes) * 1.08, language)
    y_axis = _symlog_axis(labels["delta"], bottom, top, language)
    speeds = [shape(row, "decode")["tokens_per_second"] for row in rows]
    parts, anchors = [], []
    for index, (row, size, delta, error, speed) in enumerate(zip(rows, sizes, deltas, errors, speeds, strict=True)):
        x, y = _x(x_axis.place(size), 14), _y(y_axis.place(delta))
        radius = 4 + 8 * math.sqrt(speed / max(speeds))
        low, high = _y(y_axis.place(delta - error)), _y(y_axis.place(delta + error))
        title = f"{row['name']}: {number(size, 1, language)} MB, Δ {number(delta, 4, language)}, {number(speed, 0, language)} tokens/s"
        parts.append(
            f'<g class="c{index % COLOURS}"><title>{escape(title)}</title><line x1="{x:.1f}" x2="{x:.1f}" y1="{low:.1f}" y2="{high:.1f}"/>'
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}"/></g>'
        )
        anchors.append((x, y, radius, row["name"], index % COLOURS))
    return _svg(labels["tradeoff"], [_frame(x_axis, y_axis, 14), *parts, *_names(anchors)])


def lines(title: str, series: Sequence[Line], x_axis: Axis, y_axis: Axis) -> str:
    """Curves with their bands, named at their right ends."""
    right = 108
    parts, ends = [], []
    for line in series:
        at = [(_x(x_axis.place(x), right), _y(y_axis.place(y))) for x, y in line.points]
        upper = [f"{_x(x_axis.place(x), right):.1f},{_y(y_axis.place(high)):.1f}" for x, _, high in line.band]
        lower = [f"{_x(x_axis.place(x), right):.1f},{_y(y_axis.place(low)):.1f}" for x, low, _ in reversed(line.band)]
        band = f'<polygon points="{" ".join(upper + lower)}"/>' if line.band else ""
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in at)
        dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.2"/>' for x, y in at)
        parts.append(
            f'<g class="c{line.colour}"><title>{escape(line.name)}</title>{band}<polyline points="{path}"/>{dots}</g>'
        )
        ends.append((at[-1][1], line))
    placed = _apart([y for y, _ in ends])
    for (y, line), label in zip(ends, placed, strict=True):
        x = WIDTH - right + 4
        parts.append(f'<path class="lead c{line.colour}" d="M{x},{y:.1f} L{x + 8},{label:.1f}"/>')
        parts.append(f'<text class="name c{line.colour}" x="{x + 11}" y="{label + 3.5:.1f}">{escape(line.name)}</text>')
    return _svg(title, [_frame(x_axis, y_axis, right), *parts])


def latency(report: dict, labels: dict, language: str) -> str:
    """Decode time against context, of every row."""
    series = []
    for index, row in enumerate(report["artifacts"]):
        points = [(item["position"], item["p50_ms"]) for item in row["decode"]]
        band = [(item["position"], *np.quantile(item["samples_ns"], [0.1, 0.9]) / 1e6) for item in row["decode"]]
        series.append(Line(row["name"], index % COLOURS, points, band))
    xs = [item["position"] for item in report["artifacts"][0]["decode"]]
    ys = [value for line in series for _, low, high in line.band for value in (low, high)]
    x_axis = _log_axis(labels["context"], min(xs), max(xs), [(x, number(x, 0, language)) for x in xs])
    y_axis = _log_axis(labels["ms"], min(ys), max(ys), _steps(min(ys), max(ys), language))
    return lines(labels["latency"], series, x_axis, y_axis)


def layers(report: dict, labels: dict, language: str) -> str | None:
    """Relative error of the keys against the layer; None where no row shows any."""
    rows = [
        (index, row) for index, row in enumerate(report["artifacts"]) if row.get("key_error") and any(row["key_error"])
    ]
    if not rows:
        return None
    series = [
        Line(
            row["name"],
            index % COLOURS,
            [(layer, max(error, 1e-9)) for layer, error in enumerate(row["key_error"])],
            [],
        )
        for index, row in rows
    ]
    ys = [y for line in series for _, y in line.points]
    count = len(series[0].points)
    every = max(1, count // 6)
    ticks = [(layer, str(layer)) for layer in range(0, count, every)]
    x_axis = Axis(labels["layer"], lambda x: x / max(count - 1, 1), ticks)
    y_axis = _log_axis(labels["error"], min(ys), max(ys), _steps(min(ys), max(ys), language))
    return lines(labels["layers"], series, x_axis, y_axis)


def _x(share: float, right: int) -> float:
    return _LEFT + share * (WIDTH - right - _LEFT)


def _y(share: float) -> float:
    return HEIGHT - _BOTTOM - share * (HEIGHT - _BOTTOM - _TOP)


def _linear_axis(title: str, low: float, high: float, language: str) -> Axis:
    step = 10 ** math.floor(math.log10(high - low))
    step = next(size for size in (step / 5, step / 2, step, 2 * step) if (high - low) / size <= 6)
    ticks = [step * index for index in range(math.ceil(low / step), math.floor(high / step) + 1)]
    digits = max(0, -math.floor(math.log10(step)))
    return Axis(
        title, lambda value: (value - low) / (high - low), [(tick, number(tick, digits, language)) for tick in ticks]
    )


def _symlog_axis(title: str, low: float, high: float, language: str) -> Axis:
    def squeeze(value: float) -> float:
        return math.asinh(value / _LINEAR)

    start, end = squeeze(low) - 0.5, squeeze(high) + 0.5
    wanted = [0.0, *(sign * 10.0**power for power in range(-3, 3) for sign in (-1, 1))]
    ticks = [(tick, significant(tick, language, 1)) for tick in sorted(wanted) if start <= squeeze(tick) <= end]
    return Axis(title, lambda value: (squeeze(value) - start) / (end - start), ticks)


def _log_axis(title: str, low: float, high: float, ticks: list[tuple[float, str]]) -> Axis:
    span = math.log(high / low) or 1.0
    return Axis(title, lambda value: math.log(max(value, low) / low) / span, ticks)


def _steps(low: float, high: float, language: str) -> list[tuple[float, str]]:
    """1, 2 and 5 times powers of ten between `low` and `high`; of ten alone where those are too many."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1, 2, 5), (1,)):
        ticks = [factor * 10.0**power for power in powers for factor in factors if low <= factor * 10.0**power <= high]
        if len(ticks) <= 7:
            break
    return [(tick, significant(tick, language, 1)) for tick in ticks]


def _frame(x_axis: Axis, y_axis: Axis, right: int) -> str:
    """Grid, ticks and titles."""
    parts = []
    for value, label in x_axis.ticks:
        x = _x(x_axis.place(value), right)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{HEIGHT - _BOTTOM}"/>')
        parts.append(
            f'<text class="tick" text-anchor="middle" x="{x:.1f}" y="{HEIGHT - _BOTTOM + 14}">{escape(label)}</text>'
        )
    for value, label in y_axis.ticks:
        y = _y(y_axis.place(value))
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" text-anchor="end" x="{_LEFT - 5}" y="{y + 3.5:.1f}">{escape(label)}</text>')
    middle = (_LEFT + WIDTH - right) / 2
    parts.append(f'<text class="axis" text-anchor="middle" x="{middle}" y="{HEIGHT - 6}">{escape(x_axis.title)}</text>')
    y = (HEIGHT - _BOTTOM + _TOP) / 2
    parts.append(
        f'<text class="axis" text-anchor="middle" transform="translate(11 {y}) rotate(-90)">{escape(y_axis.title)}</text>'
    )
    return "".join(parts)


def _names(anchors: list[tuple[float, float, float, str, int]]) -> list[str]:
    """A name beside each dot, on the side with more room, moved up or down from those that are there already."""
    parts, taken = [], []
    for x, y, radius, name, colour in sorted(anchors, key=lambda anchor: anchor[1]):
        width = 6.2 * len(name)
        left = x + radius + 4 + width > WIDTH - 4
        start = x - radius - 4 - width if left else x + radius + 4
        down = y
        while any(abs(down - other) < 12 and start < end and begin < start + width for begin, end, other in taken):
            down += 2
        taken.append((start, start + width, down))
        anchor = ' text-anchor="end"' if left else ""
        at = start + width if left else start
        parts.append(f'<text class="name c{colour}"{anchor} x="{at:.1f}" y="{down + 3.5:.1f}">{escape(name)}</text>')
    return parts


def _apart(wanted: list[float], gap: float = 12) -> list[float]:
    """Heights near `wanted`, in their order, no two nearer than `gap`, within the plot."""
    order = sorted(range(len(wanted)), key=wanted.__getitem__)
    placed = [0.0] * len(wanted)
    last = _TOP - gap
    for index in order:
        last = placed[index] = max(wanted[index], last + gap)
    over = last - (HEIGHT - _BOTTOM)
    limit = HEIGHT - _BOTTOM
    for index in reversed(order):
        if over > 0:
            placed[index] = min(placed[index], limit)
            limit = placed[index] - gap
    return placed


def _svg(title: str, parts: list[str]) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}" '
        f'xmlns="http://www.w3.org/2000/svg">{"".join(parts)}</svg>'
    )
