"""Calibration: run the model block by block on calibration windows, and decide how to quantize each linear layer.

Each block of the fp32 model runs on the windows once, and is smoothed by the activations that were seen. For static ranges,
the smoothed block runs again, and histograms of its activations are collected. Then the weights of the block are rounded.
With rounding "follow", that takes into account what the blocks and layers before lost by rounding (follow.py). Of the
activations only sums, histograms and a sample are kept, and for each window the values that blocks start from, of as
many blocks as are worked on.

What is seen of a block in fp32 does not depend on how it will be quantized. So several jobs, which differ in their plans and
in the number of their windows, share that run; each smooths and rounds a copy of the model of its own. While they
decide on one block, the next two already run.

The last bits of a matmul depend on the number of threads that BLAS splits it over, and such a bit can change which way
a 4-bit weight is rounded. So each matmul has one thread, and the processors work on different tensors instead: the
result has the same bytes on any number of processors.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from threadpoolctl import threadpool_limits

from cuantiza.core.errors import UserError
from cuantiza.core.inputs.corpus import Split, full_windows, stream
from cuantiza.core.inputs.defaults import SELF
from cuantiza.core.inputs.model_config import end_tokens, max_positions, read_config, start_token
from cuantiza.core.inputs.tokenizer import load_tokenizer, markers, say_other_markers, take
from cuantiza.core.machine.hardware import default_threads
from cuantiza.core.machine.progress import track
from cuantiza.quantize.decide import smooth
from cuantiza.quantize.decide.activation import Activation, PerTensor, matmul_error
from cuantiza.quantize.decide.blocks import Block, Observed, observe, open_block, run_ahead, split
from cuantiza.quantize.decide.decision import Decision, Job, Plan
from cuantiza.quantize.decide.observations import Histogram
from cuantiza.quantize.decide.ranges import RANGES
from cuantiza.quantize.decide.tensor import Tensor, decide_tensor, error_limit, is_static, row_activation
from cuantiza.quantize.decide.values import ValueMoments, find_values
from cuantiza.quantize.own_text import own_windows
from cuantiza.quantize.rewrite.find import Projection, find_embeddings, find_tables, is_head
from cuantiza.quantize.settings import Calibration
from cuantiza.quantize.weights.follow import on_disk, round_block, with_embedding
from cuantiza.quantize.weights.gptq import Each, descend, gptq
from cuantiza.quantize.weights.rounding import Grid, IntWeight, round_to_nearest

# How many jobs decide on a block at the same time. The long rounding of one layer keeps one processor busy; another job
# has work for the others. More jobs at once would take memory and little less time.
_JOBS_AT_ONCE = 2
# How many blocks may wait for decisions while the next one runs: attention and MLP of one layer. What was seen of each
# takes memory, above all the Gram matrices of its inputs.
_BLOCKS_AT_ONCE = 2


def calibration_windows(folder: Path, split: Split, calibration: Calibration) -> np.ndarray:
    """Return token windows int64 [n, T] of `split`, all of them full: text without padding.

    Each document begins with a start token. T is at most the model's number of positions. The model in `folder` writes
    the text where the split has a seed. Raises UserError where there are fewer windows than the calibration needs.
    """
    length = min(calibration.tokens, max_positions(read_config(folder)))
    if split.seed is not None:
        return own_windows(folder, split.seed, calibration.windows, length)
    tokenizer, start = load_tokenizer(folder), start_token(folder)
    marked = () if split.joined else markers(tokenizer, {start, *end_tokens(folder)})
    taken = take(tokenizer, split.documents, length * calibration.windows, marked)
    if not split.joined:
        say_other_markers(tokenizer, taken, split.name, split.sha256)
    tokens = stream([item.ids for item in taken], start)
    windows = full_windows(tokens, length)[: calibration.windows]
    if len(windows) < calibration.minimum:
        raise UserError(
            f"CORPUS=: its calibration split has {len(tokens)} tokens, {len(windows)} windows of {length}; "
            f"calibration needs at least {calibration.minimum}: give more text, or CORPUS={SELF} for text that the model writes"
        )
    return windows


def calibrate(
    model: ir.Model, jobs: Sequence[Job], windows: np.ndarray, work: Path, until: str | None = None
) -> list[dict[str, Decision]]:
    """Decide how to quantize every linear layer of `model`, for each of `jobs`; return their decisions by layer name.

    The jobs have copies of the model. Each copy is smoothed in place, which does not change what it computes. `windows`
    are int64 [n, T], as many as the longest job needs; `work` is an empty folder for temporary files. If `until` names a
    linear layer, the block that contains it is the last one. What a job decides does not depend on the others.
    """
    with (
        threadpool_limits(1, "blas"),
        ThreadPoolExecutor(default_threads()) as pool,
        ThreadPoolExecutor(_JOBS_AT_ONCE) as job_pool,
    ):
        try:
            return _calibrate(model, jobs, windows, work, until, pool, job_pool)
        except BaseException:
            job_pool.shutdown(cancel_futures=True)  # what other jobs would still decide is of no use
            raise


def _calibrate(
    model: ir.Model,
    jobs: Sequence[Job],
    windows: np.ndarray,
    work: Path,
    until: str | None,
    pool: ThreadPoolExecutor,
    job_pool: ThreadPoolExecutor,
) -> list[dict[str, Decision]]:
    # Each job has a folder of its own, since their blocks are written at the same time. The first is for the fp32 model.
    folders = [work / str(number) for number in range(len(jobs) + 1)]
    for folder in folders:
        folder.mkdir()
    # Jobs share the tensors of the model's file. onnx_ir maps each when it is first read, which two threads must not do.
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            value.const_value.numpy()
    runners = [_JobRunner(job, folder, pool) for job, folder in zip(jobs, folders[1:], strict=True)]
    windows = windows[: max(job.windows for job in jobs)]
    before: list[np.ndarray | None] = [None] * len(windows)
    blocks, values = split(model.graph), find_values(model.graph)
    stops = {job.windows for job in jobs}
    waiting: list[list[Future]] = []
    for number, block in enumerate(track(blocks, "calibrate", len(blocks))):
        grams = max((runner.job.windows for runner in runners if runner.needs_gram(number)), default=0)
        waiting.append([])
        for seen in observe(model, block, values, windows, before, grams, stops, folders[0], pool):
            due = [runner for runner in runners if runner.job.windows == seen.count]
            waiting[-1] += [runner.begin(job_pool, number, seen, windows, before) for runner in due]
        before = seen.after
        last = until is not None or number == len(blocks) - 1
        while len(waiting) > (0 if last else _BLOCKS_AT_ONCE):
            for deciding in waiting.pop(0):
                deciding.result()
        if until in runners[0].decisions:
            break
    return [runner.decisions for runner in runners]


def _spread(pool: ThreadPoolExecutor, function: Callable, items: Iterable) -> list:
    """Return function(item) for each of `items`, computed by threads of `pool` and by this one, which may be one of them.

    Other threads begin with the first item, this one with the last. It takes back what no thread has begun: if all threads
    waited for work that none is free for, they would wait forever.
    """
    waiting = [(item, pool.submit(function, item)) for item in items]
    last_first = [function(item) if coming.cancel() else coming.result() for item, coming in reversed(waiting)]
    return last_first[::-1]


class _JobRunner:
    """Runs one job: smooths and rounds the blocks of its model, one after the other. `decisions` are those so far."""

    def __init__(self, job: Job, work: Path, pool: ThreadPoolExecutor) -> None:
        graph = job.model.graph
        self.job, self._work, self._pool = job, work, pool
        self._blocks, self._values, self._tables = split(graph), find_values(graph), find_tables(graph)
        read = Counter(projection.weight for block in self._blocks for projection in block.projections)
        self._whole = self._tables | {matrix for matrix, count in read.items() if count > 1}
        # What a block starts from was seen before smoothing, so it is not smoothed. In no model that we know it could be.
        starts = {block.start for block in self._blocks}
        groups = smooth.find_groups(graph) if job.plan.alphas else {}
        self._groups = {name: group for name, group in groups.items() if name not in starts}
        # The values that the next block of the rounded model starts from.
        self._rounded: list[np.ndarray | None] = [None] * job.windows
        self.decisions: dict[str, Decision] = {}
        self._begun: Future | None = None

    def begin(self, job_pool: ThreadPoolExecutor, *args: Any) -> Future:
        """Start `decide(*args)` in `job_pool`, after what was begun before."""
        self._begun = job_pool.submit(self._after, self._begun, *args)
        return self._begun

    def _after(self, earlier: Future | None, *args: Any) -> None:
        if earlier is not None:
            earlier.result()
        self.decide(*args)

    def needs_gram(self, number: int) -> bool:
        """Whether the Gram matrices of the inputs of block `number` decide how its weights are rounded."""
        plan, block = self.job.plan, self._blocks[number]
        return plan.rounding in ("gptq", "descent") and any(
            _is_rounded(p, self._tables, plan) for p in block.projections
        )

    def decide(self, number: int, seen: Observed, windows: np.ndarray, before: list) -> None:
        """Smooth block `number` of the job's model by what was `seen` of it in fp32, and decide on its linear layers.

        `before` has the value that the block starts from in fp32 for each of `windows` int64 [n, T], of which the job
        takes the first.
        """
        model, plan, tables, pool = self.job.model, self.job.plan, self._tables, self._pool
        block, windows, before = self._blocks[number], windows[: self.job.windows], before[: self.job.windows]
        readers = {name: [one for one in block.projections if one.x.name == name] for name in seen.moments}

        def tensor_of(name: str) -> Tensor:
            group = self._groups.get(name)
            return decide_tensor(readers[name], seen.moments[name], seen.of_values, group, tables, self._whole, plan)

        tensors = list(pool.map(tensor_of, seen.moments))
        for tensor in tensors:
            if tensor.group is not None:
                smooth.apply(model.graph, tensor.group, tensor.smoothing)
        histograms = _histograms(model, block, windows, before, tensors, self._work, pool) if is_static(plan) else {}
        weights: dict[str, IntWeight] = {}
        if plan.rounding == "follow":
            grids = {p.name: _grid(p, tables, plan) for p in block.projections if _is_rounded(p, tables, plan)}
            streams = list(zip(before, self._rounded, strict=True))
            shared = {p.name: found for tensor in tensors for p, found in _shared(model.graph, tensor, grids)}
            weights, self._rounded = round_block(
                model, block, grids, shared, self._values, windows, streams, self._work, pool.map
            )

        def decision_of(both: tuple[Projection, Tensor]) -> Decision:
            (projection, tensor), name = both, both[0].name
            histogram, each = histograms.get(tensor.name), partial(_spread, pool)
            return _decide(projection, tensor, weights.get(name), histogram, tables, plan, self._work, each)

        inputs = [(projection, tensor) for tensor in tensors for projection in tensor.projections]
        decided = pool.map(decision_of, inputs)
        self.decisions |= {projection.name: one for (projection, _), one in zip(inputs, decided, strict=True)}


def _is_rounded(projection: Projection, tables: set[ir.Value], plan: Plan) -> bool:
    """Whether the weight of `projection` is rounded here, and not later together with the embedding that shares it."""
    return projection.weight not in tables or (plan.table is not None and is_head(projection))


def _grid(projection: Projection, tables: set[ir.Value], plan: Plan) -> Grid:
    return plan.grid_of(projection.weight.name, is_table=projection.weight in tables)


def _shared(graph: ir.Graph, tensor: Tensor, grids: dict[str, Grid]) -> list[tuple[Projection, np.ndarray]]:
    """List the linear layers of `tensor` on `grids` of less than 8 bits that share their matrix with an embedding.

    With each comes the square [K] of the factor that undoes smoothing after the embedding. In 8 bits both lose next to
    nothing.
    """
    embedded = {embedding.table for embedding in find_embeddings(graph)}
    fine = [p for p in tensor.projections if p.weight in embedded and p.name in grids and grids[p.name].bits < 8]
    return [(projection, 1 / np.square(tensor.smoothing.scale)) for projection in fine]


def _histograms(
    model: ir.Model,
    block: Block,
    windows: np.ndarray,
    before: list,
    tensors: list[Tensor],
    work: Path,
    pool: ThreadPoolExecutor,
) -> dict[str, Histogram]:
    """Run the smoothed `block`; return a histogram of each of `tensors`, by name, without its float channels."""
    run = open_block(model, block, [tensor.name for tensor in tensors], work)
    histograms: dict[str, Histogram] = {}

    def of_window(tensor: Tensor, value: np.ndarray) -> Histogram:
        x = value.reshape(-1, value.shape[-1])
        low, high = tensor.moments.low[tensor.keep], tensor.moments.high[tensor.keep]
        weight = tensor.energy[tensor.keep] / tensor.output(x)[:, None]
        return Histogram.of(x[:, tensor.keep], min(float(low.min()), 0.0), max(float(high.max()), 0.0), weight)

    for found in run_ahead(run, windows, before):
        for tensor, seen in zip(tensors, pool.map(of_window, tensors, found), strict=True):
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
    each: Each,
) -> Decision:
    """Decide on one linear layer: choose how its input is quantized, and round its weight unless it is `rounded`.

    `tensor` is the input after smoothing, of which `histogram` was collected for a static range.
    """
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
        # A layer that computes values decides for its query and key, too: every token reads the key of the sink.
        for name, read in tensor.of_values.items():
            energy = tensor.value_energy[name] * tensor.smoothing.scale**2
            seen = read.rows[:, keep]
            lost = read.error(activation.restore(seen) - seen, energy[keep])
            too_coarse |= lost > error_limit(plan, strict=True)
            if name == projection.name:
                details["values_error"] = lost
        if too_coarse and histogram is None:
            activation = tensor.per_row(bits=16)
        elif too_coarse:
            highest, lowest = tensor.moments.high[keep].max(), tensor.moments.low[keep].min()
            activation = PerTensor.of_16_bits(float(max(highest, -lowest)))
    in_float = np.flatnonzero(~keep)
    if rounded is None and _is_rounded(projection, tables, plan):
        ours = replace(plan, grid=_grid(projection, tables, plan))
        gram = tensor.moments.gram
        for shared, power in _shared(projection.node.graph, tensor, {projection.name: ours.grid}):
            gram = with_embedding(gram, power) if shared is projection and gram is not None else gram
        rounded = _round(weight, gram, of_values, keep, ours, each)
        rounded = replace(rounded, q=on_disk(rounded.q, work))
    if activation is not None:
        details |= asdict(activation) | {"relative_error": error(activation)}
    if len(in_float):
        details |= {"float_channels": in_float.tolist(), "float_bytes": 4 * weight[in_float].size}
    power = np.mean(np.square(tensor.moments.rows), axis=0)
    return Decision(rounded, activation, in_float, np.ascontiguousarray(weight[in_float]), details, histogram, power)


def _round(
    weight: np.ndarray,
    gram: np.ndarray | None,
    of_values: ValueMoments | None,
    keep: np.ndarray,
    plan: Plan,
    each: Each,
) -> IntWeight:
    """Round a weight [K, N]. Rows that `keep` [K] leaves out (the float channels) become zeros.

    `gram` [K, K] is that of the inputs; for the channels that are values of attention, `of_values` has another.
    """
    part = weight if keep.all() else weight[keep]
    inputs, kept = np.flatnonzero(keep), np.ix_(keep, keep)

    def by_gram(some: np.ndarray, of: np.ndarray) -> IntWeight:
        if plan.rounding == "descent":
            return descend(some, of[kept], plan.grid, each)
        return gptq(some, of[kept], plan.grid, inputs, each)

    if plan.rounding == "nearest":
        rounded = round_to_nearest(part, plan.grid, inputs=inputs)
    else:
        assert gram is not None  # as `needs_gram` wants it
        rounded = by_gram(part, gram)
        if of_values is not None:
            channels = of_values.channels
            rounded = rounded.with_channels(channels, by_gram(part[:, channels], of_values.averaged.gram))
    if keep.all():
        return rounded
    q = np.zeros(weight.shape, rounded.q.dtype)
    q[keep] = rounded.q
    return replace(rounded, q=q)
