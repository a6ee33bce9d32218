"""How often `make compare` raises an alarm of latency by chance, and whether it sees what is slower, on simulated times."""

from __future__ import annotations

import math

import numpy as np
import pytest

from cuantiza.eval.compare.decide import FALSE_ALARMS, FIRST_LEVEL, check_latency, confirmed, second_level
from cuantiza.eval.compare.folders import CONFIRMING_ROUNDS
from cuantiza.eval.compare.intervals import signed_rank

FIGURES = 7  # latencies of a recipe


def simulated(generator: np.random.Generator, rounds: int, ln_ratio: float, wild: float = 0.0) -> np.ndarray:
    """ln ratios [rounds, figures]: two speeds of either process, a little noise, and a share of wild rounds."""
    speeds = math.log(1.2) * (generator.random((2, rounds, 1)) < 0.5)
    ratios = ln_ratio + speeds[1] - speeds[0] + generator.normal(0, 0.05, (rounds, FIGURES))
    return ratios + (generator.random(ratios.shape) < wild) * generator.normal(0, 1.0, ratios.shape)


def alarms(seed: int, times: int, ln_ratio: float, wild: float = 0.0) -> tuple[int, int]:
    """(comparisons whose first stage looks bad, comparisons that raise an alarm) of `times` of two recipes each."""
    generator, looked, alarmed = np.random.default_rng(seed), 0, 0
    level = second_level(2 * FIGURES)

    def stage_of(rounds: int, level: float) -> list:
        times = simulated(generator, rounds, ln_ratio, wild)
        return [check_latency("q", str(number), (1, 1), column, level, 0.1) for number, column in enumerate(times.T)]

    for _ in range(times):
        found = []
        for _ in range(2):
            first = stage_of(8, FIRST_LEVEL)
            if any(check.regression for check in first):
                second = stage_of(CONFIRMING_ROUNDS, level)
                first = [confirmed(one, two) if one.regression else one for one, two in zip(first, second, strict=True)]
                looked += 1
            found += first
        alarmed += any(check.regression for check in found)
    return looked, alarmed


def test_identical_files_raise_no_alarm():
    looked, alarmed = alarms(seed=1, times=2000, ln_ratio=0.0)
    assert alarmed == 0 and looked > 0  # and the second stage had something to put right


@pytest.mark.parametrize("wild", [0.0, 0.1])
def test_at_the_budget_alarms_are_as_rare_as_promised(wild):
    looked, alarmed = alarms(seed=2, times=1000, ln_ratio=math.log(1.1), wild=wild)
    promised = FALSE_ALARMS * 1000
    assert alarmed <= promised + 3 * math.sqrt(promised) and looked > 100


def test_thirty_percent_slower_is_seen():
    assert alarms(seed=4, times=300, ln_ratio=math.log(1.3))[1] >= 0.95 * 300


def test_bounds_cover_two_speeds():
    """Each bound, at its level, over processes of two speeds."""
    generator = np.random.default_rng(5)
    for rounds, level in ((8, 0.1), (20, 0.05)):
        lows = [signed_rank(simulated(generator, rounds, 0.2)[:, 0], level).low > 0.2 for _ in range(2000)]
        assert 0.2 * level < np.mean(lows) < 1.2 * level
