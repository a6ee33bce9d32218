"""Draw the plots of the HTML report as SVG. Text stays text, and colours are variables of the page, light or dark.

A plot is 400 wide, like a phone, and is scaled up on larger screens. Text width is estimated per character, rounded up,
because the reader's font is unknown.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from html import escape

import numpy as np

from cuantiza.core.pages import number, significant
from cuantiza.eval.report.schema import Measured, Row

WIDTH, HEIGHT = 400, 300
_TOP, _BOTTOM, _CHARACTER, _LINE = 26, 36, 7.2, 13
# The longest name in a plot, in characters. Longer ones are cut.
_LONGEST = 22
# The axis of Δ ln perplexity is nearly linear below this value, and nearly logarithmic above.
_LINEAR = 0.001
# Marks whose centres are nearer than this are moved apart, sideways.
_BESIDE = 7.0
# A mark's outline as corners (x, y) in radii; None is a circle. Every eight colours, the rows get the next shape.
_SHAPES: tuple[Sequence[tuple[float, float]] | None, ...] = (
    None,
    ((-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)),
    ((0, -1.25), (1.25, 0), (0, 1.25), (-1.25, 0)),
    ((0, -1.2), (1.15, 0.85), (-1.15, 0.85)),
    ((0, 1.2), (1.15, -0.85), (-1.15, -0.85)),
)


@dataclass(frozen=True)
class Axis:
    """A scale from values to 0..1, its ticks with their labels, and its title."""

    title: str
    place: Callable[[float], float]
    ticks: Sequence[tuple[float, str]]


@dataclass(frozen=True)
class Line:
    """A named series: points (x, y), and the band (x, low, high) around it; `colour` is the number of its colour."""

    name: str
    colour: int
    points: Sequence[tuple[float, float]]
    band: Sequence[tuple[float, float, float]]
    dashed: bool = False


@dataclass(frozen=True)
class Area:
    """Where a plot's axes lie in its drawing: from `left` to `right`."""

    x_axis: Axis
    y_axis: Axis
    left: float
    right: float

    def x(self, value: float) -> float:
        return self.left + self.x_axis.place(value) * (self.right - self.left)

    def y(self, value: float) -> float:
        return HEIGHT - _BOTTOM - self.y_axis.place(value) * (HEIGHT - _BOTTOM - _TOP)


@dataclass(frozen=True)
class Box:
    """A rectangle that text keeps clear of."""

    left: float
    right: float
    top: float
    bottom: float

    def meets(self, other: Box) -> bool:
        apart = self.right <= other.left or other.right <= self.left
        return not (apart or self.bottom <= other.top or other.bottom <= self.top)


@dataclass(frozen=True)
class Dot:
    """A named point of the trade-off, in the drawing's units."""

    name: str
    colour: int
    x: float
    y: float
    radius: float


def tradeoff(rows: Sequence[Measured], labels: dict, language: str) -> str:
    """Draw size against Δ ln perplexity. A dot's area is proportional to decoded tokens/s, down to a least size.

    Dots at one place are drawn side by side, and smaller ones above larger ones, so that none hides another. A row whose
    likelihoods are not finite has none.
    """
    errors = [row.delta_ln_ppl_stderr or 0 for row in rows]
    ends = [row.delta_ln_ppl + sign * error for row, error in zip(rows, errors, strict=True) for sign in (-1, 1)]
    finite = [end for end in ends if math.isfinite(end)]
    bottom, top = min(finite), max(2 * _LINEAR, *finite)
    x_axis = _linear_axis(labels["size_axis"], 0, max(row.bytes for row in rows) / 1e6 * 1.08, language)
    area = _area(x_axis, _symlog_axis(labels["delta_axis"], bottom, top, language), WIDTH - 8)
    speeds = [row.usual("decode").tokens_per_second for row in rows]
    dots = _side_by_side(
        [
            Dot(
                row.name,
                index,
                area.x(row.bytes / 1e6),
                area.y(row.delta_ln_ppl),
                max(3.0, 10 * math.sqrt(speed / max(speeds))),
            )
            for index, (row, speed) in enumerate(zip(rows, speeds, strict=True))
            if math.isfinite(row.delta_ln_ppl)
        ],
        area.right,
    )
    parts, taken = [], []
    for dot in sorted(dots, key=lambda dot: -dot.radius):
        row, error, speed = rows[dot.colour], errors[dot.colour], speeds[dot.colour]
        size, delta, radius = row.bytes / 1e6, row.delta_ln_ppl, dot.radius
        low, high = area.y(delta - error), area.y(delta + error)
        title = f"{row.name}: {number(size, 1, language)} MB, Δ {number(delta, 4, language)}, {number(speed, 0, language)} tokens/s"
        parts.append(
            f'<g class="c{dot.colour}"><title>{escape(title)}</title><line x1="{dot.x:.1f}" x2="{dot.x:.1f}" y1="{low:.1f}" y2="{high:.1f}"/>'
            f"{_mark(dot.colour, dot.x, dot.y, radius)}</g>"
        )
        taken.append(Box(dot.x - radius, dot.x + radius, dot.y - radius, dot.y + radius))
        taken.append(Box(dot.x - 1, dot.x + 1, high, low))
    plot = Box(area.left, WIDTH, _TOP, HEIGHT - _BOTTOM)
    return _svg(labels["tradeoff"], [_frame(area), *parts, *_names(dots, taken, plot)])


