"""Draws the chapters' figures from docs/data/quantization.json: each in both languages, as docs/figures/*.svg.

Text stays text in the SVG. The background is white, also on a dark page. A width of 324 points is readable on a phone
without scaling.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from lab.chapters.numbers import FORMATS, grid
from lab.chapters.text import Numbers
from lab.chapters.words import WORDS

_WIDTH = 4.5  # inches
_INK, _FAINT = "#1f2328", "#8c959f"
BLUE, RED, GREEN, ORANGE, PURPLE = "#1f6feb", "#cf222e", "#1a7f37", "#bc4c00", "#8250df"
# Background colours of the bits: sign, exponent and mantissa of a float, then the bits of an integer.
_FILLS = ("#ffc1ba", "#b6d8ff", "#e6e9ed"), ("#c5ebc9",)
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "cuantiza",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial", "sans-serif"],
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.labelsize": 9,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": _FAINT,
    "axes.labelcolor": _INK,
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "grid.color": "#d0d7de",
    "grid.linewidth": 0.6,
}


def draw(data: dict, folder: Path) -> None:
    """Draw every figure in every language as `folder`/NAME.LANGUAGE.svg. The same data give the same bytes."""
    with matplotlib.rc_context(_STYLE):
        for name, figure in FIGURES.items():
            for language in WORDS:
                figure(data, Page(language, folder / f"{name}.{language}.svg"))


class Page:
    """The file that a figure is written to, and the words and number format of its language."""

    def __init__(self, language: str, path: Path) -> None:
        self.words, self.numbers, self._path = WORDS[language], Numbers(language), path

    @contextmanager
    def figure(self, height: float, **kwargs: object) -> Iterator[Figure]:
        """Yield a figure of `height` inches, and write it to the file when the block ends.

        This does not use pyplot, so it opens no window and keeps no global state.
        """
        figure = Figure(figsize=(_WIDTH, height), layout="constrained", facecolor="white")
        figure.get_layout_engine().set(**{"w_pad": 0.06, "h_pad": 0.06, "hspace": 0.04, **kwargs})
        yield figure
        figure.savefig(self._path, metadata={"Date": None, "Creator": None})

    def axis(self, axis: matplotlib.axis.Axis, digits: int = 3) -> None:
        """Write the tick labels of a linear axis in the language's number format."""
        axis.set_major_formatter(FuncFormatter(lambda value, _: self.short(value, digits)))

    def log_axis(self, axis: matplotlib.axis.Axis, ticks: int = 6) -> None:
        axis.set_major_locator(LogLocator(10, numticks=ticks))
        axis.set_major_formatter(FuncFormatter(lambda value, _: self.power(value)))
        axis.set_minor_locator(NullLocator())
        axis.set_minor_formatter(NullFormatter())

    def short(self, value: float, digits: int = 3) -> str:
        """`value` to `digits` significant digits, without trailing zeros."""
        text = f"{value:.{digits}g}"
        return text if "e" in text else self.numbers.fixed(value, len(text.partition(".")[2]))

    def power(self, value: float) -> str:
        """A power of ten: as a plain number from 0.001 to 1000, otherwise with an exponent."""
        exponent = round(np.log10(value))
        return self.short(value) if -3 <= exponent <= 3 else "10" + str(exponent).translate(_SUPERSCRIPTS)

    def percent(self, axis: matplotlib.axis.Axis) -> None:
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{self.short(100 * value)} %"))


_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def bits_weight(data: dict, page: Page) -> None:
    _bits(data["weight_bits"], page)


def bits_activation(data: dict, page: Page) -> None:
    _bits(data["activation_bits"], page)


