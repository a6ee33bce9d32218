"""Calibration: the model's own text, run block by block, decides how every projection is quantized.

Each block is run on the calibration windows, smoothed by what they showed, and its weights are rounded; a static
recipe runs it again for the histograms of what smoothing left. Only sums, histograms and a sample are kept.

A product's last bits depend on how many threads BLAS splits it over, and 4-bit rounding falls to another side for it.
So each product has one thread, and the processors share the tensors instead: the same bytes on any number of them.
"""

from __future__ import annotations

import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
from threadpoolctl import threadpool_limits

from cuantiza.core.errors import UserError
from cuantiza.core.inputs.corpus import Split, full_windows, stream
from cuantiza.core.inputs.model_config import max_positions, read_config, start_token
from cuantiza.core.inputs.tokenizer import encode, load_tokenizer
from cuantiza.core.machine.hardware import default_threads
from cuantiza.core.machine.progress import track
from cuantiza.quantize.decide import smooth
from cuantiza.quantize.decide.activation import ROW_ZERO_POINTS, Activation, PerRow, PerTensor, product_error
from cuantiza.quantize.decide.blocks import Block, open_block, split
from cuantiza.quantize.decide.decision import Plan, Site
from cuantiza.quantize.decide.observations import RANGES, Histogram, Moments
from cuantiza.quantize.decide.rounding import IntWeight, gptq, round_to_nearest, rounding_noise
from cuantiza.quantize.recipes import Calibration
from cuantiza.quantize.rewrite.find import Projection, find_tables

# Shares of the full range that the search for a smoothing looks at; the range itself comes from the histogram.
_SHARES = (1.0, 0.8, 0.6, 0.4, 0.2)
# Channels are taken out of the integer product where that halves its error, and more of them for a tenth each.
_PAYS, _MORE = 0.5, 0.9


def calibration_windows(folder: Path, split: Split, calibration: Calibration) -> np.ndarray:
    """Token windows int64 [n, T] of `split`: full ones of real text, without padding, a start token per document.

    T is at most the model's number of positions. Raises UserError where there are fewer windows than the
    calibration asks for.
    """
    length = min(calibration.tokens, max_positions(read_config(folder)))
    documents = encode(load_tokenizer(folder), split.documents, enough=length * calibration.windows)
    tokens = stream(documents, start_token(folder))
    windows = full_windows(tokens, length)[: calibration.windows]
    if len(windows) < calibration.minimum:
        raise UserError(
            f"CORPUS=: its calibration split has {len(tokens)} tokens, {len(windows)} windows of {length}; "
            f"calibration needs at least {calibration.minimum}: give more text"
        )
    return windows


def calibrate(
    model: ir.Model, windows: np.ndarray, plan: Plan, work: Path, until: str | None = None
) -> dict[str, Site]:
    """A decision for every projection of `model`, by name; smooths the model in place (its function stays).

    windows int64 [n, T]; `work` is a folder for temporary files. The block that holds the projection `until` is the
    last one where that is given.
    """
    with threadpool_limits(1, "blas"), ThreadPoolExecutor(default_threads()) as pool:
        return _calibrate(model, windows, plan, work, until, pool)


def _calibrate(
    model: ir.Model, windows: np.ndarray, plan: Plan, work: Path, until: str | None, pool: ThreadPoolExecutor
) -> dict[str, Site]:
    tables = find_tables(model.graph)
    groups = smooth.find_groups(model.graph) if plan.alphas else {}
    before: list[np.ndarray | None] = [None] * len(windows)
    sites: dict[str, Site] = {}
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
        decided = pool.map(lambda pair: _site(*pair, histograms.get(pair[1].name), tables, plan, work), inputs)  # noqa: B023
        sites |= {projection.name: site for (projection, _), site in zip(inputs, decided, strict=True)}
        if until in sites:
            break
        before = after
    return sites


@dataclass(frozen=True)
class _Tensor:
    """The input x [.., K] of projections as smoothing left it, before it gets its range.

    `moments` are those of x; `weight_energy` [K] = Σₙ W² that of the weights before smoothing; `keep` bool [K] is
    what stays in the integer product.
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
        """Σₙ W² [K] of the weights as smoothing leaves them."""
        return self.weight_energy * self.smoothing.scale**2

    def output(self, rows: np.ndarray) -> np.ndarray:
        """The expected ‖x·W‖² [R] of rows [R, K] of x, its shift included."""
        return _expected_output(rows * self.smoothing.scale + self.smoothing.shift, self.weight_energy)


def _expected_output(rows: np.ndarray, energy: np.ndarray) -> np.ndarray:
    """‖x·W‖² [R] of rows [R, K], their elements taken as independent; never 0."""
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
    """Moments of the inputs of the block's projections, by name, and what the next block starts from."""
    names = list(dict.fromkeys(projection.x.name for projection in block.projections))
    run = open_block(model, block, [*names, *([block.end] if block.end else [])], work)
    moments: dict[str, Moments] = {}
    after = []
    for window, start in zip(windows, before, strict=True):
        *values, end = [*run(window, start), *([] if block.end else [None])]
        after.append(end)
        rows = [x.reshape(-1, x.shape[-1]) for x in values]
        for name, seen in zip(names, pool.map(lambda x: Moments.of(x, with_gram), rows), strict=True):
            moments[name] = moments[name].merge(seen) if name in moments else seen
    return moments, after


