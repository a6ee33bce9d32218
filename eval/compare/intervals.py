"""Compute intervals from ranks, because times do not follow a normal distribution.

One process can be a fifth faster than the next with the same file, and another program can halve the speed of a round,
so differences have two or three peaks and long tails. Ranks only assume that the differences lie symmetrically around
their centre (`signed_rank`), or that both samples have the same shape (`rank_sum`). The bounds are order statistics, so
one extreme round hardly moves them. The functions here are pure, on lists of numbers.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

_EXACT = 64  # values in a sample; for more, the normal approximation agrees in every digit that is shown


@dataclass(frozen=True)
class Interval:
    """An estimate between two bounds, each of which is missed with a stated probability.

    The bounds are infinite if there are too few values for that probability.
    """

    value: float
    low: float
    high: float


def signed_rank(differences: Sequence[float], level: float) -> Interval:
    """Estimate the centre of paired differences [n] by Wilcoxon's signed ranks.

    Each bound is missed with probability ≤ `level`. The estimate is the median of all means of two differences (Hodges
    and Lehmann), and the bounds are order statistics of those means (Hollander and Wolfe, Nonparametric Statistical
    Methods, 3.2 and 3.3).
    """
    values = np.asarray(differences, float)
    first, second = np.triu_indices(len(values))
    return _order_statistics((values[first] + values[second]) / 2, _critical_signed_rank(len(values), level))


def rank_sum(base: Sequence[float], head: Sequence[float], level: float) -> Interval:
    """Estimate how far `head` [m] lies above `base` [n], by Wilcoxon's rank sum.

    Each bound is missed with probability ≤ `level`. Estimate and bounds are order statistics of all differences
    (Hollander and Wolfe, 4.2 and 4.3).
    """
    differences = np.subtract.outer(np.asarray(head, float), np.asarray(base, float)).ravel()
    return _order_statistics(differences, _critical_rank_sum(len(base), len(head), level))


def rounds_for_rank_sum(level: float) -> int:
    """Return the smallest size of both samples with which `rank_sum` has finite bounds."""
    return next(n for n in range(1, _EXACT) if 1 / math.comb(2 * n, n) <= level)


def _order_statistics(values: np.ndarray, critical: int) -> Interval:
    ordered = np.sort(values)
    low, high = (ordered[critical], ordered[-1 - critical]) if critical >= 0 else (-math.inf, math.inf)
    return Interval(float(np.median(ordered)), float(low), float(high))


@functools.cache
def _critical_signed_rank(n: int, level: float) -> int:
    """Return the largest k with P(T ≤ k) ≤ level, or −1 if there is none.

    T is the sum of the ranks among 1..n that are drawn, each with probability 1/2.
    """
    if n > _EXACT:
        return _by_normal(n * (n + 1) / 4, n * (n + 1) * (2 * n + 1) / 24, level)
    chance = np.zeros(n * (n + 1) // 2 + 1)
    chance[0] = 1
    for rank in range(1, n + 1):
        chance[rank:] += chance[:-rank].copy()
        chance /= 2
    return int(np.searchsorted(np.cumsum(chance), level, side="right")) - 1


@functools.cache
def _critical_rank_sum(n: int, m: int, level: float) -> int:
    """Return the largest k with P(U ≤ k) ≤ level, or −1 if there is none.

    U is the number of pairs in which the value of the second sample is the larger one.
    """
    if max(n, m) > _EXACT:
        return _by_normal(n * m / 2, n * m * (n + m + 1) / 12, level)
    # The largest value belongs to either sample: P(n, m) = m/(n+m) · P(n, m−1) shifted by n + n/(n+m) · P(n−1, m).
    chance = {(i, 0): np.ones(1) for i in range(n + 1)} | {(0, j): np.ones(1) for j in range(m + 1)}
    for i in range(1, n + 1):
        for j in range(1, m + 1):
            own = np.zeros(i * j + 1)
            own[i:] += j / (i + j) * chance[i, j - 1]
            own[: (i - 1) * j + 1] += i / (i + j) * chance[i - 1, j]
            chance[i, j] = own
    return int(np.searchsorted(np.cumsum(chance[n, m]), level, side="right")) - 1


def _by_normal(mean: float, variance: float, level: float) -> int:
    return math.floor(mean + NormalDist().inv_cdf(level) * math.sqrt(variance) - 0.5)
