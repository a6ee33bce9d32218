"""The steps that the dynamic and the static int8 rewrite share: weights that are stored once, and int8 embeddings."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from cuantiza.quantize.decide.decision import Decision
from cuantiza.quantize.rewrite.edit import constant, lazy_constant, replace_node
from cuantiza.quantize.rewrite.find import Embedding, Projection, find_embeddings, find_projections
from cuantiza.quantize.weights.rounding import Grid, IntWeight, round_to_nearest


class Weights:
    """The int8 matrices of a graph. Each is stored once, however many nodes read it."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._stored: dict[tuple[str, int], tuple[ir.Value, ir.Value]] = {}

    def get(self, weight: ir.Value, axis: int) -> tuple[ir.Value, ir.Value]:
        """Return `weight` as (int8 matrix in the orientation in which it was stored, float32 scales [channels]).

        There is one scale per index of `axis`. A weight that `put` did not set is rounded to nearest here.
        """
        key = (weight.name, axis)
        if key not in self._stored:
            array = weight.const_value.numpy()
            # Without clipping, every element of a token's embedding is within half a step of its original value,
            # however large the largest element is.
            self._put(
                weight, axis, round_to_nearest(array if axis == 1 else array.T, Grid(8), clips=np.ones(1, np.float32))
            )
        return self._stored[key]

    def put(self, projection: Projection, weight: IntWeight) -> None:
        """Use the integers of `weight`, which are symmetric and per-channel, for the weight of the linear layer."""
        self._put(projection.weight, projection.channel_axis, weight)

    def _put(self, weight: ir.Value, axis: int, rounded: IntWeight) -> None:
        q = rounded.q if axis == 1 else rounded.q.T
        suffix = "" if not any(name == weight.name for name, _ in self._stored) else f"_{axis}"
        self._stored[weight.name, axis] = (
            lazy_constant(self._graph, f"{weight.name}_int8{suffix}", ir.DataType.INT8, q.shape, lambda: q),
            constant(self._graph, f"{weight.name}_scale{suffix}", rounded.scale[0]),
        )

    def get_columns(self, tape: ir.tape.Tape, projection: Projection) -> tuple[ir.Value, ir.Value]:
        """Return (int8 matrix [K, N], scales [N]) of a linear layer.

        A matrix stored as [N, K] gets a Transpose, which runtimes fold at load.
        """
        weight, scale = self.get(projection.weight, projection.channel_axis)
        if projection.channel_axis == 0:
            weight = tape.op("Transpose", [weight], {"perm": [1, 0]})
        return weight, scale


def prepare_int8(graph: ir.Graph, decisions: dict[str, Decision]) -> tuple[Weights, list[Projection], list[Embedding]]:
    """Rewrite the embeddings to int8, and return all that a rewrite of the linear layers needs.

    The result is (the int8 weights, with the integers of `decisions`; the linear layers that `decisions` names; the
    embeddings that were rewritten).
    """
    weights = Weights(graph)
    everything = find_projections(graph)
    projections = [projection for projection in everything if projection.name in decisions]
    for projection in projections:
        if decisions[projection.name].weight is not None:
            weights.put(projection, decisions[projection.name].weight)
    kept = {projection.weight for projection in everything if projection.name not in decisions}
    return weights, projections, _quantize_embeddings(graph, weights, kept)


def _quantize_embeddings(graph: ir.Graph, weights: Weights, kept: set[ir.Value]) -> list[Embedding]:
    """Let embeddings gather int8 rows and their scales instead of floating-point rows: Gather -> Cast -> Mul.

    The matrices in `kept` stay in floating point, because a linear layer reads them in floating point.
    """
    embeddings = [embedding for embedding in find_embeddings(graph) if embedding.table not in kept]
    last = constant(graph, "axis_last", np.array([-1], np.int64))
    for embedding in embeddings:
        tape = ir.tape.Tape()
        q, scale = weights.get(embedding.table, 0)
        ids = embedding.node.inputs[1]
        rows = tape.op("Cast", [tape.op("Gather", [q, ids])], {"to": ir.DataType.FLOAT})
        row_scale = tape.op("Unsqueeze", [tape.op("Gather", [scale, ids]), last])
        replace_node(graph, embedding.node, tape, tape.op("Mul", [rows, row_scale]))
    return embeddings
