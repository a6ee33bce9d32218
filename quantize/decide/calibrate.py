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
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from threadpoolctl import threadpool_limits

from cuantiza.core.errors import UserError
from cuantiza.core.inputs.corpus import Split, full_windows, stream
from cuantiza.core.inputs.defaults import SELF
from cuantiza.core.inputs.model_config import end_tokens, max_positions, read_config, start_token
from cuantiza.core.inputs.tokenizer import encode, load_tokenizer, markers
from cuantiza.core.machine.hardware import default_threads
from cuantiza.core.machine.progress import track
from cuantiza.quantize.decide import smooth
from cuantiza.quantize.decide.activation import Activation, PerRow, PerTensor, matmul_error
from cuantiza.quantize.decide.blocks import Block, open_block, split
from cuantiza.quantize.decide.decision import Decision, Plan
from cuantiza.quantize.decide.observations import Histogram, Moments
from cuantiza.quantize.decide.ranges import RANGES
from cuantiza.quantize.decide.tensor import Tensor, decide_tensor, error_limit, is_static, row_activation
from cuantiza.quantize.decide.values import ValueMoments, Values, find_values
from cuantiza.quantize.own_text import own_windows
from cuantiza.quantize.rewrite.find import Projection, find_embeddings, find_tables, is_head
from cuantiza.quantize.settings import Calibration
from cuantiza.quantize.weights.follow import on_disk, round_block, with_embedding
from cuantiza.quantize.weights.gptq import gptq
from cuantiza.quantize.weights.rounding import Grid, IntWeight, round_to_nearest


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
    values = find_values(model.graph)
    before: list[np.ndarray | None] = [None] * len(windows)
    decisions: dict[str, Decision] = {}
    follows, before_rounded = plan.rounding == "descent", before
    blocks = split(model.graph)
    for block in track(blocks, "calibrate", len(blocks)):
        with_gram = plan.rounding == "gptq" and any(_is_rounded(p, tables, plan) for p in block.projections)
        moments, of_values, after = _observe(model, block, values, windows, before, with_gram, work, pool)
        readers = {name: [one for one in block.projections if one.x.name == name] for name in moments}
        tensors = list(
            pool.map(
                lambda name: decide_tensor(
                    readers[name],  # noqa: B023
                    moments[name],  # noqa: B023
                    of_values,  # noqa: B023
                    groups.get(name),
                    tables,
                    plan,
                ),
                moments,
            )
        )
        for tensor in tensors:
            if tensor.group is not None:
                smooth.apply(model.graph, tensor.group, tensor.smoothing)
        histograms = _histograms(model, block, windows, before, tensors, work) if is_static(plan) else {}
        weights: dict[str, IntWeight] = {}
        if follows:
            grids = {p.name: _grid(p, tables, plan) for p in block.projections if _is_rounded(p, tables, plan)}
            streams = list(zip(before, before_rounded, strict=True))
            shared = {p.name: found for tensor in tensors for p, found in _shared(model.graph, tensor, grids)}
            weights, before_rounded = round_block(model, block, grids, shared, values, windows, streams, work, pool.map)
        inputs = [(projection, tensor) for tensor in tensors for projection in tensor.projections]
        decided = pool.map(
            lambda both: _decide(
                both[0],
                both[1],
                weights.get(both[0].name),  # noqa: B023
                histograms.get(both[1].name),  # noqa: B023
                tables,
                plan,
                work,
            ),
            inputs,
        )
        decisions |= {projection.name: decision for (projection, _), decision in zip(inputs, decided, strict=True)}
        if until in decisions:
            break
        before = after
    return decisions


def _is_rounded(projection: Projection, tables: set[ir.Value], plan: Plan) -> bool:
    """Whether the weight of `projection` is rounded here, and not later together with the embedding that shares it."""
    return projection.weight not in tables or (plan.table is not None and is_head(projection))


def _grid(projection: Projection, tables: set[ir.Value], plan: Plan) -> Grid:
    name = projection.weight.name
    return plan.table if projection.weight in tables and plan.table and name not in plan.grids else plan.grid_of(name)


def _shared(graph: ir.Graph, tensor: Tensor, grids: dict[str, Grid]) -> list[tuple[Projection, np.ndarray]]:
    """List the linear layers of `tensor` on `grids` of less than 8 bits that share their matrix with an embedding.

    With each comes the square [K] of the factor that undoes smoothing after the embedding. In 8 bits both lose next to
    nothing.
    """
    embedded = {embedding.table for embedding in find_embeddings(graph)}
    fine = [p for p in tensor.projections if p.weight in embedded and p.name in grids and grids[p.name].bits < 8]
    return [(projection, 1 / np.square(tensor.smoothing.scale)) for projection in fine]


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


def _histograms(
    model: ir.Model, block: Block, windows: np.ndarray, before: list, tensors: list[Tensor], work: Path
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
    tensor: Tensor,
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
        activation = row_activation(tensor)[0]
    if activation is not None:
        # A static range need not be the best one that `decide_tensor` found possible.
        too_coarse = tensor.bits == 16 or error(activation) > error_limit(plan, strict=is_head(projection))
        if of_values is not None:
            energy = tensor.value_energy[projection.name] * tensor.smoothing.scale**2
            seen = of_values.rows[:, keep]
            details["values_error"] = of_values.error(activation.restore(seen) - seen, energy[keep])
            too_coarse |= details["values_error"] > error_limit(plan, strict=True)
        if too_coarse and histogram is None:
            activation = PerRow(bits=16)
        elif too_coarse:
            highest, lowest = tensor.moments.high[keep].max(), tensor.moments.low[keep].min()
            activation = PerTensor.of_16_bits(float(max(highest, -lowest)))
    in_float = np.flatnonzero(~keep)
    if rounded is None and _is_rounded(projection, tables, plan):
        ours = replace(plan, grid=_grid(projection, tables, plan))
        gram = tensor.moments.gram
        for shared, power in _shared(projection.node.graph, tensor, {projection.name: ours.grid}):
            gram = with_embedding(gram, power) if shared is projection and gram is not None else gram
        rounded = _round(weight, gram, of_values, keep, ours)
        rounded = replace(rounded, q=on_disk(rounded.q, work))
    if activation is not None:
        details |= asdict(activation) | {"relative_error": error(activation)}
    if len(in_float):
        details |= {"float_channels": in_float.tolist(), "float_bytes": 4 * weight[in_float].size}
    power = np.mean(np.square(tensor.moments.rows), axis=0)
    return Decision(rounded, activation, in_float, np.ascontiguousarray(weight[in_float]), details, histogram, power)


def _round(
    weight: np.ndarray, gram: np.ndarray | None, of_values: ValueMoments | None, keep: np.ndarray, plan: Plan
) -> IntWeight:
    """Round a weight [K, N]. Rows that `keep` [K] leaves out (the float channels) become zeros.

    `gram` [K, K] is that of the inputs; for the channels that are values of attention, `of_values` has another.
    """
    part = weight if keep.all() else weight[keep]
    inputs = np.flatnonzero(keep)
    if plan.rounding != "gptq":
        rounded = round_to_nearest(part, plan.grid, inputs=inputs)
    else:
        kept = np.ix_(keep, keep)
        rounded = gptq(part, gram[kept], plan.grid, inputs)
        if of_values is not None:
            channels = of_values.channels
            values = gptq(part[:, channels], of_values.averaged.gram[kept], plan.grid, inputs)
            rounded = rounded.with_channels(channels, values)
    if keep.all():
        return rounded
    q = np.zeros(weight.shape, rounded.q.dtype)
    q[keep] = rounded.q
    return replace(rounded, q=q)
