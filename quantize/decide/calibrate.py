"""Calibration: run the model block by block on calibration windows, and decide how to quantize each linear layer.

Each block runs on the windows once, and is smoothed according to the activations that were seen. A static recipe runs
the smoothed block again, to collect histograms of its activations. Then the weights of the block are rounded. With
rounding "descent", that follows what the blocks and layers before, rounded, make of the windows (follow.py). Only sums,
histograms and a sample of the activations are kept, and for each window the values that the next block starts from.

The last bits of a matmul depend on the number of threads that BLAS splits it over, and such a bit can change which way
a 4-bit weight is rounded. So each matmul has one thread, and the processors work on different tensors instead: the
result has the same bytes on any number of processors.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from threadpoolctl import threadpool_limits

from cuantiza.core.errors import UserError
from cuantiza.core.inputs.corpus import Split, full_windows, stream
from cuantiza.core.inputs.model_config import end_tokens, max_positions, read_config, start_token
from cuantiza.core.inputs.tokenizer import encode, load_tokenizer, markers
from cuantiza.core.machine.hardware import default_threads
from cuantiza.core.machine.progress import track
from cuantiza.quantize.decide import smooth
from cuantiza.quantize.decide.activation import ROW_ZERO_POINTS, Activation, PerRow, PerTensor, matmul_error
from cuantiza.quantize.decide.blocks import Block, open_block, split
from cuantiza.quantize.decide.decision import Decision, Plan
from cuantiza.quantize.decide.follow import on_disk, round_block
from cuantiza.quantize.decide.gptq import gptq
from cuantiza.quantize.decide.observations import Histogram, Moments
from cuantiza.quantize.decide.ranges import RANGES
from cuantiza.quantize.decide.rounding import IntWeight, round_to_nearest, rounding_noise
from cuantiza.quantize.decide.values import ValueMoments, Values, find_values
from cuantiza.quantize.rewrite.find import Projection, find_tables
from cuantiza.quantize.settings import Calibration

# Shares of the full range for which the searches below estimate the error. The final range comes from the histogram.
_SHARES = (1.0, 0.8, 0.6, 0.4, 0.2)
# Keep channels in float only if that at least halves the matmul's error (`_PAYS`). Each further channel must lower it
# by another 10 % (`_MORE`).
_PAYS, _MORE = 0.5, 0.9
# Nothing averages an error of the logits, as the layers that follow do with that of any other linear layer.
_HEAD_SHARE = 0.1


def calibration_windows(folder: Path, split: Split, calibration: Calibration) -> np.ndarray:
    """Return token windows int64 [n, T] of `split`, all of them full: real text without padding.

    Each document begins with a start token. T is at most the model's number of positions. Raises UserError where there
    are fewer windows than the calibration needs.
    """
    length = min(calibration.tokens, max_positions(read_config(folder)))
    tokenizer, start = load_tokenizer(folder), start_token(folder)
    marked = markers(tokenizer, {start, *end_tokens(folder)})
    tokens = stream(encode(tokenizer, split.documents, length * calibration.windows, marked), start)
    windows = full_windows(tokens, length)[: calibration.windows]
    if len(windows) < calibration.minimum:
        raise UserError(
            f"CORPUS=: its calibration split has {len(tokens)} tokens, {len(windows)} windows of {length}; "
            f"calibration needs at least {calibration.minimum}: give more text"
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
    values = find_values(model.graph)
    before: list[np.ndarray | None] = [None] * len(windows)
    decisions: dict[str, Decision] = {}
    follows, before_rounded = plan.rounding == "descent", before
    blocks = split(model.graph)
    for block in track(blocks, "calibrate", len(blocks)):
        with_gram = plan.rounding == "gptq" and any(_is_rounded(p, tables, plan) for p in block.projections)
        moments, of_values, after = _observe(model, block, values, windows, before, with_gram, work, pool)
        tensors = list(
            pool.map(
                lambda name: _tensor(name, block, moments[name], of_values, groups.get(name), tables, plan),  # noqa: B023
                moments,
            )
        )
        for tensor in tensors:
            if tensor.group is not None:
                smooth.apply(model.graph, tensor.group, tensor.smoothing)
        histograms = _histograms(model, block, windows, before, tensors, work) if _is_static(plan) else {}
        weights: dict[str, IntWeight] = {}
        if follows:
            readers = [[one for one in tensor.projections if one.weight not in tables] for tensor in tensors]
            streams = list(zip(before, before_rounded, strict=True))
            weights, before_rounded = round_block(
                model, block, [one for one in readers if one], windows, streams, plan.grid, work, pool.map
            )
        inputs = [(projection, tensor) for tensor in tensors for projection in tensor.projections]
        decided = pool.map(
            lambda both: _decide(*both, weights.get(both[0].name), histograms.get(both[1].name), tables, plan, work),  # noqa: B023
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

    `moments` are those of x after smoothing, and `of_values` those for the linear layers that compute values, by name.
    `weight_energy` [K] = Σₙ W² is that of the weights before smoothing. `keep` bool [K] marks the channels that stay in
    the int8 matmul; the others stay in floating point. `bits` are those of the activations.
    """

    name: str
    projections: tuple[Projection, ...]
    group: smooth.Group | None
    smoothing: smooth.Smoothing
    moments: Moments
    of_values: dict[str, ValueMoments]
    weight_energy: np.ndarray
    keep: np.ndarray
    bits: int = 8

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


