"""Split a graph into a chain of blocks, so that calibration holds one transformer layer in memory and not the model.

Between two blocks a single value, the residual stream, carries everything computed from the tokens so far. So each
block can run alone on the output of the block before it, and its activations are observed while it does. Memory is the
weights of one block and one hidden state per window, and time grows linearly with the number of layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from cuantiza.core.contract import window_feeds
from cuantiza.core.onnx import file as onnx_file
from cuantiza.core.run.runtime import open_session
from cuantiza.quantize.decide.observations import Moments
from cuantiza.quantize.decide.values import ValueMoments, Values
from cuantiza.quantize.rewrite.find import Projection, find_embeddings, find_projections

_INPUT = "block_input"
T = TypeVar("T")


@dataclass(frozen=True)
class Block:
    """The part of the graph from the value `start` (None: the model's inputs) to `end` (None: the model's outputs)."""

    start: str | None
    end: str | None
    projections: tuple[Projection, ...]


def split(graph: ir.Graph) -> list[Block]:
    """Return the blocks of `graph` in order. Each ends at the first possible value after a linear layer.

    A value can end a block if nothing else that was computed from the embeddings is read later. A graph without such
    values is one block.
    """
    nodes = list(graph)
    projections = {projection.node: projection for projection in find_projections(graph)}
    carried = {embedding.node for embedding in find_embeddings(graph)}
    last_use: dict[ir.Value, int] = {}
    for index, node in enumerate(nodes):
        for value in node.inputs:
            if value is not None and value.producer() in carried:
                last_use[value] = index
                if node.op_type != "Shape":
                    carried.add(node)
    blocks: list[Block] = []
    start: str | None = None
    held: list[Projection] = []
    live: set[ir.Value] = set()
    for index, node in enumerate(nodes):
        if node in projections:
            held.append(projections[node])
        live = {value for value in (*live, *node.outputs) if last_use.get(value, -1) > index}
        if held and len(live) == 1:
            (end,) = live
            blocks.append(Block(start, end.name, tuple(held)))
            start, held = end.name, []
    if held:
        blocks.append(Block(start, None, tuple(held)))
    return blocks


def open_block(
    model: ir.Model, block: Block, outputs: list[str], work: Path
) -> Callable[[np.ndarray, np.ndarray | None], list[np.ndarray]]:
    """Return a function from (token ids int64 [T], the value that `block` starts from) to the values named `outputs`.

    `work` is a folder for the block's own ONNX file, which is deleted once it is loaded. The value that the block starts
    from is returned as it was given: to compute it would take all blocks before.
    """
    computed = [name for name in outputs if name != block.start]
    if not computed:
        return lambda ids, start: [start for _ in outputs]
    run = open_part(cut(model, block.start, computed), work)

    def with_start(ids: np.ndarray, start: np.ndarray | None) -> list[np.ndarray]:
        found = dict(zip(computed, run(ids, start), strict=True))
        return [start if name == block.start else found[name] for name in outputs]

    return with_start


def cut(model: ir.Model, start: str | None, outputs: list[str]) -> ir.Model:
    """Return the part of `model` that computes the values named `outputs` from the value `start`, as a model of its own."""
    copy = model.clone()
    graph = copy.graph
    values = {value.name: value for node in graph for value in node.outputs}
    if start is not None:
        feed = ir.Value(name=_INPUT, type=ir.TensorType(ir.DataType.FLOAT))
        ir.convenience.replace_all_uses_with(values[start], feed)
        graph.inputs.append(feed)
    graph.outputs.clear()
    for name in outputs:
        values[name].type = ir.TensorType(ir.DataType.FLOAT)
        graph.outputs.append(values[name])
    RemoveUnusedNodesPass()(copy)
    unused = [value for value in graph.inputs if not value.uses()]
    for value in unused:
        graph.inputs.remove(value)
        graph.initializers.pop(value.name, None)
    return copy


def open_part(part: ir.Model, work: Path) -> Callable[[np.ndarray, np.ndarray | None], list[np.ndarray]]:
    """Return a function from (token ids int64 [T], the value that `part` starts from) to its outputs, in their order.

    `part` is what `cut` returned. Its file in the folder `work` is deleted once it is loaded.
    """
    onnx_file.save(part, work)
    session = open_session(work / "model.onnx", exact=False)
    for file in (work / "model.onnx", work / onnx_file.DATA):
        file.unlink(missing_ok=True)
    inputs = session.get_inputs()

    def run(ids: np.ndarray, start: np.ndarray | None) -> list[np.ndarray]:
        own = {item.name: start for item in inputs if item.name == _INPUT}
        found: list[np.ndarray] = session.run(None, window_feeds(inputs, ids) | own)
        return found

    return run


def run_ahead(run: Callable[[np.ndarray, Any], T], windows: np.ndarray, starts: Sequence) -> Iterator[T]:
    """Yield run(window, start) for each of `windows` and `starts`. While one result is worked on, the next one is computed."""
    with ThreadPoolExecutor(1) as thread:
        coming = None
        for window, start in zip(windows, starts, strict=True):
            ready, coming = coming, thread.submit(run, window, start)
            if ready is not None:
                yield ready.result()
        if coming is not None:
            yield coming.result()


@dataclass(frozen=True)
class Observed:
    """What was seen of a block in the first `count` windows.

    `moments` are those of the inputs of its linear layers, by name; `of_values` those for the linear layers that compute
    values, by the name of the layer; `after` has the block's output for each window that was run so far.
    """

    count: int
    moments: dict[str, Moments]
    of_values: dict[str, ValueMoments]
    after: list


def observe(
    model: ir.Model,
    block: Block,
    values: dict[str, Values],
    windows: np.ndarray,
    before: list,
    grams: int,
    stops: set[int],
    work: Path,
    pool: ThreadPoolExecutor,
) -> Iterator[Observed]:
    """Run `block` on all windows, and yield what was seen after each number of windows in `stops`.

    Gram matrices are summed over the first `grams` windows, and are None after more.
    """
    names = list(dict.fromkeys(projection.x.name for projection in block.projections))
    attention = [values[projection.name] for projection in block.projections if projection.name in values]
    inside = [value.name for found in attention for value in (found.weights, found.context)]
    run = open_block(model, block, [*names, *inside, *([block.end] if block.end else [])], work)
    moments: dict[str, Moments] = {}
    of_values: dict[str, ValueMoments] = {}
    after = []
    for count, outputs in enumerate(run_ahead(run, windows, before), 1):
        seen = dict(zip([*names, *inside, block.end], outputs, strict=False))
        after.append(seen.get(block.end))
        rows = [seen[name].reshape(-1, seen[name].shape[-1]) for name in names]
        found = [pool.submit(Moments.of, x, count <= grams) for x in rows]
        read = [pool.submit(_value_moments, layer, seen, count <= grams) for layer in attention]
        for name, one in zip(names, found, strict=True):
            moments[name] = moments[name].merge(one.result()) if name in moments else one.result()
        for layer, of_layer in zip(attention, read, strict=True):
            name = layer.projection.name
            of_values[name] = of_values[name].merge(of_layer.result()) if name in of_values else of_layer.result()
        if count in stops:
            yield Observed(count, dict(moments), dict(of_values), after)


def _value_moments(layer: Values, seen: dict[str, np.ndarray], with_gram: bool) -> ValueMoments:
    """Compute the moments for `layer` from what was `seen` in one window, by the names of the values."""
    x, weights, context = (seen[value.name] for value in (layer.projection.x, layer.weights, layer.context))
    return ValueMoments.of(layer.channels, x, weights, context, with_gram)