def lines(title: str, series: Sequence[Line], x_axis: Axis, y_axis: Axis) -> str:
    """Draw curves with their bands, and their names at the right ends."""
    names = [_short(line.name) for line in series]
    area = _area(x_axis, y_axis, WIDTH - 16 - _CHARACTER * max(map(len, names)))
    bands, curves = [], []
    for line in series:
        if line.band:
            edge = [(x, high) for x, _, high in line.band] + [(x, low) for x, low, _ in reversed(line.band)]
            points = " ".join(f"{area.x(x):.1f},{area.y(y):.1f}" for x, y in edge)
            bands.append(f'<g class="c{line.colour}"><polygon points="{points}"/></g>')
        at = [(area.x(x), area.y(y)) for x, y in line.points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in at)
        dots = "".join(_mark(line.colour, x, y, 2.2) for x, y in at)
        kind = f"c{line.colour} dashed" if line.dashed else f"c{line.colour}"
        curves.append(f'<g class="{kind}"><title>{escape(line.name)}</title><polyline points="{path}"/>{dots}</g>')
    ends = [area.y(line.points[-1][1]) for line in series]
    for line, name, y, label in zip(series, names, ends, _apart(ends), strict=True):
        x = area.right + 4
        curves.append(f'<path class="lead c{line.colour}" d="M{x:.1f},{y:.1f} L{x + 7:.1f},{label:.1f}"/>')
        curves.append(_text("name", x + 10, label + 4, name, line.colour))
    return _svg(title, [_frame(area), *bands, *curves])


def latency(rows: Sequence[Row], labels: dict, language: str) -> str:
    """Draw decode time against context length for every row."""
    series = []
    for index, row in enumerate(rows):
        points = [(item.at, item.p50_ms) for item in row.decode]
        band = [(item.at, *np.quantile(item.samples_ns, [0.1, 0.9]) / 1e6) for item in row.decode]
        series.append(Line(row.name, index, points, band, row.is_torch))
    xs = [item.at for item in rows[0].decode]
    ys = [value for line in series for _, low, high in line.band for value in (low, high)]
    # A model of one position decodes after an empty context, and 0 has no place on the axis.
    x_axis = _log_axis(labels["context"], max(min(xs), 1), max(*xs, 1), [(x, number(x, 0, language)) for x in xs])
    y_axis = _log_axis(labels["ms"], min(ys), max(ys), _steps(min(ys), max(ys), language), 0.04)
    return lines(labels["latency"], series, x_axis, y_axis)


