"""What the commands show, on the terminal and as figures: what each projection costs, how a range fits its histogram."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cuantiza.core.errors import UserError
from cuantiza.core.machine.terminal import new_table
from cuantiza.core.store import folders

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

    from cuantiza.quantize.decide.observations import Histogram
    from cuantiza.quantize.inspect.sensitivity import Effect

# By suffix, what would make two files of the same figure differ.
SUFFIXES: dict[str, dict] = {".svg": {"Date": None}, ".png": {}, ".pdf": {"CreationDate": None}}
_COLOURS = {"min-max": "tab:gray", "percentile": "tab:orange", "entropy": "tab:green", "mse": "tab:red"}
# A bar and its name stay readable however many there are.
_INCHES_PER_BAR = 0.2
# Of a terminal: characters of the longest bar, and the bars of a histogram.
_BAR_WIDTH, _BARS = 24, 32


@dataclass(frozen=True)
class Sensitivity:
    """`effects` of every projection alone, the largest KL first; of `tables` without any projection, which every
    other effect contains; and of all `together`. Measured on `windows` of `tokens` tokens."""

    effects: dict[str, Effect]
    tables: Effect
    together: Effect
    windows: int
    tokens: int

    @property
    def text(self) -> str:
        return f"{self.windows} calibration windows of {self.tokens} tokens"


@dataclass(frozen=True)
class Range:
    """Values from `low` to `high` in steps of `step` around `zero_point`; shares 0 to 1 of the elements, and of the
    weight of their errors, that it clips."""

    low: float
    high: float
    step: float
    zero_point: int
    clipped: float
    clipped_weight: float


def sensitivity_table(found: Sensitivity, title: str) -> Table:
    """A line with a bar for every projection, in the order of `found`."""
    table = new_table(f"{title}\n{found.text}")
    table.add_column("projection")
    for column in ("KL, nats", "", "Δ ln ppl"):
        table.add_column(column, justify="left" if column == "" else "right", no_wrap=True)
    most = max(effect.kl_divergence for effect in found.effects.values()) or 1.0

    def cells(effect: Effect, bar: str = "") -> list[str]:
        rise, stderr = round(effect.delta_ln_ppl, 5) + 0.0, effect.delta_ln_ppl_stderr  # no -0.00000
        spread = "" if math.isnan(stderr) else f" ± {stderr:.5f}"  # a single window has none
        return [f"{effect.kl_divergence:.6f}", bar, f"{rise:.5f}{spread}"]

    for projection, effect in found.effects.items():
        table.add_row(projection, *cells(effect, _bar(effect.kl_divergence / most)))
    table.add_section()
    table.add_row("no projection", *cells(found.tables))
    table.add_row("all together", *cells(found.together))
    table.caption = (
        "KL(fp32 ‖ quantized) and Δ ln ppl in nats a token, ± is one standard error over windows. Every line contains "
        "that of «no projection»: look-ups in tables that no projection reads."
    )
    return table


def histogram_table(histogram: Histogram, chosen: Range, title: str) -> Table:
    """A line for every 64 bins: how many elements, as a bar of log(1 + count), hollow where `chosen` clips them."""
    table = new_table(title)
    for column in ("from", "to", "elements", "weight"):
        table.add_column(column, justify="right")
    table.add_column("log count, ░ clipped", no_wrap=True)
    edges = np.linspace(histogram.low, histogram.high, _BARS + 1)
    counts, weights = (array.reshape(_BARS, -1).sum(axis=1) for array in (histogram.counts, histogram.weights))
    lengths = np.log1p(counts) / np.log1p(counts.max())
    for low, high, count, weight, length in zip(
        edges, edges[1:], counts, weights / weights.sum(), lengths, strict=False
    ):
        inside = chosen.low <= (low + high) / 2 <= chosen.high
        bar = _bar(length) if inside else "░" * round(length * _BAR_WIDTH)
        table.add_row(f"{low:.4g}", f"{high:.4g}", f"{count:,}", percent(weight), bar)
    return table


def ranges_table(ranges: dict[str, Range], chosen: str, account: dict) -> Table:
    """A line for every method of `ranges`, the `chosen` one marked; `account` is the manifest's of the projection."""
    table = new_table("ranges (→ chosen by the recipe)")
    table.add_column("method")
    for column in ("low", "high", "step", "zero\npoint", "elements\nclipped", "weight\nclipped"):
        table.add_column(column, justify="right")
    for method, found in ranges.items():
        values = [f"{value:.5g}" for value in (found.low, found.high, found.step)]
        shares = [percent(found.clipped), percent(found.clipped_weight)]
        table.add_row(("→ " if method == chosen else "  ") + method, *values, str(found.zero_point), *shares)
    table.caption = (
        f"Weight: of an element's error in the product. Smoothing exponent: {account.get('alpha')}. "
        f"Relative error of the product with the chosen range: {account['relative_error']:.3g}."
    )
    if channels := account.get("float_channels"):
        table.caption += f" Without the channels {', '.join(map(str, channels))}, which are computed in float."
    return table