def _tensor(
    name: str, block: Block, moments: Moments, group: smooth.Group | None, tables: set[ir.Value], plan: Plan
) -> _Tensor:
    projections = tuple(projection for projection in block.projections if projection.x.name == name)
    weights = [projection.matrix for projection in projections]
    energy = np.sum([np.einsum("kn,kn->k", weight, weight) for weight in weights], axis=0)
    count = len(energy)
    smoothing = smooth.Smoothing(np.ones(count, np.float32), np.zeros(count, np.float32), None)
    if group is not None:
        smoothing = _search_smoothing(moments, weights, energy, group.shift is not None, plan)
        moments = moments.transformed(smoothing.scale, smoothing.shift)
    tensor = _Tensor(name, projections, group, smoothing, moments, energy, np.ones(count, bool))
    if plan.float_channels and not any(projection.weight in tables for projection in projections):
        output = tensor.output(moments.rows)
        tensor = replace(tensor, keep=_search_float_channels(moments, tensor.energy, output, plan.float_channels))
    return tensor


def _search_smoothing(
    moments: Moments, weights: list[np.ndarray], energy: np.ndarray, may_shift: bool, plan: Plan
) -> smooth.Smoothing:
    """The exponent, or none, with the least expected error of activations and weights together."""
    shift = moments.mean.astype(np.float32) if may_shift else np.zeros(len(energy), np.float32)
    weight_max = np.max([np.abs(weight).max(axis=1) for weight in weights], axis=0)
    low, high = moments.low - shift, moments.high - shift
    output = _expected_output(moments.rows, energy)
    options = [(None, np.ones(len(energy), np.float32))]
    options += [(alpha, smooth.candidate(low, high, weight_max, alpha)) for alpha in plan.alphas]

    def cost(scale: np.ndarray) -> float:
        rows = (moments.rows - shift) / scale
        after = energy * scale**2
        activations = 0.0
        if _is_static(plan):
            activations = _static_error(rows, low / scale, high / scale, after, output)
        elif plan.ranges == "row":
            activations = product_error(rows, PerRow().restore(rows), after, output)
        noise = sum(rounding_noise(weight * scale[:, None], plan.grid) for weight in weights)
        return activations + float(np.mean((rows * rows) @ noise / output))

    alpha, scale = min(options, key=lambda option: cost(option[1]))
    return smooth.Smoothing(scale, shift, alpha)


def _static_error(rows: np.ndarray, low: np.ndarray, high: np.ndarray, energy: np.ndarray, output: np.ndarray) -> float:
    """Least expected error of rows [R, K] whose channels span [low, high] [K], over shares of the full range."""
    bottom, top = min(float(low.min()), 0.0), max(float(high.max()), 0.0)
    return min(
        product_error(rows, PerTensor(bottom * share, top * share).restore(rows), energy, output) for share in _SHARES
    )


def _search_float_channels(moments: Moments, energy: np.ndarray, output: np.ndarray, limit: int) -> np.ndarray:
    """Which channels stay in the integer product, bool [K]: all but the few largest, where taking them out pays."""
    order = np.argsort(-np.maximum(moments.high, -moments.low), kind="stable")

    def error(count: int) -> float:
        kept = np.sort(order[count:])
        return _static_error(moments.rows[:, kept], moments.low[kept], moments.high[kept], energy[kept], output)

    counts = [0, *(2**power for power in range(limit.bit_length()))]
    errors = {count: error(count) for count in counts}
    taken = min(counts, key=lambda count: errors[count] / _MORE**count)
    if errors[taken] > _PAYS * errors[0]:
        taken = 0
    keep = np.ones(len(energy), bool)
    keep[order[:taken]] = False
    return keep


def _histograms(
    model: ir.Model, block: Block, windows: np.ndarray, before: list, tensors: list[_Tensor], work: Path
) -> dict[str, Histogram]:
    """Of every tensor as smoothing left it, without the channels that are taken out; by name."""
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


def _site(
    projection: Projection, tensor: _Tensor, histogram: Histogram | None, tables: set[ir.Value], plan: Plan, work: Path
) -> Site:
    keep, activation = tensor.keep, None
    rows, output = tensor.moments.rows[:, keep], tensor.output(tensor.moments.rows)

    def error(candidate: Activation) -> float:
        return product_error(rows, candidate.restore(rows), tensor.energy[keep], output)

    if histogram is not None:
        activation = PerTensor(*RANGES[plan.ranges](histogram))
    elif plan.ranges == "row":
        activation = min(map(PerRow, ROW_ZERO_POINTS), key=error)
    weight = projection.matrix
    taken = np.flatnonzero(~keep)
    rounded = None
    if projection.weight not in tables:
        rounded = _round(weight, tensor.moments.gram, keep, plan)
        rounded = replace(rounded, q=_on_disk(rounded.q, work))
    account = {"alpha": tensor.smoothing.alpha} if plan.alphas else {}
    if activation is not None:
        account |= asdict(activation) | {"relative_error": error(activation)}
    if len(taken):
        account |= {"float_channels": taken.tolist(), "float_bytes": 4 * weight[taken].size}
    return Site(rounded, activation, taken, np.ascontiguousarray(weight[taken]), account, histogram)


def _on_disk(array: np.ndarray, folder: Path) -> np.ndarray:
    """`array` mapped from a file in `folder` that has no name: all of a model's integers would be a quarter of it."""
    with tempfile.TemporaryFile(dir=folder) as file:
        np.ascontiguousarray(array).tofile(file)
        file.flush()
        return np.memmap(file, array.dtype, "r", shape=array.shape)


def _round(weight: np.ndarray, gram: np.ndarray | None, keep: np.ndarray, plan: Plan) -> IntWeight:
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
