"""One interface to an ONNX artifact or a PyTorch model that is loaded and measured in a process of its own.

Both runtimes have the methods forward, cache and step (cuantiza/core/run/runtime.py, eval/measure/torch_engine.py).
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from cuantiza.core.machine.hardware import peak_rss_bytes
from cuantiza.core.run.runtime import Runtime
from cuantiza.core.run.sampling import Sampling, generate
from cuantiza.core.run.session_options import session_options

# The KV cache is filled in pieces of this length, so that it takes no more memory than the prefills that are measured.
FILL_TOKENS = 512
GREEDY = Sampling(temperature=0)
# In each round, each shape has one run to warm up, then samples until there are enough of them or the time is up.
PREFILL_SAMPLES, DECODE_SAMPLES, LEAST_SAMPLES, BUDGET_NS = 5, 20, 2, 1_000_000_000


@dataclass(frozen=True)
class Subject:
    """A model to measure. `kind` is onnx, torch or torch-dynamic; `path` an ONNX file, or the folder of a checkpoint."""

    name: str
    kind: Literal["onnx", "torch", "torch-dynamic"]
    path: Path


class Engine:
    """A loaded model. `cuantiza.core.machine.process.Remote(Engine, subject, threads)` makes it in a child process.

    `alone` says that nothing else runs at the same time, so that idle worker threads may spin.
    """

    def __init__(self, subject: Subject, threads: int, alone: bool = False) -> None:
        make = _maker(subject, threads, alone)
        start = time.perf_counter_ns()
        self._runtime: Any = make()
        self._load_ns = time.perf_counter_ns() - start

    def logits(self, ids: np.ndarray, last: int = 0) -> np.ndarray:
        """Return the logits float32 [n, V] of the `last` n token ids of int64 [T] (0: all of them)."""
        return self._runtime.forward(ids[None], last=last)[0]

    def keys(self, ids: np.ndarray) -> list[np.ndarray] | None:
        """Return the keys [1, H, T, d] of every layer for token ids [T]; None if the runtime does not expose them."""
        if not isinstance(self._runtime, Runtime):
            return None
        return [value.numpy() for value in self._runtime.run(ids[None])[1::2]]

    def continue_greedy(self, ids: list[int], count: int) -> list[int]:
        """Return `count` tokens that continue `ids`, the likeliest each time, computed with the KV cache."""
        return list(generate(self._runtime, ids, count, GREEDY))

    def measure(self, ids: np.ndarray, prefill: list[int], decode: list[int]) -> dict:
        """Return raw samples in ns: {load_ns, prefill: {tokens: [..]}, decode: {position: [..]}, peak_rss_bytes}.

        `session_options` are those of the session that was measured; PyTorch has none.

        The batch is 1, and the tokens `ids` [N] are real text. A prefill of n tokens computes the logits of the last
        token and the KV cache. A decode at position p feeds one token after a cache of p tokens. Tokenizing and
        sampling are not timed.
        """
        samples: dict = {"prefill": {}, "decode": {}}
        for count in prefill:
            cache = self._runtime.cache(1, count)
            samples["prefill"][count] = self._time(cache, ids[:count], PREFILL_SAMPLES)
        cache = self._runtime.cache(1, max(decode) + 1)
        for position in sorted(decode):
            while cache.length < position:
                self._runtime.step(cache, ids[None, cache.length : min(cache.length + FILL_TOKENS, position)])
            samples["decode"][position] = self._time(cache, ids[position : position + 1], DECODE_SAMPLES)
        set_options = session_options(self._runtime.session) if isinstance(self._runtime, Runtime) else {}
        alone = {"load_ns": self._load_ns, "peak_rss_bytes": peak_rss_bytes(), "session_options": set_options}
        return samples | alone

    def _time(self, cache: Any, ids: np.ndarray, most: int) -> list[int]:
        """Return samples in ns of the same step after `cache`. The step runs on copies, so `cache` does not advance."""
        samples: list[int] = []
        self._runtime.step(copy.copy(cache), ids[None])
        while len(samples) < LEAST_SAMPLES or (len(samples) < most and sum(samples) < BUDGET_NS):
            again = copy.copy(cache)
            start = time.perf_counter_ns()
            self._runtime.step(again, ids[None])
            samples.append(time.perf_counter_ns() - start)
        return samples

    def describe(self) -> dict:
        """Return what only the runtime knows of the subject (PyTorch: bytes of weights, quantized modules)."""
        return self._runtime.describe() if hasattr(self._runtime, "describe") else {}


def _maker(subject: Subject, threads: int, alone: bool) -> Callable[[], Any]:
    """Return a function that loads `subject`. Its imports are done here, so that they are not part of the load time."""
    if subject.kind == "onnx":
        return lambda: Runtime(subject.path, threads, spin=alone)
    from cuantiza.core.inputs.weights.pytorch import pytorch_loader
    from cuantiza.eval.measure.torch_engine import TorchRuntime

    # Which files there are, and whether they need repair, is not part of the load time either.
    advice = "; leave the PyTorch rows out with --without-torch (EVAL=--without-torch)"
    load = pytorch_loader(subject.path, advice=advice)
    return lambda: TorchRuntime(load, threads, quantized=subject.kind == "torch-dynamic")
