"""Text that the model writes itself, to calibrate on where there is no other: `CORPUS=self`.

LLM-QAT (arXiv 2305.17888) showed that a model's own samples stand in for its training text. Each window begins with the
start token, as every scored text does, and each further token is drawn from the model's whole distribution (temperature
1), so that windows are as varied as what the model learned.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from cuantiza.core.inputs.model_config import end_tokens, start_token
from cuantiza.core.machine.hardware import default_threads
from cuantiza.core.machine.progress import track
from cuantiza.core.run.runtime import Runtime
from cuantiza.core.run.sampling import Sampling, draw
from cuantiza.core.store import artifact

# How many windows are written at a time on one thread. It is fixed, as the last bit of a logit may depend on it.
GROUP = 4
# How many groups at most are written at once: each has a KV cache of its own.
_GROUPS_AT_ONCE = 4


def own_windows(folder: Path, seed: int, count: int, length: int) -> np.ndarray:
    """Return `count` windows int64 [n, T] of `length` tokens that the fp32 artifact in `folder` writes.

    Window i depends on the model, `seed` and i alone: on any number of processors of one kind it has the same tokens,
    because every matmul runs on one thread, and more windows begin with the same ones. Where a token ends a text, the
    start token of the next one stands in its place, as in the streams that models are trained on. Raises UserError if
    the model's logits are not numbers.
    """
    runtime = Runtime(folder / artifact.MODEL, threads=1)
    start, end = start_token(folder), end_tokens(folder)
    groups = [range(first, first + GROUP) for first in range(0, count, GROUP)]
    with ThreadPoolExecutor(min(default_threads(), _GROUPS_AT_ONCE)) as pool:
        written = pool.map(lambda numbers: _write(runtime, seed, numbers, length, start, end), groups)
        return np.concatenate(list(track(written, "write", len(groups))))[:count]


def _write(runtime: Runtime, seed: int, numbers: range, length: int, start: int, end: frozenset[int]) -> np.ndarray:
    """The windows of these numbers, int64 [n, length], each drawn with a generator of its own."""
    generators = [np.random.default_rng([seed, number]) for number in numbers]
    windows = np.full((len(numbers), length), start, np.int64)
    cache, sampling = runtime.cache(len(numbers), length), Sampling()
    for at in range(1, length):
        logits = runtime.step(cache, windows[:, at - 1 : at])
        for window, row, generator in zip(windows, logits, generators, strict=True):
            token = draw(row, [], sampling, generator)
            window[at] = start if token in end else token
    return windows