def _is_rounded(projection: Projection, tables: set[ir.Value], plan: Plan) -> bool:
    """Whether the weight of `projection` is rounded here, and not later together with the embedding that shares it."""
    return projection.weight not in tables or (plan.table is not None and _is_head(projection))


def _is_head(projection: Projection) -> bool:
    return projection.node.outputs[0].is_graph_output()


def _observe(
    model: ir.Model,
    block: Block,
    values: dict[str, Values],
    windows: np.ndarray,
    before: list,
    with_gram: bool,
    work: Path,
    pool: ThreadPoolExecutor,
) -> tuple[dict[str, Moments], dict[str, ValueMoments], list]:
    """Run `block` on all windows.

    Returns the moments of the inputs of its linear layers, by name; those for the linear layers that compute values, by
    the name of the layer; and the block's output for each window, from which the next block starts.
    """
    names = list(dict.fromkeys(projection.x.name for projection in block.projections))
    attention = [values[projection.name] for projection in block.projections if projection.name in values]
    inside = [value.name for found in attention for value in (found.weights, found.context)]
    run = open_block(model, block, [*names, *inside, *([block.end] if block.end else [])], work)
    moments: dict[str, Moments] = {}
    of_values: dict[str, ValueMoments] = {}
    after = []
    for window, start in zip(windows, before, strict=True):
        seen = dict(zip([*names, *inside, block.end], run(window, start), strict=False))
        after.append(seen.get(block.end))
        rows = [seen[name].reshape(-1, seen[name].shape[-1]) for name in names]
        for name, found in zip(names, pool.map(lambda x: Moments.of(x, with_gram), rows), strict=True):
            moments[name] = moments[name].merge(found) if name in moments else found
        for layer in attention:
            name, x = layer.projection.name, seen[layer.projection.x.name]
            read = ValueMoments.of(layer.channels, x, seen[layer.weights.name], seen[layer.context.name], with_gram)
            of_values[name] = of_values[name].merge(read) if name in of_values else read
    return moments, of_values, after


def _tensor(
    name: str,
    block: Block,
    moments: Moments,
    of_values: dict[str, ValueMoments],
    group: smooth.Group | None,
    tables: set[ir.Value],
    plan: Plan,
) -> _Tensor:
    """Choose the smoothing, the float channels and the bits of the input tensor `name`."""
    projections = tuple(projection for projection in block.projections if projection.x.name == name)
    weights = [projection.matrix for projection in projections]
    energy = np.sum([np.einsum("kn,kn->k", weight, weight) for weight in weights], axis=0)
    count = len(energy)
    smoothing = smooth.Smoothing(np.ones(count, np.float32), np.zeros(count, np.float32), None)
    limit = _limit(projections, plan)

    def smoothed(smoothing: smooth.Smoothing, bits: int) -> _Tensor:
        scale, shift = smoothing.scale, smoothing.shift
        return _Tensor(
            name,
            projections,
            group,
            smoothing,
            moments.transformed(scale, shift) if group is not None else moments,
            {p.name: of_values[p.name].transformed(scale, shift) for p in projections if p.name in of_values},
            energy,
            np.ones(count, bool),
            bits,
        )

    if group is not None:
        smoothing = _search_smoothing(moments, weights, energy, group, plan)
    tensor = smoothed(smoothing, 8)
    if plan.ranges == "row" and _row_activation(tensor)[1] > limit:
        # 16 bits need no smoothing. What is left of its purpose is that the weights are rounded well.
        if group is not None:
            smoothing = _search_smoothing(moments, weights, energy, group, replace(plan, ranges=None))
        tensor = smoothed(smoothing, 16)
    if plan.float_channels and not any(projection.weight in tables for projection in projections):
        output = tensor.output(tensor.moments.rows)
        keep = _search_float_channels(tensor.moments, tensor.energy, output, plan.float_channels)
        tensor = replace(tensor, keep=keep)
    return tensor


