"""A loaded model that is measured in a process of its own: an ONNX artifact or a PyTorch model, behind one interface.

Both runtimes have forward, extend and empty_past (core/runtime.py, eval/torch_baseline.py).
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from core.runtime import Runtime
from eval.subject import Subject

# A cache is filled in pieces, so that it takes no more memory than the prefills that are measured.
FILL_TOKENS = 512
# Of each shape in each round: one run to warm up, then samples until there are enough, or until the time is up.
PREFILL_SAMPLES, DECODE_SAMPLES, LEAST_SAMPLES, BUDGET_NS = 5, 20, 2, 1_000_000_000


class Engine:
    """A loaded model. Made in a child process by `core.process.Remote(Engine, subject, threads)`."""

    def __init__(self, subject: Subject, threads: int) -> None:
        make = _maker(subject, threads)
        start = time.perf_counter_ns()
        self._runtime: Any = make()
        self._load_ns = time.perf_counter_ns() - start

    def logits(self, ids: np.ndarray) -> np.ndarray:
        """Logits float32 [T, V] of token ids int64 [T]."""
        return self._runtime.forward(ids[None])[0]

    def continue_greedy(self, ids: list[int], count: int) -> list[int]:
        """The `count` tokens that follow `ids` when the likeliest is taken each time, through the cache."""
        out: list[int] = []
        step, past = np.asarray([ids], np.int64), self._runtime.empty_past(1)
        for _ in range(count):
            logits, past = self._runtime.extend(step, past)
            step = logits[:, -1:].argmax(axis=-1)
            out.append(int(step[0, 0]))
        return out

    def measure(self, ids: np.ndarray, prefill: list[int], decode: list[int]) -> dict:
        """Raw samples in ns: {load_ns, prefill: {tokens: [..]}, decode: {position: [..]}, peak_rss_bytes}.

        Batch of 1, real tokens `ids` [N]. A prefill of n tokens gives all n logits and the cache; a decode
        at position p feeds one token behind a cache of p. Tokenizing and sampling are not timed.
        """

        def prefill_once(count: int) -> None:
            self._runtime.extend(ids[None, :count], self._runtime.empty_past(1))

        samples: dict = {"prefill": {}, "decode": {}}
        for count in prefill:
            samples["prefill"][count] = _time(lambda count=count: prefill_once(count), PREFILL_SAMPLES)
        past, filled = self._runtime.empty_past(1), 0
        for position in sorted(decode):
            while filled < position:
                chunk = ids[None, filled : min(filled + FILL_TOKENS, position)]
                _, past = self._runtime.extend(chunk, past)
                filled += chunk.shape[1]
            step = lambda past=past, position=position: self._runtime.extend(ids[None, position : position + 1], past)  # noqa: E731
            samples["decode"][position] = _time(step, DECODE_SAMPLES)
        return samples | {"load_ns": self._load_ns, "peak_rss_bytes": peak_rss_bytes()}

    def describe(self) -> dict:
        """What the subject says of itself beyond its files (PyTorch: bytes of its weights, modules quantized)."""
        return self._runtime.describe() if hasattr(self._runtime, "describe") else {}


def peak_rss_bytes() -> int:
    """Largest resident set that this process had.

    Linux's getrusage carries the parent's peak over into a child, so its own status file is read there.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _maker(subject: Subject, threads: int) -> Callable[[], Any]:
    """How to load `subject`; everything that loading imports is imported before its time is taken."""
    if subject.kind == "onnx":
        return lambda: Runtime(subject.path, threads)
    from eval.torch_baseline import TorchRuntime

    return lambda: TorchRuntime(subject.path, threads, quantized=subject.kind == "torch-dynamic")


def _time(run: Callable[[], object], most: int) -> list[int]:
    run()
    samples: list[int] = []
    while len(samples) < LEAST_SAMPLES or (len(samples) < most and sum(samples) < BUDGET_NS):
        start = time.perf_counter_ns()
        run()
        samples.append(time.perf_counter_ns() - start)
    return samples
