"""Four ways to choose the range of an activation from its histogram, for the static recipes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from cuantiza.quantize.decide.observations import BINS, Histogram


def min_max(histogram: Histogram) -> tuple[float, float]:
    """Return the whole range of the histogram."""
    return histogram.low, histogram.high


def percentile(histogram: Histogram, share: float = 0.9999) -> tuple[float, float]:
    """Return the range that holds `share` of the elements, with equally many below and above it."""
    cumulated = np.cumsum(histogram.counts) / histogram.counts.sum()
    tail = (1 - share) / 2
    width = (histogram.high - histogram.low) / BINS
    first, last = np.searchsorted(cumulated, [tail, 1 - tail], side="right")
    return histogram.low + width * first, histogram.low + width * (min(last, BINS - 1) + 1)


def least_error(histogram: Histogram) -> tuple[float, float]:
    """Return the range with the least expected squared error of the matmul that reads the activation.

    The histogram's weights say how much the error of an element contributes, as in `activation.matmul_error`.
    """

    def error(low: float, high: float) -> float:
        x = histogram.centers
        step = (high - low) / 255
        outside = np.maximum(low - x, x - high).clip(0)
        # Inside the range, the error is distributed evenly over one step, so its square is step²/12 on average.
        return float(histogram.weights @ np.where(outside > 0, (outside + step / 4) ** 2, step * step / 12))

    return _search(histogram, error)


def least_divergence(histogram: Histogram) -> tuple[float, float]:
    """Return the range whose 256 steps keep the distribution best: the least KL(original ‖ quantized), in nats.

    This is TensorRT's entropy calibration. Clipped elements count in the bins at the ends of the range, and each step
    distributes its elements evenly over those of its bins that were not empty.
    """
    counts = histogram.counts.astype(np.float64)
    x = histogram.centers

    def divergence(low: float, high: float) -> float:
        inside = (x >= low) & (x <= high)
        p = counts[inside].copy()
        if not len(p):
            return np.inf
        p[0] += counts[x < low].sum()
        p[-1] += counts[x > high].sum()
        steps = np.floor((x[inside] - low) / ((high - low) / 256)).astype(np.int64).clip(0, 255)
        # Clipped elements are missing from the quantized distribution, so that clipping has a cost.
        kept, filled = counts[inside], counts[inside] > 0
        share = np.bincount(steps, kept, minlength=256) / np.maximum(np.bincount(steps, filled, minlength=256), 1)
        q = np.where(filled, share[steps], 0)
        seen = p > 0
        p, q = p[seen] / p.sum(), np.maximum(q[seen] / max(q.sum(), 1), 1e-12)
        return float(np.sum(p * np.log(p / q)))

    return _search(histogram, divergence)


def _search(histogram: Histogram, cost: Callable[[float, float], float]) -> tuple[float, float]:
    """Return the cheapest of the ranges whose ends are shares of the full range's ends.

    One share for both ends is searched first, then the high end, then the low end.
    """
    if histogram.low == histogram.high:
        return histogram.low, histogram.high  # all elements are 0
    shares = np.geomspace(0.02, 1, 80)
    best = min(shares, key=lambda share: cost(histogram.low * share, histogram.high * share))
    high = min(shares, key=lambda share: cost(histogram.low * best, histogram.high * share))
    low = min(shares, key=lambda share: cost(histogram.low * share, histogram.high * high))
    return float(histogram.low * low), float(histogram.high * high)


# The functions by the names that recipes use.
RANGES: dict[str, Callable[[Histogram], tuple[float, float]]] = {
    "min-max": min_max,
    "percentile": percentile,
    "entropy": least_divergence,
    "mse": least_error,
}
