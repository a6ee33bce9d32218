"""Calibration: run the model block by block on calibration windows, and decide how to quantize each linear layer.

Each block runs on the windows once, and is smoothed according to the activations that were seen. A static recipe runs
the smoothed block again, to collect histograms of its activations. Then the weights of the block are rounded. Only
sums, histograms and a sample of the activations are kept.

The last bits of a matmul depend on the number of threads that BLAS splits it over, and such a bit can change which way
a 4-bit weight is rounded. So each matmul has one thread, and the processors work on different tensors instead: the
result has the same bytes on any number of processors.
"""

from __future__ import annotations

import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from threadpoolctl import threadpool_limits

from cuantiza.core.errors import UserError
from cuantiza.core.inputs.corpus import SELF, Split, full_windows, stream
from cuantiza.core.inputs.model_config import end_tokens, max_positions, read_config, start_token
from cuantiza.core.inputs.tokenizer import encode, load_tokenizer, markers
from cuantiza.core.machine.hardware import default_threads
from cuantiza.core.machine.progress import track
from cuantiza.quantize.decide import smooth
from cuantiza.quantize.decide.activation import ROW_ZERO_POINTS, Activation, PerRow, PerTensor, matmul_error
from cuantiza.quantize.decide.blocks import Block, open_block, split
from cuantiza.quantize.decide.decision import Decision, Plan
from cuantiza.quantize.decide.gptq import gptq
from cuantiza.quantize.decide.observations import Histogram, Moments
from cuantiza.quantize.decide.ranges import RANGES
from cuantiza.quantize.decide.rounding import IntWeight, round_to_nearest, rounding_noise
from cuantiza.quantize.own_text import own_windows
from cuantiza.quantize.rewrite.find import Projection, find_tables
from cuantiza.quantize.settings import Calibration

# Shares of the full range for which the searches below estimate the error. The final range comes from the histogram.
_SHARES = (1.0, 0.8, 0.6, 0.4, 0.2)
# Keep channels in float only if that at least halves the matmul's error (`_PAYS`). Each further channel must lower it
# by another 10 % (`_MORE`).
_PAYS, _MORE = 0.5, 0.9


def calibration_windows(folder: Path, split: Split, calibration: Calibration) -> np.ndarray:
    """Return token windows int64 [n, T] of `split`, all of them full: text without padding.

    Each document begins with a start token. T is at most the model's number of positions. The model in `folder` writes
    the text where the split has a seed. Raises UserError where there are fewer windows than the calibration needs.
    """
    length = min(calibration.tokens, max_positions(read_config(folder)))
    if split.seed is not None:
        return own_windows(folder, split.seed, calibration.windows, length)
    tokenizer, start = load_tokenizer(folder), start_token(folder)
    marked = markers(tokenizer, {start, *end_tokens(folder)})
    tokens = stream(encode(tokenizer, split.documents, length * calibration.windows, marked), start)
    windows = full_windows(tokens, length)[: calibration.windows]
    if len(windows) < calibration.minimum:
        raise UserError(
            f"CORPUS=: its calibration split has {len(tokens)} tokens, {len(windows)} windows of {length}; "
            f"calibration needs at least {calibration.minimum}: give more text, or CORPUS={SELF} for text that the model writes"
        )
    return windows


def calibrate(
    model: ir.Model, windows: np.ndarray, plan: Plan, work: Path, until: str | None = None
) -> dict[str, Decision]:
    """Decide how to quantize every linear layer of `model`; return the decisions by layer name.

    `model` is smoothed in place, which does not change what it computes. `windows` are int64 [n, T]; `work` is a folder
    for temporary files. If `until` names a linear layer, the block that contains it is the last one.
    """
    with threadpool_limits(1, "blas"), ThreadPoolExecutor(default_threads()) as pool:
        return _calibrate(model, windows, plan, work, until, pool)


def _calibrate(
    model: ir.Model, windows: np.ndarray, plan: Plan, work: Path, until: str | None, pool: ThreadPoolExecutor
) -> dict[str, Decision]:
    tables = find_tables(model.graph)
    groups = smooth.find_groups(model.graph) if plan.alphas else {}
    before: list[np.ndarray | None] = [None] * len(windows)
    decisions: dict[str, Decision] = {}
    blocks = split(model.graph)
    for block in track(blocks, "calibrate", len(blocks)):
        with_gram = plan.rounding == "gptq" and any(p.weight not in tables for p in block.projections)
        moments, after = _observe(model, block, windows, before, with_gram, work, pool)
        tensors = list(
            pool.map(lambda name: _tensor(name, block, moments[name], groups.get(name), tables, plan), moments)  # noqa: B023
        )
        for tensor in tensors:
            if tensor.group is not None:
                smooth.apply(model.graph, tensor.group, tensor.smoothing)
        histograms = _histograms(model, block, windows, before, tensors, work) if _is_static(plan) else {}
        inputs = [(projection, tensor) for tensor in tensors for projection in tensor.projections]
        decided = pool.map(
            lambda both: _decide(both[0], both[1], histograms.get(both[1].name), tables, plan, work),  # noqa: B023
            inputs,
        )
        decisions |= {projection.name: decision for (projection, _), decision in zip(inputs, decided, strict=True)}
        if until in decisions:
            break
        before = after
    return decisions