def _limit(projections: tuple[Projection, ...], plan: Plan) -> float:
    """The largest relative error that activations of 8 bits may add to the matmuls of `projections`."""
    if plan.max_error is None:
        return float("inf")
    return plan.max_error * (_HEAD_SHARE if any(map(_is_head, projections)) else 1)


def _row_activation(tensor: _Tensor) -> tuple[PerRow, float]:
    """Return the quantization of each token of `tensor` to 8 bits, and its expected relative error."""
    rows, output = tensor.moments.rows, tensor.output(tensor.moments.rows)
    errors = {zero: matmul_error(rows, PerRow(zero).restore(rows), tensor.energy, output) for zero in ROW_ZERO_POINTS}
    zero = min(errors, key=errors.__getitem__)
    return PerRow(zero), errors[zero]


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
    projection: Projection,
    tensor: _Tensor,
    rounded: IntWeight | None,
    histogram: Histogram | None,
    tables: set[ir.Value],
    plan: Plan,
    work: Path,
) -> Decision:
    """Decide on one linear layer: choose the range of its input, and round its weight unless that is done."""
    keep, of_values = tensor.keep, tensor.of_values.get(projection.name)
    activation: Activation | None = None
    rows, output = tensor.moments.rows[:, keep], tensor.output(tensor.moments.rows)
    weight = projection.matrix
    details: dict[str, Any] = {"alpha": tensor.smoothing.alpha} if plan.alphas else {}

    def error(candidate: Activation) -> float:
        return matmul_error(rows, candidate.restore(rows), tensor.energy[keep], output)

    if histogram is not None:
        activation = PerTensor(*RANGES[plan.ranges](histogram))
    elif plan.ranges == "row":
        activation = _row_activation(tensor)[0]
        too_coarse = tensor.bits == 16
        if of_values is not None:
            energy = np.einsum("kn,kn->k", *2 * [weight[:, of_values.channels]])
            in_values = of_values.error(activation.restore(of_values.rows), energy)
            details["values_error"] = in_values
            too_coarse |= in_values > _limit((projection,), plan)
        if too_coarse:
            activation = PerRow(bits=16)
    in_float = np.flatnonzero(~keep)
    if rounded is None and _is_rounded(projection, tables, plan):
        grid = plan.grid if projection.weight not in tables else plan.table
        rounded = _round(weight, tensor.moments.gram, of_values, keep, replace(plan, grid=grid))
        rounded = replace(rounded, q=on_disk(rounded.q, work))
    if activation is not None:
        details |= asdict(activation) | {"relative_error": error(activation)}
    if len(in_float):
        details |= {"float_channels": in_float.tolist(), "float_bytes": 4 * weight[in_float].size}
    return Decision(rounded, activation, in_float, np.ascontiguousarray(weight[in_float]), details, histogram)


def _round(
    weight: np.ndarray, gram: np.ndarray | None, of_values: ValueMoments | None, keep: np.ndarray, plan: Plan
) -> IntWeight:
    """Round a weight [K, N]. Rows that `keep` [K] leaves out (the float channels) become zeros.

    `gram` [K, K] is that of the inputs; for the channels that are values of attention, `of_values` has another.
    """
    part = weight if keep.all() else weight[keep]
    if plan.rounding != "gptq":
        rounded = round_to_nearest(part, plan.grid)
    else:
        kept = np.ix_(keep, keep)
        rounded = gptq(part, gram[kept], plan.grid)
        if of_values is not None:
            channels = of_values.channels
            rounded = rounded.with_channels(channels, gptq(part[:, channels], of_values.averaged.gram[kept], plan.grid))
    if keep.all():
        return rounded
    q = np.zeros(weight.shape, rounded.q.dtype)
    q[keep] = rounded.q
    return replace(rounded, q=q)
