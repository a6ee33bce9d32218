"""Follow the rounded model: run it beside the fp32 model, so that each linear layer can make up for what earlier ones lost.

A linear layer reads x in the fp32 model, and y in the model whose earlier layers are rounded. Its target is x·W. Where its
output is added to the residual stream, the target also has what the stream lacks there, r − s: its value in the fp32 model
less that in the rounded one. The matrix that predicts the target from y best is

    W + (Σ yᵀy)⁻¹ · (Σ yᵀ(x − y) · W + Σ yᵀ(r − s))

and rounding it with the Gram matrix Σ yᵀy makes the error of the target small, since the rest of that error does not depend
on the rounded weights. GPTAQ (arXiv 2504.02692) has the first term of the correction.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import onnx_ir as ir

from cuantiza.quantize.decide.blocks import Block, open_block
from cuantiza.quantize.decide.values import Values, averaged
from cuantiza.quantize.rewrite.find import Projection, bias_of
from cuantiza.quantize.weights.gptq import Each, descend
from cuantiza.quantize.weights.rounding import Grid, IntWeight

# Columns of a Gram matrix that are one task: a fixed number, so that sums do not depend on the number of threads.
_PANEL = 512


def round_block(
    model: ir.Model,
    block: Block,
    grids: dict[str, Grid],
    values: dict[str, Values],
    windows: np.ndarray,
    streams: list[tuple],
    work: Path,
    each: Each,
) -> tuple[dict[str, IntWeight], list]:
    """Round the linear layers of `block` that `grids` names, each on its grid, in the graph's order.

    `streams` has, for each of `windows` int64 [n, T], the value that the block starts from in the fp32 model and in the
    rounded one (None for the first block). What `values` names computes values of attention. `work` is a folder for
    temporary files; the integers are mapped from one. `each` runs tasks, whose size does not depend on the number of
    threads. Returns the weights by layer name, and the values that the next block of the rounded model starts from
    (None after the last).
    """
    rounded = model.clone()
    weights: dict[str, IntWeight] = {}
    projections = [projection for projection in block.projections if projection.name in grids]
    for name in dict.fromkeys(projection.x.name for projection in projections):
        readers = [projection for projection in projections if projection.x.name == name]
        added = {projection.name: _added(projection, block) for projection in readers}
        sums = list(dict.fromkeys(filter(None, added.values())))
        attention = [values[projection.name] for projection in readers if projection.name in values]
        names = [name, *sums, *(one.weights.name for one in attention)]
        runs = [_open(one, block, names, work) for one in (model, rounded)]
        gram, cross, *others = _sums(runs, windows, streams, len(sums), each)
        of_sums = dict(zip(sums, others, strict=False))
        of_values = {one.projection.name: others[len(sums) + 2 * i :][:2] for i, one in enumerate(attention)}
        for projection in readers:
            matrix, grid = projection.matrix, grids[projection.name]
            missing = cross @ matrix
            if (addend := added[projection.name]) is not None:
                missing += of_sums[addend]
            weight = descend(matrix, gram, grid, missing, each)
            if projection.name in of_values:
                channels = values[projection.name].channels
                gram_read, cross_read = of_values[projection.name]
                read = descend(matrix[:, channels], gram_read, grid, cross_read @ matrix[:, channels], each)
                weight = weight.with_channels(channels, read)
            weights[projection.name] = weight = replace(weight, q=on_disk(weight.q, work))
            value = rounded.graph.initializers[projection.weight.name]
            compute = partial(_dequantize, weight, projection.channel_axis)
            value.const_value = ir.LazyTensor(compute, value.dtype, value.shape, name=value.name)
    if block.end is None:
        return weights, [None] * len(windows)
    run = open_block(rounded, block, [block.end], work)
    return weights, [run(window, start)[0] for window, (_, start) in zip(windows, streams, strict=True)]


def _open(model: ir.Model, block: Block, names: list[str], work: Path) -> Callable:
    """As `open_block`, but the block's start may be among the `names` of its outputs."""
    run = open_block(model, block, [name for name in names if name != block.start], work)

    def values(ids: np.ndarray, start: np.ndarray | None) -> list[np.ndarray]:
        computed = iter(run(ids, start))
        return [start if name == block.start else next(computed) for name in names]

    return values


def _sums(
    runs: list[Callable], windows: np.ndarray, streams: list[tuple], addends: int, each: Each
) -> list[np.ndarray]:
    """Return float32 sums over all tokens of all windows.

    The first value of a run is the input of the linear layers: x in the fp32 model, y in the rounded one. Then come as
    many `addends`, r and s, and attention weights A. The sums are Σ yᵀy [K, K] and Σ yᵀ(x − y) [K, K]; for each addend
    Σ yᵀ(r − s) [K, N]; for each attention the first two with A·x and A·y for x and y (quantize/decide/values.py).
    """
    totals: list[np.ndarray] = []
    for window, starts in zip(windows, streams, strict=True):
        (x, *own), (y, *other) = (run(window, start) for run, start in zip(runs, starts, strict=True))
        both = zip(own[addends:], other[addends:], strict=True)
        pairs = _with_itself(_tokens(x), _tokens(y))
        pairs += [(_tokens(y), _tokens(r - s)) for r, s in zip(own[:addends], other[:addends], strict=True)]
        pairs += [pair for ours, theirs in both for pair in _with_itself(averaged(x, ours), averaged(y, theirs))]
        totals = totals or [np.zeros((left.shape[1], right.shape[1]), np.float32) for left, right in pairs]
        for total, (left, right) in zip(totals, pairs, strict=True):
            _add(total, left, right, each)
    return totals


def _with_itself(x: np.ndarray, y: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    return [(y, y), (y, x - y)]


def on_disk(array: np.ndarray, folder: Path) -> np.ndarray:
    """Return `array`, memory-mapped from an unnamed file in `folder`.

    The integers of all layers together would take a quarter of the model's size in memory.
    """
    with tempfile.TemporaryFile(dir=folder) as file:
        np.ascontiguousarray(array).tofile(file)
        file.flush()
        return np.memmap(file, array.dtype, "r", shape=array.shape)


def _tokens(x: np.ndarray) -> np.ndarray:
    return x.reshape(-1, x.shape[-1])


def _add(total: np.ndarray, y: np.ndarray, x: np.ndarray, each: Each) -> None:
    """Add yᵀx to `total` float32 [K, M], panel by panel."""

    def panel(first: int) -> None:
        columns = slice(first, first + _PANEL)
        total[:, columns] += y.T @ x[:, columns]

    list(each(panel, range(0, x.shape[1], _PANEL)))


def _added(projection: Projection, block: Block) -> str | None:
    """Return the name of the value to which the output of `projection` is added at the end of `block`, or None.

    That is the residual stream. Before the first block there is none that a rounded layer has changed.
    """
    output = projection.node.outputs[0]
    if projection.bias is None and bias_of(projection) is not None:
        output = next(iter(output.uses())).node.outputs[0]
    users = [use.node for use in output.uses()]
    if block.start is None or [user.op_type for user in users] != ["Add"] or users[0].outputs[0].name != block.end:
        return None
    return next((value.name for value in users[0].inputs if value is not output), None)


def _dequantize(weight: IntWeight, channel_axis: int) -> ir.TensorProtocol:
    matrix = weight.dequantize()
    return ir.tensor(np.ascontiguousarray(matrix if channel_axis == 1 else matrix.T))
