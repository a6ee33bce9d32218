"""Intervals from ranks: the tables' critical values, and how often a bound is missed."""

import itertools
import math

import numpy as np
import pytest

from cuantiza.eval.compare.intervals import rank_sum, rounds_for_rank_sum, signed_rank


def test_critical_values_are_those_of_the_tables():
    # Hollander and Wolfe, tables A.4 and A.6: P(T ≤ 8) = 0.098 and P(T ≤ 5) = 0.039 of 8, P(U ≤ 4) = 0.048 of 5 and 5.
    values = np.arange(8.0) ** 2
    means = sorted((a + b) / 2 for a, b in itertools.combinations_with_replacement(values, 2))
    assert signed_rank(values, 0.1).low == means[8] and signed_rank(values, 0.04).low == means[5]
    assert signed_rank(values, 0.1).high == means[-9]
    differences = sorted(y - x for x in range(5) for y in (10, 17, 31, 40, 58))
    assert rank_sum(range(5), (10, 17, 31, 40, 58), 0.05).low == differences[4]


@pytest.mark.parametrize("n", [1, 3, 6])
def test_bounds_are_missed_as_often_as_signs_and_orders_say(n):
    """Over all 2^n signs, and all choices of which values are base's, each as likely as the other."""
    sizes = np.sqrt(np.arange(1, n + 1))
    lows = [signed_rank(sizes * signs, 0.1).low for signs in itertools.product((-1, 1), repeat=n)]
    assert 0 < sum(low > 0 for low in lows) <= 0.1 * 2**n or 2**-n > 0.1
    assert all(math.isinf(low) for low in lows) == (2**-n > 0.1)
    pooled = set(np.sqrt(np.arange(2 * n)))
    lows = [rank_sum(part, sorted(pooled - {*part}), 0.1).low for part in itertools.combinations(sorted(pooled), n)]
    assert sum(low > 0 for low in lows) <= 0.1 * math.comb(2 * n, n)
    assert all(math.isinf(low) for low in lows) == (1 / math.comb(2 * n, n) > 0.1)


def test_large_samples_use_the_normal_distribution_without_a_step():
    values = np.random.default_rng(0).normal(0.3, 1, 66)
    exact, beyond = signed_rank(values[:64], 0.01), signed_rank(values[:65], 0.01)
    assert abs(exact.low - beyond.low) < 0.05 and exact.low < exact.value < exact.high
    other = np.random.default_rng(1).normal(0.5, 1, 66)
    exact, beyond = rank_sum(values[:64], other[:64], 0.01), rank_sum(values[:65], other[:65], 0.01)
    assert abs(exact.low - beyond.low) < 0.05 and exact.low < exact.value < exact.high


def test_rounds_that_a_report_needs():
    assert rounds_for_rank_sum(0.05) == 3 and rounds_for_rank_sum(0.01 / 14) == 7


# How often latency alarms
