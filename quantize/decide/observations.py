"""The statistics of an activation that calibration keeps: moments and a histogram.

Their size hardly depends on the number of tokens. They can be merged: the merged statistics of two halves of a text
are those of the whole text.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

BINS = 2048
# The sample has the first row of each window, where massive activations occur, and every 16th row.
SAMPLE_EVERY = 16


@dataclass(frozen=True)
class Moments:
    """Moments of an activation x [R, K], of which each row is a token.

    `count` is the number R of rows; `low` and `high` [K] are the smallest and largest value of each channel; `total`
    [K] is Σx; `gram` float32 [K, K] is Σxᵀx, or None where it is not needed; `rows` [S, K] is a sample of the rows.
    """

    count: int
    low: np.ndarray
    high: np.ndarray
    total: np.ndarray
    gram: np.ndarray | None
    rows: np.ndarray

    @classmethod
    def of(cls, x: np.ndarray, with_gram: bool) -> Moments:
        """Compute the moments of x [R, K]."""
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
            None if self.gram is None or other.gram is None else self.gram + other.gram,
            np.concatenate([self.rows, other.rows]),
        )

    @property
    def mean(self) -> np.ndarray:
        return self.total / self.count

    def transformed(self, scale: np.ndarray, shift: np.ndarray) -> Moments:
        """Return the moments of (x − shift) / scale, for shift and scale [K], scale > 0."""
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
    """Elements between `low` and `high` in BINS bins of equal width: the count of each bin, and its weight.

    The weight says how much squared errors of these elements contribute to the error of the matmul.
    """

    low: float
    high: float
    counts: np.ndarray
    weights: np.ndarray

    @classmethod
    def of(cls, x: np.ndarray, low: float, high: float, weight: np.ndarray) -> Histogram:
        """Count x [R, K] with weights [R, K]. Elements outside the range count in the first or last bin."""
        width = (high - low) / BINS or 1.0
        bins = ((x - low) / width).astype(np.int64).clip(0, BINS - 1).ravel()
        return cls(low, high, np.bincount(bins, minlength=BINS), np.bincount(bins, weight.ravel(), minlength=BINS))

    def merge(self, other: Histogram) -> Histogram:
        """Merge two histograms that have the same `low` and `high`."""
        return Histogram(self.low, self.high, self.counts + other.counts, self.weights + other.weights)

    @property
    def centers(self) -> np.ndarray:
        width = (self.high - self.low) / BINS
        return self.low + width * (np.arange(BINS) + 0.5)