def _bits(section: dict, page: Page) -> None:
    """Draw the bits of a number as one line of cells per format, with the restored number and its error above."""
    cell, row, numbers = 9.6, 44.0, page.numbers
    shown = section["shown"]
    with page.figure((row * len(shown) + 20) / 72) as figure:
        axes = figure.subplots()
        axes.set_axis_off()
        axes.set_xlim(-1, 32 * cell + 1)
        axes.set_ylim(row * len(shown) + 14, 0)
        for index, item in enumerate(shown):
            top = index * row
            axes.text(0, top + 13, page.words["formats"][item["format"]], weight="bold", va="baseline")
            exact = item["integer"] is None
            restored = numbers.exact(item["restored"]) if exact else numbers.digits(item["restored"], 7)
            axes.text(20.5 * cell, top + 13, restored, ha="right", va="baseline")
            error = f"{page.words['error']} {numbers.digits(item['error'], 2)}"
            axes.text(32 * cell, top + 13, error, ha="right", va="baseline")
            left = 0.0
            for group, fill in zip(item["groups"], _FILLS[len(item["groups"]) == 1], strict=True):
                for bit in group:
                    axes.add_patch(
                        matplotlib.patches.Rectangle(
                            (left, top + 18), cell, 16, facecolor=fill, edgecolor="white", linewidth=0.8
                        )
                    )
                    axes.text(left + cell / 2, top + 29.5, bit, ha="center", va="baseline", fontsize=8.5)
                    left += cell
            if item["integer"] is not None:
                q, zero = (numbers.fixed(item[key]) for key in ("integer", "zero_point"))
                what = q if not item["zero_point"] else f"({q} − {zero})"
                axes.text(left + 6, top + 29.5, f"q = {q};  {what} × {numbers.digits(item['scale'], 4)}", va="baseline")
        bottom, left = row * len(shown) + 10, 0.0
        for name, fill in zip(page.words["fields"], (*_FILLS[0], *_FILLS[1]), strict=True):
            axes.add_patch(matplotlib.patches.Rectangle((left, bottom - 8), 8, 9, facecolor=fill))
            axes.text(left + 11, bottom, name, va="baseline", fontsize=8.5)
            left += 32 * cell / 4


def steps(data: dict, page: Page) -> None:
    """Draw the distance between neighbouring values at each magnitude, above histograms of weights and activations."""
    weight, model, words = data["weight"], data["model"], page.words
    low, high = 2.0**-20, 2.0**6
    with page.figure(4.6) as figure:
        top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1.3])
        powers = 2.0 ** np.arange(-20, 7)
        for name, color, place, above in (
            ("fp32", BLUE, 0.1, 0.06),
            ("fp16", GREEN, 2.0, 0.06),
            ("bf16", ORANGE, 2.0, 4),
        ):
            form = FORMATS[name]
            top.step(powers, [form.step(power) for power in powers], where="post", color=color, linewidth=1.4)
            top.text(place, form.step(place) * above, name, color=color, weight="bold", ha="center")
        for scale, end, name, color in (
            (weight["scale_channel"], weight["channel_largest"], "int8", PURPLE),
            (weight["int4_scale"], weight["channel_largest"], "int4", RED),
        ):
            top.plot([low, end], [scale, scale], color=color, linewidth=1.8)
            top.plot([end], [scale], "|", color=color, markersize=9, markeredgewidth=2)
            top.text(low * 1.4, scale * 2, f"{name}{words['same_step']}", color=color, weight="bold")
        top.set(xscale="log", yscale="log", xlim=(low, high), ylim=(1e-14, 1), title=words["steps_title"])
        top.grid(True)
        page.log_axis(top.yaxis, 5)
        for key, color, name in (("weight", BLUE, words["weights"]), ("activation", ORANGE, words["activations"])):
            bins = model[f"{key}_exponents"]
            share = np.array(bins["counts"]) / sum(bins["counts"])
            bottom.stairs(share, 2.0 ** np.array(bins["edges"]), color=color, linewidth=1.4, label=name)
        bottom.set(xlabel=words["magnitude"], title=words["magnitude_title"])
        bottom.legend(loc="upper left", handlelength=1.2)
        bottom.set_yticks([])
        page.log_axis(bottom.xaxis, 5)


def weights(data: dict, page: Page) -> None:
    """Draw histograms of the weight matrix and of its narrowest channel, and each grid's values in that channel."""
    section, words = data["weight"], page.words
    edge = section["channel_largest"]
    with page.figure(4.9) as figure:
        whole, channel, rows = figure.subplots(3, 1, height_ratios=[1.3, 1.3, 1.25])
        _stairs(whole, section["values"], BLUE)
        whole.axvspan(-edge, edge, color=RED, alpha=0.15, linewidth=0)
        whole.set(yscale="log", title=words["matrix_title"].format(tensor=section["tensor"]), ylim=(0.8, None))
        note = whole.annotate(
            words["channel"].format(channel=section["channel"]),
            (edge, 3), (0.43 * section["largest"], 3), color=RED, va="center",
            arrowprops={"arrowstyle": "-", "color": RED, "linewidth": 0.8},
        )  # fmt: skip
        note.set_in_layout(False)  # otherwise the layout would make room for it outside of the axes
        page.axis(whole.xaxis)
        page.log_axis(whole.yaxis, 4)
        _stairs(channel, section["channel_values"], RED)
        channel.set(title=words["channel_title"].format(channel=section["channel"]), xlim=(-1.04 * edge, 1.04 * edge))
        channel.tick_params(labelbottom=False)
        int4 = grid(section["int4_scale"], section["int4_zero_point"], 0, 15)
        levels = (
            (grid(section["scale_tensor"], 0, -127, 127), words["by_tensor"], BLUE),
            (grid(section["scale_channel"], 0, -127, 127), words["by_channel"], PURPLE),
            (int4, words["by_block"], RED),
        )
        _combs(rows, levels, edge, page)
        rows.set_xlabel(words["weight_value"])


