"""What calibration keeps of an activation: sums and a histogram, whatever the number of tokens.

Both merge: statistics of two halves of the text, merged, are those of the whole.
"""

from __future__ import annotations

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
