"""Draws a model's rows: size against mean KL divergence, ours in blue."""

from __future__ import annotations

from pathlib import Path

_OURS, _PEERS, _INK = "#1f6feb", "#8c959f", "#1f2328"
_STYLE = {"svg.hashsalt": "cuantiza", "svg.fonttype": "none", "font.family": "sans-serif", "text.color": _INK}
# Where a name may stand beside its point: offset in points, and the side of the text that is there.
_PLACES = ((5, -3, "left"), (5, 5, "left"), (5, -11, "left"), (-5, -3, "right"), (-5, 5, "right"), (-5, -11, "right"))
_FLOOR = 1e-8  # nats; a KL of 0 has no place on a logarithmic axis


def draw(rows: list[dict], title: str, path: Path) -> None:
    """Draw every row of `rows` as the SVG file `path`: megabytes to the right, KL upwards, both logarithmic."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullFormatter

    with matplotlib.rc_context(_STYLE):
        figure = Figure((9, 6.5), facecolor="white")
        canvas = FigureCanvasAgg(figure)  # which can measure text
        # Fixed margins: those that a layout engine finds differ in their last bits from processor to processor.
        axis = figure.add_axes((0.08, 0.08, 0.9, 0.87))
        axis.set_xscale("log")
        axis.set_yscale("log")
        for row in rows:
            axis.plot(*_point(row), "o" if row["ours"] else "s", ms=5, color=_OURS if row["ours"] else _PEERS)
        axis.margins(x=0.12)
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.grid(color="#d0d7de", linewidth=0.5)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_xlabel("file, MB", fontsize=9)
        axis.set_ylabel("mean KL divergence to fp32, nats a token", fontsize=9)
        axis.set_title(f"{title}: lower and further left is better; blue: ours", fontsize=10, loc="left")
        _name(axis, canvas, rows)
        figure.savefig(path, format="svg", metadata={"Date": None})


def _point(row: dict) -> tuple[float, float]:
    return row["bytes"] / 1e6, max(row["kl_divergence"], _FLOOR)


def _name(axis, canvas, rows: list[dict]) -> None:
    """Write each name where it covers no other name, if there is such a place."""
    canvas.draw()
    renderer, taken = canvas.get_renderer(), []
    for row in sorted(rows, key=lambda row: row["kl_divergence"]):
        for x, y, side in _PLACES:
            label = axis.annotate(
                row["name"],
                _point(row),
                (x, y),
                textcoords="offset points",
                ha=side,
                fontsize=7.5,
                color=_OURS if row["ours"] else _INK,
            )
            box = label.get_window_extent(renderer)
            last = (x, y, side) == _PLACES[-1]
            if last or not any(box.overlaps(other) for other in taken):
                taken.append(box)
                break
            label.remove()
