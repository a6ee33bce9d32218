"""What calibration keeps of an activation: sums and a histogram, whatever the number of tokens.

Both merge: statistics of two halves of the text, merged, are those of the whole.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

BINS = 2048
# Rows kept as they are: the first of a window, where massive activations live, and every 16th.
SAMPLE_EVERY = 16


@dataclass(frozen=True)
class Moments:
    """Of rows x [R, K]: their count, low and high [K], total [K] = Σx, gram float32 [K, K] = Σxᵀx (None where not
    asked for), and a sample of rows [S, K]."""

    count: int
    low: np.ndarray
    high: np.ndarray
    total: np.ndarray
    gram: np.ndarray | None
    rows: np.ndarray

    @classmethod
    def of(cls, x: np.ndarray, with_gram: bool) -> Moments:
        return cls(
            len(x),
            x.min(axis=0),
            x.max(axis=0),
            x.sum(axis=0, dtype=np.float64),
            x.T @ x if with_gram else None,
            x[::SAMPLE_EVERY].copy(),
        )

    def merge(self, other: Moments) -> Moments:
        return Moments(
            self.count + other.count,
            np.minimum(self.low, other.low),
            np.maximum(self.high, other.high),
            self.total + other.total,
            None if self.gram is None else self.gram + other.gram,
            np.concatenate([self.rows, other.rows]),
        )

    @property
    def mean(self) -> np.ndarray:
        return self.total / self.count

    def transformed(self, scale: np.ndarray, shift: np.ndarray) -> Moments:
        """Those of (x − shift) / scale, both [K], scale > 0."""
        gram = self.gram
        if gram is not None:
            cross = np.outer(shift, self.total)
            gram = gram - cross - cross.T + self.count * np.outer(shift.astype(np.float64), shift)
            gram = (gram / np.outer(scale, scale)).astype(np.float32)
        return Moments(
            self.count,
            (self.low - shift) / scale,
            (self.high - shift) / scale,
            (self.total - self.count * shift) / scale,
            gram,
            ((self.rows - shift) / scale).astype(np.float32),
        )


@dataclass(frozen=True)
class Histogram:
    """Elements between `low` and `high` in BINS equal bins: how many, and the weight of their errors."""

    low: float
    high: float
    counts: np.ndarray
    weights: np.ndarray

    @classmethod
    def of(cls, x: np.ndarray, low: float, high: float, weight: np.ndarray) -> Histogram:
        """Of x [R, K] with weights [R, K]; what lies outside counts at the end."""
        width = (high - low) / BINS or 1.0
        bins = ((x - low) / width).astype(np.int64).clip(0, BINS - 1).ravel()
        return cls(low, high, np.bincount(bins, minlength=BINS), np.bincount(bins, weight.ravel(), minlength=BINS))

    def merge(self, other: Histogram) -> Histogram:
        """Both have the same ends."""
        return Histogram(self.low, self.high, self.counts + other.counts, self.weights + other.weights)

    @property
    def centers(self) -> np.ndarray:
        width = (self.high - self.low) / BINS
        return self.low + width * (np.arange(BINS) + 0.5)


def min_max(histogram: Histogram) -> tuple[float, float]:
    """The whole range."""
    return histogram.low, histogram.high


def percentile(histogram: Histogram, share: float = 0.9999) -> tuple[float, float]:
    """The range that holds `share` of the elements, as many beyond it below as above."""
    cumulated = np.cumsum(histogram.counts) / histogram.counts.sum()
    tail = (1 - share) / 2
    width = (histogram.high - histogram.low) / BINS
    first, last = np.searchsorted(cumulated, [tail, 1 - tail], side="right")
    return histogram.low + width * first, histogram.low + width * (min(last, BINS - 1) + 1)


def least_error(histogram: Histogram) -> tuple[float, float]:
    """The range with the least expected squared error of the product behind it (weights as in `matmul_error`)."""

    def error(low: float, high: float) -> float:
        x = histogram.centers
        step = (high - low) / 255
        outside = np.maximum(low - x, x - high).clip(0)
        # Inside, the error is spread evenly over a step: step²/12 on average.
        return float(histogram.weights @ np.where(outside > 0, (outside + step / 4) ** 2, step * step / 12))

    return _search(histogram, error)


def least_divergence(histogram: Histogram) -> tuple[float, float]:
    """The range whose 256 steps keep the distribution best: least KL(original ‖ quantized) in nats.

    As entropy calibration is known from TensorRT: what is clipped counts at the ends, and each step spreads its
    elements evenly over the bins of it that were not empty.
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
        # What was clipped is not in the quantized distribution, which is how clipping costs something.
        kept, filled = counts[inside], counts[inside] > 0
        share = np.bincount(steps, kept, minlength=256) / np.maximum(np.bincount(steps, filled, minlength=256), 1)
        q = np.where(filled, share[steps], 0)
        seen = p > 0
        p, q = p[seen] / p.sum(), np.maximum(q[seen] / max(q.sum(), 1), 1e-12)
        return float(np.sum(p * np.log(p / q)))

    return _search(histogram, divergence)


def _search(histogram: Histogram, cost: Callable[[float, float], float]) -> tuple[float, float]:
    """The cheapest of ranges whose ends are shares of the full ones: first of both alike, then of each end."""
    if histogram.low == histogram.high:
        return histogram.low, histogram.high  # all elements are 0
    shares = np.geomspace(0.02, 1, 80)
    best = min(shares, key=lambda share: cost(histogram.low * share, histogram.high * share))
    high = min(shares, key=lambda share: cost(histogram.low * best, histogram.high * share))
    low = min(shares, key=lambda share: cost(histogram.low * share, histogram.high * high))
    return float(histogram.low * low), float(histogram.high * high)


# By the name that a recipe gives.
RANGES: dict[str, Callable[[Histogram], tuple[float, float]]] = {
    "min-max": min_max,
    "percentile": percentile,
    "entropy": least_divergence,
    "mse": least_error,
}