def layers(rows: Sequence[Row], labels: dict, language: str) -> str | None:
    """Draw the relative error of the keys against the layer; None if no row has such an error."""
    shown = [
        (index, row.name, row.key_error)
        for index, row in enumerate(rows)
        if row.key_error and any(row.key_error) and all(map(math.isfinite, row.key_error))
    ]
    if not shown:
        return None
    series = [
        Line(
            name,
            index,
            [(layer, max(error, 1e-9)) for layer, error in enumerate(errors)],
            [],
        )
        for index, name, errors in shown
    ]
    ys = [y for line in series for _, y in line.points]
    count = len(series[0].points)
    every = max(1, count // 6)
    ticks = [(layer, str(layer)) for layer in range(0, count, every)]
    x_axis = Axis(labels["layer"], lambda x: x / max(count - 1, 1), ticks)
    y_axis = _log_axis(labels["error"], min(ys), max(ys), _steps(min(ys), max(ys), language), 0.04)
    return lines(labels["layers"], series, x_axis, y_axis)


def _area(x_axis: Axis, y_axis: Axis, right: float) -> Area:
    """Place the axes, with as much room on the left as the tick labels of the y axis need."""
    return Area(x_axis, y_axis, 8 + _CHARACTER * max((len(label) for _, label in y_axis.ticks), default=1), right)


def _side_by_side(dots: Sequence[Dot], right: float) -> list[Dot]:
    """Move dots sideways, no further than needed, so that no two centres are nearer than _BESIDE; within the plot."""
    placed: list[Dot] = []
    for dot in dots:
        moves = (sign * _BESIDE * step for step in range(4 * len(dots)) for sign in ((1, -1) if step else (1,)))
        spots = [replace(dot, x=dot.x + move) for move in moves if 0 <= dot.x + move <= right]
        clear = (
            spot for spot in spots if all(math.hypot(spot.x - other.x, spot.y - other.y) >= _BESIDE for other in placed)
        )
        placed.append(next(clear, dot))
    return placed


def _mark(colour: int, x: float, y: float, radius: float) -> str:
    """The mark of the row with that number of colour: a circle, or another shape from the ninth row on."""
    corners = _SHAPES[colour // 8 % len(_SHAPES)]
    if corners is None:
        return f'<circle class="mark" cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}"/>'
    points = " ".join(f"{x + radius * right:.1f},{y + radius * down:.1f}" for right, down in corners)
    return f'<path class="mark" d="M{points.replace(" ", " L")} Z"/>'


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST else name[: _LONGEST - 1] + "…"


def _text(kind: str, x: float, y: float, text: str, colour: int | None = None, anchor: str = "start") -> str:
    classes = kind if colour is None else f"{kind} c{colour}"
    return f'<text class="{classes}" text-anchor="{anchor}" x="{x:.1f}" y="{y:.1f}">{escape(text)}</text>'


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
    ticks = [(tick, significant(tick, 1, language)) for tick in sorted(wanted) if start <= squeeze(tick) <= end]
    return Axis(title, lambda value: (squeeze(value) - start) / (end - start), ticks)


def _log_axis(title: str, low: float, high: float, ticks: list[tuple[float, str]], margin: float = 0.0) -> Axis:
    """Make a logarithmic axis from `low` to `high`. `margin` is the room on both sides, as a share of that span."""
    span = math.log(high / low) or 1.0
    whole = span * (1 + 2 * margin)
    return Axis(title, lambda value: (math.log(max(value, low) / low) + margin * span) / whole, ticks)


def _steps(low: float, high: float, language: str) -> list[tuple[float, str]]:
    """List 1, 2 and 5 times the powers of ten between `low` and `high`; the powers alone if there are too many."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1, 2, 5), (1,)):
        ticks = [factor * 10.0**power for power in powers for factor in factors if low <= factor * 10.0**power <= high]
        if len(ticks) <= 7:
            break
    return [(tick, significant(tick, 1, language)) for tick in ticks]


def _frame(area: Area) -> str:
    """Draw grid, ticks and titles. A label that would touch the one before it is left out."""
    parts, clear = [], -math.inf
    bottom = HEIGHT - _BOTTOM
    for value, label in area.x_axis.ticks:
        x, half = area.x(value), _CHARACTER * len(label) / 2
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{bottom}"/>')
        if x - half > clear:
            parts.append(_text("tick", x, bottom + 14, label, anchor="middle"))
            clear = x + half
    clear = math.inf
    for value, label in area.y_axis.ticks:
        y = area.y(value)
        parts.append(f'<line class="grid" x1="{area.left:.1f}" x2="{area.right:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>')
        if y + _LINE <= clear:
            parts.append(_text("tick", area.left - 6, y + 4, label, anchor="end"))
            clear = y
    parts.append(_text("axis", (area.left + area.right) / 2, HEIGHT - 5, area.x_axis.title, anchor="middle"))
    parts.append(_text("axis", 2, 12, area.y_axis.title))
    return "".join(parts)


def _names(dots: list[Dot], taken: list[Box], plot: Box) -> list[str]:
    """Draw a name beside each dot, as near to the dot's height as possible.

    Where there is room, names are within `plot` and clear of the boxes `taken` and of each other.
    """
    parts, taken = [], list(taken)
    steps = [0, *(sign * step for step in range(4, HEIGHT, 4) for sign in (-1, 1))]
    for dot in sorted(dots, key=lambda dot: dot.y):
        name, away = _short(dot.name), dot.radius + 4
        width = _CHARACTER * len(name)
        places = [
            (down, side, Box(left, left + width, dot.y + down - _LINE / 2, dot.y + down + _LINE / 2))
            for down in steps
            for side, left in ((1, dot.x + away), (-1, dot.x - away - width))
        ]
        inside = [place for place in places if plot.left <= place[2].left and place[2].right <= plot.right]
        inside = [place for place in inside if plot.top <= place[2].top and place[2].bottom <= plot.bottom] or places
        clear = (place for place in inside if not any(place[2].meets(box) for box in taken))
        down, side, box = next(clear, inside[0])
        taken.append(box)
        x, y = (box.left, dot.y + down) if side > 0 else (box.right, dot.y + down)
        if abs(down) > dot.radius:
            parts.append(f'<path class="lead c{dot.colour}" d="M{dot.x:.1f},{dot.y:.1f} L{x - side:.1f},{y:.1f}"/>')
        parts.append(_text("name", x, y + 4, name, dot.colour, "start" if side > 0 else "end"))
    return parts


def _apart(wanted: list[float]) -> list[float]:
    """Move the heights `wanted` a line apart, in their order and within the plot; closer if there are too many."""
    gap = min(_LINE, (HEIGHT - _BOTTOM - _TOP) / len(wanted))
    order = sorted(range(len(wanted)), key=wanted.__getitem__)
    placed = [0.0] * len(wanted)
    last = _TOP - gap
    for index in order:
        last = placed[index] = max(wanted[index], last + gap)
    over = last - (HEIGHT - _BOTTOM)
    limit: float = HEIGHT - _BOTTOM
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