@dataclass(frozen=True)
class _Tensor:
    """The input x [.., K] of one or more linear layers, after smoothing and before its range is chosen.

    `moments` are those of x after smoothing. `weight_energy` [K] = Σₙ W² is that of the weights before smoothing.
    `keep` bool [K] marks the channels that stay in the int8 matmul; the others stay in floating point.
    """

    name: str
    projections: tuple[Projection, ...]
    group: smooth.Group | None
    smoothing: smooth.Smoothing
    moments: Moments
    weight_energy: np.ndarray
    keep: np.ndarray

    @property
    def energy(self) -> np.ndarray:
        """Σₙ W² [K] of the weights after smoothing."""
        return self.weight_energy * self.smoothing.scale**2

    def output(self, rows: np.ndarray) -> np.ndarray:
        """Expected ‖x·W‖² [R] of `rows` [R, K] of x, with the part that the shift moved into the bias."""
        return _expected_output(rows * self.smoothing.scale + self.smoothing.shift, self.weight_energy)


def _expected_output(rows: np.ndarray, energy: np.ndarray) -> np.ndarray:
    """Expected ‖x·W‖² [R] of `rows` [R, K], if their elements are independent. It is never 0."""
    return (rows * rows) @ energy + np.finfo(np.float32).tiny


def _is_static(plan: Plan) -> bool:
    return plan.ranges in RANGES


def _observe(
    model: ir.Model,
    block: Block,
    windows: np.ndarray,
    before: list,
    with_gram: bool,
    work: Path,
    pool: ThreadPoolExecutor,
) -> tuple[dict[str, Moments], list]:
    """Run `block` on all windows.

    Returns the moments of the inputs of its linear layers, by name, and its output for each window, from which the
    next block starts.
    """
    names = list(dict.fromkeys(projection.x.name for projection in block.projections))
    run = open_block(model, block, [*names, *([block.end] if block.end else [])], work)
    moments: dict[str, Moments] = {}
    after = []
    for window, start in zip(windows, before, strict=True):
        values = run(window, start)
        after.append(values.pop() if block.end else None)
        rows = [x.reshape(-1, x.shape[-1]) for x in values]
        for name, seen in zip(names, pool.map(lambda x: Moments.of(x, with_gram), rows), strict=True):
            moments[name] = moments[name].merge(seen) if name in moments else seen
    return moments, after


def _tensor(
    name: str, block: Block, moments: Moments, group: smooth.Group | None, tables: set[ir.Value], plan: Plan
) -> _Tensor:
    """Choose the smoothing and the float channels of the input tensor `name`."""
    projections = tuple(projection for projection in block.projections if projection.x.name == name)
    weights = [projection.matrix for projection in projections]
    energy = np.sum([np.einsum("kn,kn->k", weight, weight) for weight in weights], axis=0)
    count = len(energy)
    smoothing = smooth.Smoothing(np.ones(count, np.float32), np.zeros(count, np.float32), None)
    if group is not None:
        smoothing = _search_smoothing(moments, weights, energy, group, plan)
        moments = moments.transformed(smoothing.scale, smoothing.shift)
    tensor = _Tensor(name, projections, group, smoothing, moments, energy, np.ones(count, bool))
    if plan.float_channels and not any(projection.weight in tables for projection in projections):
        output = tensor.output(moments.rows)
        tensor = replace(tensor, keep=_search_float_channels(moments, tensor.energy, output, plan.float_channels))
    return tensor


def _search_smoothing(
    moments: Moments, weights: list[np.ndarray], energy: np.ndarray, group: smooth.Group, plan: Plan
) -> smooth.Smoothing:
    """Find the smoothing exponent, or none, with the least expected error of activations and weights together."""
    shift = moments.mean.astype(np.float32) if group.shift is not None else np.zeros(len(energy), np.float32)
    weight_max = group.shared(np.max([np.abs(weight).max(axis=1) for weight in weights], axis=0))
    low, high = moments.low - shift, moments.high - shift
    output = _expected_output(moments.rows, energy)
    options: list[tuple[float | None, np.ndarray]] = [(None, np.ones(len(energy), np.float32))]
    options += [
        (alpha, smooth.candidate(-group.shared(-low), group.shared(high), weight_max, alpha)) for alpha in plan.alphas
    ]

    def cost(scale: np.ndarray) -> float:
        rows = (moments.rows - shift) / scale
        after = energy * scale**2
        activations = 0.0
        if _is_static(plan):
            activations = _static_error(rows, low / scale, high / scale, after, output)
        elif plan.ranges == "row":
            activations = matmul_error(rows, PerRow().restore(rows), after, output)
        noise = sum(rounding_noise(weight * scale[:, None], plan.grid) for weight in weights)
        return activations + float(np.mean((rows * rows) @ noise / output))

    alpha, scale = min(options, key=lambda option: cost(option[1]))
    return smooth.Smoothing(scale, shift, alpha)


