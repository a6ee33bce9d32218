"""Measures the machine's peak memory bandwidth and arithmetic, and computes the least that a model needs of both.

`python -m lab.bench.limits THREADS` prints the measurement as JSON. It runs in a process of its own, because BLAS must
be limited to one thread before it is loaded.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from cuantiza.core.machine.child import run
from cuantiza.core.run.runtime import open_session
from lab import ROOT
from lab.bench.child import command
from lab.checkpoints.shapes import Shape

# This many bytes do not fit into any cache. Each thread reads its part by a dot product with itself, which reached the
# highest bandwidth of all that was tried: dot products of two arrays, sums and maxima in NumPy, reductions and
# matrix-vector products in ONNX Runtime.
READ_BYTES = 2**29
# Side of the square matrices that are multiplied; they do not fit into the cache of one core.
SIDE = 2048
REPEATS = 6


@dataclass(frozen=True)
class Limits:
    """The highest rates that were measured with `threads` threads. A multiplication or an addition is one operation."""

    threads: int
    read_bytes_per_second: float
    fp32_ops_per_second: float
    int8_ops_per_second: float


def measure(threads: int) -> Limits:
    """Measure this machine's current limits in a process of its own. Raises child.Failed."""
    alone = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    answer = run(command(Path(sys.executable), "lab.bench.limits", threads), timeout=300, cwd=ROOT, environment=alone)
    return Limits(**json.loads(answer))


def best(found: list[Limits]) -> Limits:
    """The highest rate of each kind in several measurements, because a disturbance can only lower a rate."""
    return Limits(*(max(column) for column in zip(*(asdict(item).values() for item in found), strict=True)))


def decode_bytes(shape: Shape, weight_bytes: int, cache_bytes: int, position: int, batch: int = 1) -> int:
    """Bytes that one decode step at `position` must read: all weights once, and every sequence's KV cache.

    `weight_bytes` is the size of the row's files. The embedding is read completely, because it is the tied head too.
    The position embedding is not, but it is under 1 %. `cache_bytes` is the size of one element of keys and values.
    """
    return weight_bytes + batch * 2 * shape.layers * shape.key_width * position * cache_bytes


def prefill_ops(shape: Shape, tokens: int, batch: int = 1) -> int:
    """Multiplications and additions of a prefill of T = `tokens` tokens.

    They are those of all linear layers for each token, of attention as if nothing were masked (4·T²·D per layer, where D
    is the width of queries), and of the head for one position.
    """
    linear_layers = 2 * shape.body_parameters * tokens
    attention = 4 * tokens**2 * shape.query_width * shape.layers
    head = 2 * shape.vocabulary * shape.width
    return batch * (linear_layers + attention + head)


def decode_share(
    shape: Shape, limits: Limits, weight_bytes: int, cache_bytes: int, position: int, batch: int, ns: float
) -> float:
    """Share of the machine's memory bandwidth that a decode step of `ns` nanoseconds reaches; 1 is the limit."""
    needed = decode_bytes(shape, weight_bytes, cache_bytes, position, batch)
    return needed / limits.read_bytes_per_second / (ns / 1e9)


def prefill_share(shape: Shape, limits: Limits, precision: str, tokens: int, batch: int, ns: float) -> float:
    """Share of the arithmetic peak that a prefill of `ns` nanoseconds reaches.

    The peak is that of int8 if the weights are integers, otherwise that of fp32.
    """
    peak = limits.int8_ops_per_second if precision in ("int8", "int4") else limits.fp32_ops_per_second
    return prefill_ops(shape, tokens, batch) / peak / (ns / 1e9)


def _read_bytes_per_second(threads: int) -> float:
    parts = [np.ones(READ_BYTES // 4 // threads, np.float32) for _ in range(threads)]
    with ThreadPoolExecutor(threads) as pool:
        return READ_BYTES / _shortest(lambda: list(pool.map(np.dot, parts, parts)))


def _ops_per_second(node: str, left: np.ndarray, right: np.ndarray, result: str, threads: int) -> float:
    """Operations per second of the square matmul `node` in ONNX Runtime; `right` is a weight, as in a model."""
    side, kinds = len(left), {"float32": "float", "uint8": "uint8", "int8": "int8"}
    model = onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["": 21]> peak ({kinds[left.dtype.name]}[{side}, {side}] left) '
        f"=> ({result}[{side}, {side}] out) {{ out = {node} (left, right) }}"
    )
    model.graph.initializer.append(numpy_helper.from_array(right, "right"))
    with tempfile.TemporaryDirectory() as folder:
        onnx.save(model, Path(folder) / "peak.onnx")
        session = open_session(Path(folder) / "peak.onnx", threads)
    return 2 * side**3 / _shortest(lambda: session.run(None, {"left": left}))


def _shortest(work: Callable[[], object]) -> float:
    """Seconds that the fastest of REPEATS runs of `work` takes, after one run to warm up."""
    work()
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def _measure_here(threads: int) -> Limits:
    rng = np.random.default_rng(0)
    floats = rng.standard_normal((SIDE, SIDE), np.float32)
    unsigned = rng.integers(0, 256, (SIDE, SIDE), np.uint8)
    signed = rng.integers(-127, 128, (SIDE, SIDE), np.int8)
    return Limits(
        threads,
        _read_bytes_per_second(threads),
        _ops_per_second("MatMul", floats, floats, "float", threads),
        _ops_per_second("MatMulInteger", unsigned, signed, "int32", threads),
    )


if __name__ == "__main__":
    print(json.dumps(asdict(_measure_here(int(sys.argv[1])))))
