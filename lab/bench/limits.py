"""What the machine can do at best, measured, and what a token needs of it at least.

`python -m lab.bench.limits THREADS` prints the measurement as JSON; its process is its own, so that BLAS can be held to
one thread each.
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
from lab.checkpoints.random import Shape

# Far beyond any cache. Each thread reads its part by a dot product with itself: of what was tried (dot products of two
# arrays, sums and maxima in NumPy, reductions and matrix-vector products in ONNX Runtime) it reaches the most.
READ_BYTES = 2**29
# Of a square product, which fits no cache of one core.
SIDE = 2048
REPEATS = 6


@dataclass(frozen=True)
class Limits:
    """The most that was seen of each, with `threads` threads; an operation is a multiplication or an addition."""

    threads: int
    read_bytes_per_second: float
    fp32_ops_per_second: float
    int8_ops_per_second: float


def measure(threads: int) -> Limits:
    """The limits of this machine now, measured in a process of its own. Raises child.Failed."""
    alone = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    answer = run(command(Path(sys.executable), "lab.bench.limits", threads), timeout=300, cwd=ROOT, environment=alone)
    return Limits(**json.loads(answer))


def best(found: list[Limits]) -> Limits:
    """The most of several measurements: what disturbs one only lowers it."""
    return Limits(*(max(column) for column in zip(*(asdict(item).values() for item in found), strict=True)))


def decode_bytes(shape: Shape, weight_bytes: int, cache_bytes: int, position: int, batch: int = 1) -> int:
    """Bytes that one decode step at `position` has to read: all weights once, and every sequence's keys and values.

    `weight_bytes` is the size of the row's files: the embedding is the head too, so all of it is needed (but for the
    table of positions, under 1 %). `cache_bytes` are those of one element of keys and values.
    """
    return weight_bytes + batch * 2 * shape.layers * shape.width * position * cache_bytes


def prefill_ops(shape: Shape, tokens: int, batch: int = 1) -> int:
    """Multiplications and additions of a prefill of `tokens` tokens.

    All projections for each token, attention as full squares (4·T²·D a layer, as if nothing were masked), and the
    head for one position.
    """
    projections = 2 * shape.body_parameters * tokens
    attention = 4 * tokens**2 * shape.width * shape.layers
    head = 2 * shape.vocabulary * shape.width
    return batch * (projections + attention + head)


def decode_share(
    shape: Shape, limits: Limits, weight_bytes: int, cache_bytes: int, position: int, batch: int, ns: float
) -> float:
    """Share of the memory limit that a decode step of `ns` reaches; 1 is the limit itself."""
    needed = decode_bytes(shape, weight_bytes, cache_bytes, position, batch)
    return needed / limits.read_bytes_per_second / (ns / 1e9)


def prefill_share(shape: Shape, limits: Limits, precision: str, tokens: int, batch: int, ns: float) -> float:
    """Share of the peak that a prefill of `ns` reaches: int8's for weights in integers, else fp32's."""
    peak = limits.int8_ops_per_second if precision in ("int8", "int4") else limits.fp32_ops_per_second
    return prefill_ops(shape, tokens, batch) / peak / (ns / 1e9)


def _read_bytes_per_second(threads: int) -> float:
    parts = [np.ones(READ_BYTES // 4 // threads, np.float32) for _ in range(threads)]
    with ThreadPoolExecutor(threads) as pool:
        return READ_BYTES / _shortest(lambda: list(pool.map(np.dot, parts, parts)))


def _ops_per_second(node: str, left: np.ndarray, right: np.ndarray, result: str, threads: int) -> float:
    """Of the square product `node` in ONNX Runtime, its right side a weight, as in a model."""
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
    """Seconds of the shortest of REPEATS runs, after one to warm up."""
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
