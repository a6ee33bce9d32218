"""Measure the latency of base and head, interleaved sample by sample.

Each round opens both files in new processes, which take turns at every shape. So whatever slows the machine for longer
than two samples slows both. Some effects last as long as a process: the same file can be a fifth faster in one process
than in the next. They change from round to round, so a round counts as one observation.

Because both sessions are open at once, their idle threads do not spin. Short steps are therefore a little slower than
in `make eval`, on both sides.
"""

from __future__ import annotations

import copy
import math
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from cuantiza.core.machine.process import Remote
from cuantiza.core.machine.progress import track
from cuantiza.eval.compare.reports import figure
from cuantiza.eval.measure.engines import FILL_TOKENS, Engine, Subject
from cuantiza.eval.measure.latency import shapes

# The pairs of samples of a shape in a round: at most PREFILL_PAIRS or DECODE_PAIRS, at least LEAST_PAIRS, in between as
# many as BUDGET_NS allows. All are even, so that each side begins equally often.
PREFILL_PAIRS, DECODE_PAIRS, LEAST_PAIRS, BUDGET_NS = 8, 24, 4, 1_000_000_000


@dataclass(frozen=True)
class Pair:
    """The ONNX files of one recipe in base and in head."""

    recipe: str
    base: Path
    head: Path


@dataclass(frozen=True)
class Timed:
    """One figure of a recipe: ln(head's time / base's time) of each round, and the median times in ms of both."""

    ln_ratios: list[float]
    base_ms: float
    head_ms: float


class Stepper(Engine):
    """A loaded model that takes one sample at a time."""

    _cache: Any = None
    _capacity = 0

    def place(self, ids: np.ndarray, start: int, end: int, capacity: int) -> None:
        """Prepare to time the tokens from `start` to `end` of ids [N], after a KV cache of `start` tokens.

        The cache has room for `capacity` tokens. One sample is taken as a warm-up.
        """
        if self._cache is None or self._cache.length > start or self._capacity != capacity:
            self._cache, self._capacity = self._runtime.cache(1, capacity), capacity
        while self._cache.length < start:
            self._runtime.step(
                self._cache, ids[None, self._cache.length : min(self._cache.length + FILL_TOKENS, start)]
            )
        self._ids = ids[None, start:end]
        self.sample()

    def sample(self) -> int:
        """Return the nanoseconds of the step. It runs on a copy of the cache, so the cache does not advance."""
        again = copy.copy(self._cache)
        start = time.perf_counter_ns()
        self._runtime.step(again, self._ids)
        return time.perf_counter_ns() - start


def measure_pairs(
    pairs: list[Pair], ids: np.ndarray, longest: int, rounds: int, threads: int, label: str
) -> dict[str, dict[str, Timed]]:
    """Measure `pairs` in `rounds` rounds with the real tokens `ids` [longest]; return {recipe: {figure: Timed}}.

    Raises UserError as Remote does.
    """
    found: dict[str, list[dict[str, np.ndarray]]] = {pair.recipe: [] for pair in pairs}
    order = [(number, pair) for number in range(rounds) for pair in pairs]
    for number, pair in track(order, label, len(order)):
        found[pair.recipe].append(_round(pair, ids, longest, threads, head_first=number % 2 == 1))
    return {recipe: {name: _timed([run[name] for run in runs]) for name in runs[0]} for recipe, runs in found.items()}


def figures(longest: int) -> int:
    """Count the latency figures of a recipe, for a model with `longest` positions."""
    prefill, decode = shapes(longest)
    return len(prefill) + len(decode)


def _round(pair: Pair, ids: np.ndarray, longest: int, threads: int, head_first: bool) -> dict[str, np.ndarray]:
    """Measure `pair` in one new process for each side; return {figure: times in ns [samples, 2] of base and head}."""
    prefill, decode = shapes(longest)
    steps = [(figure("prefill", count), 0, count, count, PREFILL_PAIRS) for count in prefill]
    steps += [(figure("decode", at), at, at + 1, max(decode) + 1, DECODE_PAIRS) for at in decode]
    sides = [
        Subject(f"{pair.recipe} of {side}", "onnx", path) for side, path in (("BASE", pair.base), ("HEAD", pair.head))
    ]
    first, second = sides[::-1] if head_first else sides
    with (
        Remote(Stepper, first, threads, label=first.name) as one,
        Remote(Stepper, second, threads, label=second.name) as other,
    ):
        times = {}
        for name, start, end, capacity, most in steps:
            for remote in (one, other):
                remote.call("place", ids, start, end, capacity)
            taken = np.asarray(_turns(one, other, most), float)
            times[name] = taken[:, ::-1] if head_first else taken
    return times


def _turns(one: Remote, other: Remote, most: int) -> list[tuple[int, int]]:
    """Take pairs of samples in ns, (`one`, `other`); each of the two begins every second pair."""
    taken: list[tuple[int, int]] = []
    while len(taken) < LEAST_PAIRS or (len(taken) < most and sum(map(sum, taken)) < BUDGET_NS):
        taken.append((one.call("sample"), other.call("sample")))
        later = other.call("sample")
        taken.append((one.call("sample"), later))
    return taken


def _timed(rounds: list[np.ndarray]) -> Timed:
    """Summarize `rounds`, each times in ns [samples, 2].

    A round's ratio is the median over its pairs, so that a pair that was interrupted does not change it.
    """
    ratios = [float(np.median(np.log(times[:, 1] / times[:, 0]))) for times in rounds]
    base, head = np.concatenate(rounds).T
    if not all(map(math.isfinite, ratios)):
        raise ValueError(f"times of a round: {rounds}")
    return Timed(ratios, median(base) / 1e6, median(head) / 1e6)
