"""The figures that `sensitivity --plot` and `histogram --plot` write."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cuantiza.core.errors import UserError
from cuantiza.core.store import folders
from cuantiza.quantize.inspect.tables import Range, percent

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from cuantiza.quantize.decide.observations import Histogram
    from cuantiza.quantize.inspect.sensitivity import Sensitivity

# The suffixes of a figure. None leaves out a date, which would make two files of the same figure differ.
SUFFIXES: dict[str, dict] = {".svg": {"Date": None}, ".png": {}, ".pdf": {"CreationDate": None}}
_COLOURS = {"min-max": "tab:gray", "percentile": "tab:orange", "entropy": "tab:green", "mse": "tab:red"}
# The figure grows with the number of bars, so that every bar and its name stay readable.
_INCHES_PER_BAR = 0.2


def check_path(path: Path) -> None:
    """Raise UserError if no figure can be written to `path`, and ModuleNotFoundError without matplotlib.

    It is called before any work, so that minutes are not spent on a figure that cannot be written.
    """
    import matplotlib  # noqa: F401

    if path.suffix not in SUFFIXES:
        raise UserError(f"--plot {path}: ends in none of {', '.join(SUFFIXES)}; choose one, such as {path.stem}.svg")
    if not path.parent.is_dir():
        raise UserError(f"--plot {path}: {path.parent} is not a folder; make it first, or choose another place")
    if path.is_dir():
        raise UserError(f"--plot {path}: is a folder; give the name of a file")


def plot_sensitivity(found: Sensitivity, title: str, path: Path) -> None:
    """Draw the KL of each linear layer as a bar, the largest on top, and beside it the rise of ln perplexity."""
    figure = _figure(9, 1.6 + _INCHES_PER_BAR * len(found.effects))
    divergence, rise = figure.subplots(1, 2, sharey=True, width_ratios=[3, 2])
    figure.suptitle(f"{title}\n({found.text})")
    places, effects = np.arange(len(found.effects)), list(found.effects.values())
    divergence.barh(places, [effect.kl_divergence for effect in effects], color="tab:blue", label="quantized alone")
    divergence.axvline(
        found.tables.kl_divergence, color="black", linestyle=":", label="no linear layer, embeddings alone"
    )
    divergence.set_yticks(places, list(found.effects), fontsize=8)
    divergence.set_ylim(len(places) - 0.4, -0.6)  # the first on top
    divergence.set_xlabel("mean KL(fp32 ‖ quantized), nats per token")
    divergence.set_ylabel("linear layer")
    divergence.legend(loc="lower right", fontsize=8)
    rise.errorbar(
        [effect.delta_ln_ppl for effect in effects],
        places,
        xerr=[effect.delta_ln_ppl_stderr or 0 for effect in effects],  # a single window has none
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
        axes.xaxis.set_major_formatter("{x:g}")  # no common factor beside the axis, where it would cover the label
    _write(figure, path)


def plot_histogram(
    histogram: Histogram, ranges: dict[str, Range], chosen: str, details: dict, title: str, path: Path
) -> None:
    """Draw the elements of a histogram, the weight of their errors, and both ends of every range.

    Each bin is 1/256 of the full range, and the counts are on a logarithmic axis. `ranges` has the range of each method
    by its name; that of the method `chosen` stands out. `details` is what a manifest says of the layer.
    """
    figure = _figure(9, 5)
    axes = figure.subplots()
    axes.set_title(title)
    edges = np.linspace(histogram.low, histogram.high, 257)
    counts, weights = (array.reshape(256, -1).sum(axis=1) for array in (histogram.counts, histogram.weights))
    axes.stairs(counts, edges, fill=True, color="tab:blue", alpha=0.5, label="elements")
    weights *= counts.sum() / (weights.sum() or 1)  # a layer of zeros makes no error
    axes.stairs(weights, edges, color="tab:purple", linewidth=1, label="weight of their errors, to the same sum")
    for method, found in ranges.items():
        style = {"linewidth": 2.0} if method == chosen else {"linewidth": 1.2, "linestyle": "--"}
        note = f"{method}: {found.low:.4g} to {found.high:.4g}, step {found.step:.3g}, clips {percent(found.clipped)}"
        label: str | None = f"{note} (chosen)" if method == chosen else note
        for end in (found.low, found.high):
            axes.axvline(end, color=_COLOURS.get(method, "black"), label=label, **style)
            label = None  # one entry of the legend for both ends
    axes.set_yscale("log")
    axes.set_ylim(bottom=0.5)  # a single element still shows
    channels = details.get("float_channels")
    without = f", without {len(channels)} channels computed in float" if channels else ""
    axes.set_xlabel(f"value of the input as smoothing left it (no unit){without}")
    axes.set_ylabel(f"elements per bin of {edges[1] - edges[0]:.3g}")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2, fontsize=8, frameon=False)
    _write(figure, path)


def _figure(width: float, height: float) -> Figure:
    """Make a figure without pyplot, so that no window opens, whatever backend the user has set.

    The suffix of the file chooses the canvas when the figure is saved.
    """
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _write(figure: Figure, path: Path) -> None:
    """Write the figure to `path`, whole or not at all: into a temporary folder first, then renamed."""
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": "cuantiza"}), folders.staging(path) as work:
        figure.savefig(work / path.name, dpi=150, metadata=SUFFIXES[path.suffix])
        (work / path.name).replace(path)
