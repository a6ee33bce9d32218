"""Spending a budget on matrices: as good as trying every choice, and never above the budget."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from cuantiza.quantize.weights.allocate import (
    Option,
    closest,
    smallest,
    total_bytes,
    total_kl,
    within_bytes,
    within_kl,
)
from cuantiza.quantize.weights.rounding import Grid

GRIDS = [Grid(4, block, False, 8) for block in (128, 32, 16)] + [Grid(8)]


@pytest.fixture(params=range(4))
def options(request: pytest.FixtureRequest) -> dict[str, list[Option]]:
    """Five matrices with four options each; sizes are small, so that a step of the knapsack is one byte."""
    generator = np.random.default_rng(request.param)
    found = {}
    for name in "abcde":
        sizes = np.sort(generator.integers(100, 3000, len(GRIDS)))
        losses = np.sort(generator.exponential(0.01, len(GRIDS)))[::-1]
        found[name] = [Option(grid, int(size), float(kl)) for grid, size, kl in zip(GRIDS, sizes, losses, strict=True)]
    return found


def every_choice(options: dict[str, list[Option]]) -> list[dict[str, Option]]:
    return [dict(zip(options, some, strict=True)) for some in itertools.product(*options.values())]


def test_the_least_kl_in_so_many_bytes(options: dict[str, list[Option]]) -> None:
    choices = every_choice(options)
    low, high = (total_bytes(end(options)) for end in (smallest, closest))
    for budget in np.linspace(low, high + 100, 9).astype(int):
        chosen = within_bytes(options, int(budget))
        best = min(total_kl(choice) for choice in choices if total_bytes(choice) <= budget)
        assert chosen is not None and total_bytes(chosen) <= budget and list(chosen) == list(options)
        assert total_kl(chosen) == pytest.approx(best, rel=1e-12)
    assert within_bytes(options, low - 1) is None


def test_the_fewest_bytes_for_so_much_kl(options: dict[str, list[Option]]) -> None:
    choices = every_choice(options)
    low, high = (total_kl(end(options)) for end in (closest, smallest))
    for budget in np.linspace(low * (1 + 1e-9), high, 9):
        chosen = within_kl(options, float(budget))
        best = min(total_bytes(choice) for choice in choices if total_kl(choice) <= budget)
        assert chosen is not None and total_kl(chosen) <= budget * (1 + 1e-12)
        assert total_bytes(chosen) == best
    assert within_kl(options, low * 0.999) is None


def test_large_matrices_leave_little_unspent() -> None:
    """A model of 300 matrices of 1 to 30 MB: steps of the knapsack cost less than half a percent of the budget."""
    generator = np.random.default_rng(0)
    options = {}
    for name in map(str, range(300)):
        size, kl = int(generator.integers(10**6, 3 * 10**7)), float(generator.exponential(1e-3))
        factors = zip(GRIDS, (1, 1.07, 1.16, 1.95), (1.6, 1, 0.75, 0.005), strict=True)
        options[name] = [Option(grid, int(size * larger), kl * less) for grid, larger, less in factors]
    low, high = (total_bytes(end(options)) for end in (smallest, closest))
    chosen = within_bytes(options, budget := (low + high) // 2)
    assert chosen is not None and 0.995 * budget < total_bytes(chosen) <= budget