def _combs(axes: Axes, levels: tuple, edge: float, page: Page) -> None:
    """Draw every value of each grid within ±edge as a tick, and write how many there are."""
    for place, (values, name, color) in enumerate(levels):
        inside = values[np.abs(values) <= edge * (1 + 1e-6)]
        axes.vlines(inside, -place - 0.62, -place - 0.22, color=color, linewidth=0.45 if len(inside) > 100 else 1.1)
        axes.text(-1.04 * edge, -place - 0.14, name.format(count=len(inside)), color=color, fontsize=8.5, va="bottom")
    axes.set(xlim=(-1.04 * edge, 1.04 * edge), ylim=(-len(levels) + 0.2, 0.4))
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    page.axis(axes.xaxis)


def channels(data: dict, page: Page) -> None:
    """Plot the relative error of each channel against its range."""
    section, words = data["weight"], page.words
    largest, *errors = np.array(section["channels"]).T
    with page.figure(3.1) as figure:
        axes = figure.subplots()
        names = (words["int4_label"], words["tensor_label"], words["channel_label"])
        for values, color, name in zip((errors[2], errors[0], errors[1]), (RED, BLUE, PURPLE), names, strict=True):
            axes.plot(largest, values, "o", color=color, markersize=3, markeredgewidth=0, alpha=0.8)
            axes.text(largest[-1] * 1.0, values[-16:].mean() * 1.3, name, color=color, ha="right", weight="bold")
        axes.set(
            xscale="log", yscale="log", xlabel=words["channel_range"], title=words["channels_title"], ylim=(3e-3, 0.2)
        )
        axes.grid(True)
        axes.set_yticks([0.005, 0.01, 0.02, 0.05, 0.1])
        axes.set_xticks([0.1, 0.2, 0.5, 1])
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_minor_locator(NullLocator())
        page.axis(axes.xaxis)
        page.percent(axes.yaxis)


def activation(data: dict, page: Page) -> None:
    """Draw the activation's values with the static range, and the scale of every token beside the static scale."""
    section, words = data["activation"], page.words
    with page.figure(4.4) as figure:
        values, rows = figure.subplots(2, 1)
        _stairs(values, section["values"], ORANGE)
        values.set(yscale="log", ylim=(0.8, None), title=words["activation_title"].format(tensor=section["tensor"]))
        values.set_xlabel(words["activation_value"])
        values.axvspan(section["static_high"], section["high"] * 1.02, color=RED, alpha=0.12, linewidth=0)
        values.axvline(section["static_high"], color=BLUE, linewidth=1.4)
        values.axvline(section["static_low"], color=BLUE, linewidth=1.4)
        height = max(section["values"]["counts"])
        values.text(
            section["static_high"] - 0.08, height * 0.5, words["static_range"], color=BLUE, ha="right", va="top"
        )
        values.text(section["static_high"] + 0.08, height * 0.5, words["clipped"], color=RED, va="top")
        page.axis(values.xaxis)
        page.log_axis(values.yaxis, 4)
        _stairs(rows, section["row_steps"], PURPLE)
        rows.axvline(section["static_scale"], color=BLUE, linewidth=1.4)
        top = max(section["row_steps"]["counts"])
        rows.set(title=words["row_title"], xlabel=words["step"], ylim=(0, 1.15 * top), xlim=(0, None))
        rows.text(section["static_scale"] * 1.02, 1.1 * top, words["static_step"], color=BLUE, va="top")
        rows.text(0.02 * section["static_scale"], 1.1 * top, words["row_step"], color=PURPLE, va="top")
        page.axis(rows.xaxis)
        page.axis(rows.yaxis)