def _static_error(rows: np.ndarray, low: np.ndarray, high: np.ndarray, energy: np.ndarray, output: np.ndarray) -> float:
    """Least expected error of rows [R, K] with a static range, over the `_SHARES` of the full range.

    `low` and `high` [K] are the smallest and largest value of each channel.
    """
    bottom, top = min(float(low.min()), 0.0), max(float(high.max()), 0.0)
    return min(
        matmul_error(rows, PerTensor(bottom * share, top * share).restore(rows), energy, output) for share in _SHARES
    )


def _search_float_channels(moments: Moments, energy: np.ndarray, output: np.ndarray, limit: int) -> np.ndarray:
    """Find the channels that stay in the int8 matmul, bool [K]: all, or all but the largest few if that pays.

    At least one stays, however few there are.
    """
    order = np.argsort(-np.maximum(moments.high, -moments.low), kind="stable")

    def error(count: int) -> float:
        kept = np.sort(order[count:])
        return _static_error(moments.rows[:, kept], moments.low[kept], moments.high[kept], energy[kept], output)

    counts = [0, *(2**power for power in range(limit.bit_length()) if 2**power < len(energy))]
    errors = {count: error(count) for count in counts}
    in_float = min(counts, key=lambda count: errors[count] / _MORE**count)
    if errors[in_float] > _PAYS * errors[0]:
        in_float = 0
    keep = np.ones(len(energy), bool)
    keep[order[:in_float]] = False
    return keep


def _histograms(
    model: ir.Model, block: Block, windows: np.ndarray, before: list, tensors: list[_Tensor], work: Path
) -> dict[str, Histogram]:
    """One histogram per input tensor, by name, measured after smoothing and without the float channels."""
    run = open_block(model, block, [tensor.name for tensor in tensors], work)
    histograms: dict[str, Histogram] = {}
    for window, start in zip(windows, before, strict=True):
        for tensor, value in zip(tensors, run(window, start), strict=True):
            x = value.reshape(-1, value.shape[-1])
            low, high = tensor.moments.low[tensor.keep], tensor.moments.high[tensor.keep]
            weight = tensor.energy[tensor.keep] / tensor.output(x)[:, None]
            seen = Histogram.of(x[:, tensor.keep], min(float(low.min()), 0.0), max(float(high.max()), 0.0), weight)
            histograms[tensor.name] = histograms[tensor.name].merge(seen) if tensor.name in histograms else seen
    return histograms


def _decide(
    projection: Projection, tensor: _Tensor, histogram: Histogram | None, tables: set[ir.Value], plan: Plan, work: Path
) -> Decision:
    """Decide on one linear layer: choose the range of its input, and round its weight."""
    keep = tensor.keep
    activation: Activation | None = None
    rows, output = tensor.moments.rows[:, keep], tensor.output(tensor.moments.rows)

    def error(candidate: Activation) -> float:
        return matmul_error(rows, candidate.restore(rows), tensor.energy[keep], output)

    if histogram is not None:
        activation = PerTensor(*RANGES[plan.ranges](histogram))
    elif plan.ranges == "row":
        activation = min(map(PerRow, ROW_ZERO_POINTS), key=error)
    weight = projection.matrix
    in_float = np.flatnonzero(~keep)
    rounded = None
    if projection.weight not in tables:
        rounded = _round(weight, tensor.moments.gram, keep, plan)
        rounded = replace(rounded, q=_on_disk(rounded.q, work))
    details: dict[str, Any] = {"alpha": tensor.smoothing.alpha} if plan.alphas else {}
    if activation is not None:
        details |= asdict(activation) | {"relative_error": error(activation)}
    if len(in_float):
        details |= {"float_channels": in_float.tolist(), "float_bytes": 4 * weight[in_float].size}
    return Decision(rounded, activation, in_float, np.ascontiguousarray(weight[in_float]), details, histogram)


def _on_disk(array: np.ndarray, folder: Path) -> np.ndarray:
    """Return `array`, memory-mapped from an unnamed file in `folder`.

    The integers of all layers together would take a quarter of the model's size in memory.
    """
    with tempfile.TemporaryFile(dir=folder) as file:
        np.ascontiguousarray(array).tofile(file)
        file.flush()
        return np.memmap(file, array.dtype, "r", shape=array.shape)


def _round(weight: np.ndarray, gram: np.ndarray | None, keep: np.ndarray, plan: Plan) -> IntWeight:
    """Round a weight [K, N]. Rows that `keep` [K] leaves out (the float channels) become zeros."""
    part = weight if keep.all() else weight[keep]
    if plan.rounding == "gptq":
        rounded = gptq(part, gram if keep.all() else gram[np.ix_(keep, keep)], plan.grid)
    else:
        rounded = round_to_nearest(part, plan.grid)
    if keep.all():
        return rounded
    q = np.zeros(weight.shape, rounded.q.dtype)
    q[keep] = rounded.q
    return replace(rounded, q=q)
