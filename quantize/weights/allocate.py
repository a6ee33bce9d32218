"""Spend a budget on matrices: of the options that each has, choose those that lose least in so many bytes.

The KL divergence that a model loses is nearly the sum of what each matrix causes alone: the loss is quadratic in small
errors, and errors of different matrices are hardly correlated. So the choice is a knapsack with one option of each
matrix. Dynamic programming solves it for all budgets at once, up to the resolution of the bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from cuantiza.quantize.weights.rounding import Grid

# Into how many steps the bytes between the smallest and the largest choice are divided. Bytes are rounded up to steps,
# so a model of n matrices may leave n / 2 steps of a budget unspent, on average.
_STEPS = 20_000


@dataclass(frozen=True)
class Option:
    """A grid for a matrix: the bytes of its integers and scales, and the KL, nats per token, that it is expected to cause."""

    grid: Grid
    bytes: int
    kl: float


# The options of each matrix, by its name.
Options = dict[str, list[Option]]


def total_bytes(chosen: Mapping[str, Option]) -> int:
    """Return the bytes of all matrices of `chosen`."""
    return sum(option.bytes for option in chosen.values())


def total_kl(chosen: Mapping[str, Option]) -> float:
    """Return the KL that all matrices of `chosen` are expected to cause together: the sum, in nats per token."""
    return sum(option.kl for option in chosen.values())


def smallest(options: Options) -> dict[str, Option]:
    """Choose the option of fewest bytes for each matrix."""
    return {name: min(some, key=lambda option: (option.bytes, option.kl)) for name, some in options.items()}


def closest(options: Options) -> dict[str, Option]:
    """Choose the option of least KL for each matrix."""
    return {name: min(some, key=lambda option: (option.kl, option.bytes)) for name, some in options.items()}


def within_bytes(options: Options, budget: int) -> dict[str, Option] | None:
    """Choose the options of least KL that take at most `budget` bytes together; None if even the smallest take more."""
    left = budget - total_bytes(smallest(options))
    if left < 0:
        return None
    step, _, picks = _solve(options)
    return _follow(options, step, picks, min(left // step, _STEPS))


def within_kl(options: Options, budget: float) -> dict[str, Option] | None:
    """Choose the options of fewest bytes that cause a KL of at most `budget` together; None if no choice does."""
    if total_kl(closest(options)) > budget:
        return None
    step, least, picks = _solve(options)
    enough = np.flatnonzero(least <= budget)
    return _follow(options, step, picks, int(enough[0])) if len(enough) else closest(options)


def _solve(options: Options) -> tuple[int, np.ndarray, list[np.ndarray]]:
    """Return (bytes of a step, the least KL [S + 1] for up to s steps above the smallest choice, the picks).

    The picks have, for each matrix, the number of its option [S + 1] in the best choice for it and those before it.
    """
    base = smallest(options)
    most = sum(max(option.bytes for option in some) for some in options.values())
    step = max(1, -(-(most - total_bytes(base)) // (_STEPS - len(options))))
    least, picks = np.zeros(_STEPS + 1), []
    for name, some in options.items():
        candidates = np.full((len(some), _STEPS + 1), np.inf)
        for row, option in zip(candidates, some, strict=True):
            steps = -(-(option.bytes - base[name].bytes) // step)
            row[steps:] = least[: len(row) - steps] + option.kl
        picks.append(candidates.argmin(axis=0).astype(np.int8))
        least = candidates.min(axis=0)
    return step, least, picks


def _follow(options: Options, step: int, picks: list[np.ndarray], steps: int) -> dict[str, Option]:
    """Collect the choice for `steps` steps from the last matrix to the first."""
    base, chosen = smallest(options), {}
    for (name, some), pick in zip(reversed(options.items()), reversed(picks), strict=True):
        option = chosen[name] = some[pick[steps]]
        steps -= -(-(option.bytes - base[name].bytes) // step)
    return {name: chosen[name] for name in options}
