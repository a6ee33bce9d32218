"""The steps that the dynamic and the static int8 rewrite share: weights stored once, int8 embeddings, 16-bit activations.

Activations of 16 bits suit kernels of 8 bits: a second uint8 tensor holds what the first one rounds away. Both have zero
point 128, so one integer matmul multiplies the rows of both, and the weights are read once: a model that generates, where
reading the weights takes the time, is hardly slower. The second matmul costs a long prompt about what a matmul in floating
point would, but the weights stay in 8 bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from cuantiza.quantize.decide.activation import RESIDUAL_STEPS, RESIDUAL_ZERO
from cuantiza.quantize.decide.decision import Decision
from cuantiza.quantize.rewrite.edit import constant, lazy_constant, replace_node
from cuantiza.quantize.rewrite.find import Embedding, Projection, find_embeddings, find_projections
from cuantiza.quantize.settings import Target
from cuantiza.quantize.weights.rounding import Grid, IntWeight, round_to_nearest


class Weights:
    """The int8 matrices of a graph. Each is stored once, however many nodes read it."""

    def __init__(self, graph: ir.Graph, multiplied: set[ir.Value]) -> None:
        """`multiplied` are the matrices that linear layers read, whose integer sums must not be clipped."""
        self._graph, self._multiplied = graph, multiplied
        self._stored: dict[tuple[str, int], tuple[ir.Value, ir.Value]] = {}

    def get(self, weight: ir.Value, axis: int) -> tuple[ir.Value, ir.Value]:
        """Return `weight` as (int8 matrix in the orientation in which it was stored, float32 scales [channels]).

        There is one scale per index of `axis`. A weight that `put` did not set is rounded to nearest here.
        """
        key = (weight.name, axis)
        if key not in self._stored:
            array = weight.const_value.numpy() if axis == 1 else weight.const_value.numpy().T
            if weight in self._multiplied:
                rounded = round_to_nearest(array, Grid(8, pairs=True))
            else:
                # Without clipping, every element of a token's embedding is within half a step of its original value,
                # however large the largest element is.
                rounded = round_to_nearest(array, Grid(8), clips=np.ones(1, np.float32))
            self._put(weight, axis, rounded)
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

    def get_columns(self, tape: ir.tape.Tape, projections: Sequence[Projection]) -> tuple[ir.Value, ir.Value]:
        """Return (int8 matrix [K, ΣN], scales [ΣN]) of linear layers, whose channels stand one after the other.

        A matrix stored as [N, K] gets a Transpose, which runtimes fold at load.
        """
        projection = projections[0]
        if len(projections) > 1:
            matrices, scales = zip(*(self.get(each.weight, each.channel_axis) for each in projections), strict=True)
            name = matrices[0].name
            whole = lazy_constant(
                self._graph,
                f"{name}_joined",
                ir.DataType.INT8,
                [matrices[0].shape[0], sum(each.channels for each in projections)],
                lambda: np.concatenate([matrix.const_value.numpy() for matrix in matrices], axis=1),
            )
            together = np.concatenate([scale.const_value.numpy() for scale in scales])
            return whole, constant(self._graph, f"{scales[0].name}_joined", together)
        weight, scale = self.get(projection.weight, projection.channel_axis)
        if projection.channel_axis == 0:
            weight = tape.op("Transpose", [weight], {"perm": [1, 0]})
        return weight, scale


def prepare_int8(graph: ir.Graph, decisions: dict[str, Decision]) -> tuple[Weights, list[Projection], list[Embedding]]:
    """Rewrite the embeddings to int8, and return all that a rewrite of the linear layers needs.

    The result is (the int8 weights, with the integers of `decisions`; the linear layers that `decisions` names; the
    embeddings that were rewritten).
    """
    everything = find_projections(graph)
    projections = [projection for projection in everything if projection.name in decisions]
    weights = Weights(graph, {projection.weight for projection in projections})
    # Layers that share a matrix have the integers of the last of them.
    decided = {(p.weight.name, p.channel_axis): p for p in projections if decisions[p.name].weight is not None}
    for projection in decided.values():
        weights.put(projection, decisions[projection.name].weight)
    kept = {projection.weight for projection in everything if projection.name not in decisions}
    return weights, projections, _quantize_embeddings(graph, weights, kept)


def group(projections: Sequence[Projection], decisions: dict[str, Decision], target: Target) -> list[list[Projection]]:
    """Group the linear layers that one matmul computes: for the target `ort`, those that read the same value.

    A layer with a bias of its own (Gemm), or with a transposed or shared matrix, stays alone.
    Their results are the same bit by bit. Queries, keys and values gain, and gate and up-projection: in a small model,
    starting a matmul takes as long as computing it, and what quantizes its input is computed once.
    """
    groups: dict[object, list[Projection]] = {}
    for projection in projections:
        decision = decisions[projection.name]
        alone = projection.bias is not None or projection.channel_axis != 1 or len(projection.weight.uses()) > 1
        together = (projection.node.inputs[0], decision.activation, tuple(decision.float_channels))
        key = projection.node if alone or target == "portable" else together
        groups.setdefault(key, []).append(projection)
    return list(groups.values())


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


def quantize_twice(
    graph: ir.Graph, tape: ir.tape.Tape, x: ir.Value, scale: np.float32, zero_point: np.uint8
) -> ir.Value:
    """Add the quantization of x [.., T, K] to 16 bits: uint8 [.., 2T, K].

    The first T rows are u8(x), with `scale` and `zero_point`, which is 128; the others are what that rounds away, with
    a scale of 1/254.
    """
    assert zero_point == RESIDUAL_ZERO, f"zero point {zero_point}: both halves need {RESIDUAL_ZERO}"
    zero = constant(graph, f"zero_point_{RESIDUAL_ZERO}", zero_point)
    step = constant(graph, f"scale_{scale:.9g}", scale)
    fine_step = constant(graph, f"scale_{scale / RESIDUAL_STEPS:.9g}", np.float32(scale / RESIDUAL_STEPS))
    coarse = tape.op("QuantizeLinear", [x, step, zero])
    rest = tape.op("Sub", [x, tape.op("DequantizeLinear", [coarse, step, zero])])
    fine = tape.op("QuantizeLinear", [rest, fine_step, zero])
    return tape.op("Concat", [coarse, fine], {"axis": -2})


def add_residual(graph: ir.Graph, tape: ir.tape.Tape, matmul: ir.Value) -> ir.Value:
    """Add the sum [.., T, N] of the two halves of `matmul` [.., 2T, N], of which the second counts 1/254."""
    coarse, fine = tape.op_multi_out("Split", [matmul], {"axis": -2, "num_outputs": 2}, num_outputs=2)
    share = constant(graph, f"one_over_{RESIDUAL_STEPS}", np.float32(1 / RESIDUAL_STEPS))
    return tape.op("Add", [coarse, tape.op("Mul", [fine, share])])