def check_path(path: Path) -> None:
    """Before any work: raises UserError where no figure can be written to `path`."""
    if path.suffix not in SUFFIXES:
        raise UserError(f"--plot {path}: ends in none of {', '.join(SUFFIXES)}; choose one, such as {path.stem}.svg")
    if not path.parent.is_dir():
        raise UserError(f"--plot {path}: {path.parent} is no folder; make it first, or choose another place")
    if path.is_dir():
        raise UserError(f"--plot {path}: is a folder; give the name of a file")


def plot_sensitivity(found: Sensitivity, title: str, path: Path) -> None:
    """A bar per projection, the largest KL on top, and beside it the rise of ln perplexity with its standard error."""
    figure = _figure(9, 1.6 + _INCHES_PER_BAR * len(found.effects))
    divergence, rise = figure.subplots(1, 2, sharey=True, width_ratios=[3, 2])
    figure.suptitle(f"{title}\n({found.text})")
    places, effects = np.arange(len(found.effects)), list(found.effects.values())
    divergence.barh(places, [effect.kl_divergence for effect in effects], color="tab:blue", label="quantized alone")
    divergence.axvline(found.tables.kl_divergence, color="black", linestyle=":", label="no projection, tables alone")
    divergence.set_yticks(places, list(found.effects), fontsize=8)
    divergence.set_ylim(len(places) - 0.4, -0.6)  # the first on top
    divergence.set_xlabel("mean KL(fp32 ‖ quantized), nats per token")
    divergence.set_ylabel("projection")
    divergence.legend(loc="lower right", fontsize=8)
    rise.errorbar(
        [effect.delta_ln_ppl for effect in effects],
        places,
        xerr=[effect.delta_ln_ppl_stderr for effect in effects],
        fmt="o",
        markersize=3,
        color="tab:blue",
        elinewidth=1,
    )
    rise.axvline(0, color="black", linewidth=0.8)
    rise.set_xlabel("Δ ln ppl, nats per token (± 1 standard error)")
    for axes, ticks in ((divergence, 6), (rise, 4)):
        axes.grid(axis="x", alpha=0.3)
        axes.locator_params(axis="x", nbins=ticks)
        axes.xaxis.set_major_formatter("{x:g}")  # no factor aside, which would lie on the label
    _write(figure, path)


def plot_histogram(
    histogram: Histogram, ranges: dict[str, Range], chosen: str, account: dict, title: str, path: Path
) -> None:
    """Elements per 1/256 of the full range on a logarithmic axis, the weight of their errors, both ends of every range.

    `ranges` are by the name of their method; that of `chosen` stands out. `account` is the manifest's.
    """
    figure = _figure(9, 5)
    axes = figure.subplots()
    axes.set_title(title)
    edges = np.linspace(histogram.low, histogram.high, 257)
    counts, weights = (array.reshape(256, -1).sum(axis=1) for array in (histogram.counts, histogram.weights))
    axes.stairs(counts, edges, fill=True, color="tab:blue", alpha=0.5, label="elements")
    weights *= counts.sum() / weights.sum()
    axes.stairs(weights, edges, color="tab:purple", linewidth=1, label="weight of their errors, to the same sum")
    for method, found in ranges.items():
        style = {"linewidth": 2.0} if method == chosen else {"linewidth": 1.2, "linestyle": "--"}
        note = f"{method}: {found.low:.4g} to {found.high:.4g}, step {found.step:.3g}, clips {percent(found.clipped)}"
        label = f"{note} (chosen)" if method == chosen else note
        for end in (found.low, found.high):
            axes.axvline(end, color=_COLOURS.get(method, "black"), label=label, **style)
            label = None  # one entry of the legend for both ends
    axes.set_yscale("log")
    axes.set_ylim(bottom=0.5)  # a single element still shows
    channels = account.get("float_channels")
    without = f", without {len(channels)} channels computed in float" if channels else ""
    axes.set_xlabel(f"value of the input as smoothing left it (no unit){without}")
    axes.set_ylabel(f"elements per bin of {edges[1] - edges[0]:.3g}")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2, fontsize=8, frameon=False)
    _write(figure, path)


def percent(share: float) -> str:
    """`share` in percent, with a digit that counts where it is small: "0 %", "0.00312 %", "12.5 %"."""
    return f"{100 * share:.3g} %"


def _bar(share: float) -> str:
    """As long as `share` (0 to 1) of the longest bar, to an eighth of a character."""
    full, eighths = divmod(round(share * _BAR_WIDTH * 8), 8)
    return "█" * full + ("", *"▏▎▍▌▋▊▉")[eighths]


def _figure(width: float, height: float) -> Figure:
    """Without pyplot: no window, whatever backend the user has set; the file's suffix chooses the canvas."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _write(figure: Figure, path: Path) -> None:
    """The whole file or none: it is written under another name, then renamed."""
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": "cuantiza"}), folders.staging(path) as work:
        figure.savefig(work / path.name, dpi=150, metadata=SUFFIXES[path.suffix])
        (work / path.name).replace(path)