def outliers(data: dict, page: Page) -> None:
    """Draw the largest magnitude of each channel, and the int8 matmul's error on both models."""
    section, words = data["outliers"], page.words
    with page.figure(4.9) as figure:
        lines, bars = figure.subplots(2, 1, height_ratios=[1.25, 1])
        for name, color, width in (("twin", RED, 1.8), ("tame", BLUE, 1.8), ("smoothed", GREEN, 1.4)):
            values = section["largest"][name]
            lines.step(np.arange(1, len(values) + 1), values, where="mid", color=color, linewidth=width)
        lines.set(xscale="log", yscale="log", xlabel=words["rank"], title=words["outliers_title"], ylim=(0.5, 600))
        lines.set_xticks([1, 2, 4, 10, 30, 100, 256])
        lines.xaxis.set_minor_locator(NullLocator())
        page.axis(lines.xaxis)
        page.log_axis(lines.yaxis, 5)
        lines.grid(True)
        largest = section["largest"]
        lines.text(section["channels"] + 0.8, 100, words["twin"], color=RED, weight="bold")
        lines.text(1.1, largest["tame"][0] * 1.25, words["tame"], color=BLUE, weight="bold")
        lines.text(1.1, largest["smoothed"][0] * 0.5, words["smoothed"], color=GREEN, weight="bold")
        kinds = ("tensor", "row", "smoothed")
        for offset, (model, color) in enumerate((("tame", BLUE), ("twin", RED))):
            found = [section["error"][model][kind] for kind in kinds]
            places = np.arange(len(kinds)) + 0.38 * offset - 0.19
            bars.barh(places, found, 0.36, color=color)
            for place, value in zip(places, found, strict=True):
                bars.text(value + 0.008, place, page.numbers.percent(value), va="center", color=color)
        bars.set_yticks(range(len(kinds)), [words["kinds"][kind] for kind in kinds])
        bars.invert_yaxis()
        bars.set(title=words["product_title"], xlim=(0, 1.2 * max(section["error"]["twin"].values())))
        page.percent(bars.xaxis)
        bars.tick_params(left=False)


def tradeoff(data: dict, page: Page) -> None:
    """Draw a line per row of the report: size, time of a decode step, and Δ ln ppl ± 2 standard errors."""
    rows, words = data["report"]["artifacts"], page.words
    places = np.arange(len(rows))
    colors = [_FAINT if row["name"] == "fp32" or row["name"].startswith("torch") else BLUE for row in rows]
    with page.figure(3.7, wspace=0.02) as figure:
        size, time, loss = figure.subplots(1, 3, sharey=True, width_ratios=[1, 1, 1.15])
        for axes, values, digits in (
            (size, [row["bytes"] / 1e6 for row in rows], 1),
            (time, [row["decode_ms"] for row in rows], 2),
        ):
            axes.barh(places, values, 0.62, color=colors)
            for place, value in zip(places, values, strict=True):
                inside = value > 0.55 * max(values)
                axes.text(
                    value * 0.97 if inside else value + 0.03 * max(values), place, page.numbers.fixed(value, digits),
                    va="center", ha="right" if inside else "left", color="white" if inside else _INK, fontsize=8.5,
                )  # fmt: skip
            axes.set_xticks([])
            axes.spines["bottom"].set_visible(False)
        for place, row, color in zip(places, rows, colors, strict=True):
            if row["name"] in ("fp32", "torch-fp32"):  # the baseline, and the same numbers in PyTorch: no error to show
                loss.plot(100 * row["delta_ln_ppl"], place, "o", color=color, markersize=4)
                continue
            spread = 200 * (row["delta_ln_ppl_stderr"] or 0)
            loss.errorbar(
                100 * row["delta_ln_ppl"], place, xerr=spread, fmt="o", color=color, markersize=4, elinewidth=1.4
            )
        loss.axvline(0, color=_FAINT, linewidth=0.8, zorder=0)
        loss.set_yticks(places, [row["name"] for row in rows])
        loss.invert_yaxis()
        loss.grid(True, axis="x")
        loss.locator_params(axis="x", nbins=4)
        page.axis(loss.xaxis)
        names = ("MB", words["decode"].format(position=data["report"]["decode_position"]), words["loss"])
        for axes, name in zip((size, time, loss), names, strict=True):
            axes.set_title(name, fontsize=8.5)
            axes.tick_params(axis="y", left=False)


def _stairs(axes: Axes, bins: dict, color: str) -> None:
    axes.stairs(bins["counts"], bins["edges"], fill=True, color=color, alpha=0.55, linewidth=0)


# Each figure's function by the name of its file, without language and suffix.
FIGURES: dict[str, Callable[[dict, Page], None]] = {
    "bits-weight": bits_weight,
    "bits-activation": bits_activation,
    "steps": steps,
    "weights": weights,
    "channels": channels,
    "activation": activation,
    "outliers": outliers,
    "tradeoff": tradeoff,
}
