"""The tables that `sensitivity` and `histogram` print: the cost of each linear layer, and ranges over a histogram."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from cuantiza.core.machine.terminal import new_table
from cuantiza.quantize.decide.activation import PerTensor
from cuantiza.quantize.decide.observations import Histogram
from cuantiza.quantize.decide.ranges import RANGES

if TYPE_CHECKING:
    from rich.table import Table

    from cuantiza.quantize.inspect.sensitivity import Effect, Sensitivity

# The longest bar in characters, and the number of bars of a histogram.
_BAR_WIDTH, _BARS = 24, 32


@dataclass(frozen=True)
class Range:
    """The range of an activation: values from `low` to `high` in steps of `step`, where `zero_point` stands for 0.

    `clipped` is the share (0 to 1) of the elements that it clips, and `clipped_weight` that of the weight of their
    errors.
    """

    low: float
    high: float
    step: float
    zero_point: int
    clipped: float
    clipped_weight: float


def ranges_of(histogram: Histogram) -> dict[str, Range]:
    """Compute the range that each method would choose for `histogram`, by the method's name."""
    x, found = histogram.centers, {}
    for method, choose in RANGES.items():
        low, high = choose(histogram)
        step, zero_point = PerTensor(low, high).parameters
        outside = (x < low) | (x > high)
        shares = [float(array[outside].sum() / (array.sum() or 1)) for array in (histogram.counts, histogram.weights)]
        found[method] = Range(low, high, float(step), int(zero_point), *shares)
    return found


def sensitivity_table(found: Sensitivity, title: str) -> Table:
    """Build the table with a line and a bar for every linear layer, in the order of `found`."""
    table = new_table(f"{title}\n{found.text}")
    table.add_column("linear layer")
    for column in ("KL, nats", "", "Δ ln ppl"):
        table.add_column(column, justify="left" if column == "" else "right", no_wrap=True)
    most = max(effect.kl_divergence for effect in found.effects.values()) or 1.0

    def cells(effect: Effect, bar: str = "") -> list[str]:
        rise, stderr = round(effect.delta_ln_ppl, 5) + 0.0, effect.delta_ln_ppl_stderr  # no -0.00000
        spread = "" if stderr is None else f" ± {stderr:.5f}"  # a single window has none
        return [f"{effect.kl_divergence:.6f}", bar, f"{rise:.5f}{spread}"]

    for layer, effect in found.effects.items():
        table.add_row(layer, *cells(effect, _bar(effect.kl_divergence / most)))
    table.add_section()
    table.add_row("no linear layer", *cells(found.tables))
    table.add_row("all together", *cells(found.together))
    table.caption = (
        "KL(fp32 ‖ quantized) and Δ ln ppl in nats a token, ± is one standard error over windows. Every line contains "
        "that of «no linear layer»: the embeddings, which are quantized in every line."
    )
    return table


def histogram_table(histogram: Histogram, chosen: Range, title: str) -> Table:
    """Build the table with a line for every 64 bins, and a bar of log(1 + count), hollow where `chosen` clips."""
    table = new_table(title)
    for column in ("from", "to", "elements", "weight"):
        table.add_column(column, justify="right")
    table.add_column("log count, ░ clipped", no_wrap=True)
    edges = np.linspace(histogram.low, histogram.high, _BARS + 1)
    counts, weights = (array.reshape(_BARS, -1).sum(axis=1) for array in (histogram.counts, histogram.weights))
    lengths = np.log1p(counts) / np.log1p(counts.max())
    for low, high, count, weight, length in zip(
        edges, edges[1:], counts, weights / (weights.sum() or 1), lengths, strict=False
    ):
        inside = chosen.low <= (low + high) / 2 <= chosen.high
        bar = _bar(length) if inside else "░" * round(length * _BAR_WIDTH)
        table.add_row(f"{low:.4g}", f"{high:.4g}", f"{count:,}", percent(weight), bar)
    return table


def ranges_table(ranges: dict[str, Range], chosen: str, details: dict) -> Table:
    """Build the table with a line for every method of `ranges`, the `chosen` one marked.

    `details` is what a manifest says of the linear layer.
    """
    table = new_table("ranges (→ chosen by the recipe)")
    table.add_column("method")
    for column in ("low", "high", "step", "zero\npoint", "elements\nclipped", "weight\nclipped"):
        table.add_column(column, justify="right")
    for method, found in ranges.items():
        values = [f"{value:.5g}" for value in (found.low, found.high, found.step)]
        shares = [percent(found.clipped), percent(found.clipped_weight)]
        table.add_row(("→ " if method == chosen else "  ") + method, *values, str(found.zero_point), *shares)
    table.caption = (
        f"Weight: of an element's error in the matmul. Smoothing exponent: {details.get('alpha')}. "
        f"Relative error of the matmul with the chosen range: {details['relative_error']:.3g}."
    )
    if channels := details.get("float_channels"):
        table.caption += f" Without the channels {', '.join(map(str, channels))}, which are computed in float."
    return table


def percent(share: float) -> str:
    """Format `share` in percent with at most three significant digits: "0 %", "0.00312 %", "12.5 %"."""
    return f"{100 * share:.3g} %"


def _bar(share: float) -> str:
    """Draw a bar whose length is `share` (0 to 1) of the longest bar, to an eighth of a character."""
    full, eighths = divmod(round(share * _BAR_WIDTH * 8), 8)
    return "█" * full + ("", *"▏▎▍▌▋▊▉")[eighths]
